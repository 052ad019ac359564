"""A Flower grid in this process: every message is answered by a ClientApp at once, when it is pulled."""

import uuid
from collections.abc import Iterable

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity

__all__ = ["FakeGrid"]


class FakeGrid:
    """Nodes 100, 101, ... with partition-id 0, 1, ...; those `gone` are not connected, `silent` ones do not answer."""

    def __init__(self, app: ClientApp, nodes: int) -> None:
        # Flower sets these in the processes that it starts.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        self.app = app
        self.contexts = {100 + index: self._context(index) for index in range(nodes)}
        self.gone: set[int] = set()
        self.silent: set[int] = set()
        self.forgetful: set[int] = set()
        self.broken: set[int] = set()
        self.trains = 0
        self.queries = 0
        self._waiting: dict[str, Message] = {}

    @staticmethod
    def _context(index: int) -> Context:
        return Context(0, 0, {"partition-id": index}, RecordDict(), {})

    def get_node_ids(self) -> Iterable[int]:
        return [node for node in self.contexts if node not in self.gone]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        identities = []
        for message in messages:
            identity = str(uuid.uuid4())
            message.metadata.__dict__["_message_id"] = identity
            message.metadata.__dict__["_src_node_id"] = 1
            self._waiting[identity] = message
            self.queries += message.metadata.message_type.startswith("query")
            identities.append(identity)
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = [self._answer(identity) for identity in list(message_ids)]
        return [reply for reply in replies if reply is not None]

    def _answer(self, identity: str) -> Message | None:
        node = self._waiting[identity].metadata.dst_node_id
        if node in self.silent or node in self.gone:
            return None
        message = self._waiting.pop(identity)
        if message.metadata.message_type.startswith("train"):
            self.trains += 1
            if node in self.forgetful:
                self.contexts[node].state = RecordDict()
            if node in self.broken:
                return Message(Error(1, "Traceback: /home/somebody/app.py"), reply_to=message)
        return self.app(message, self.contexts[node])
