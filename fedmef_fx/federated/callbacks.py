"""What is done after every round: stop a run that gains nothing more, keep the best model. See `run(on_round=...)`."""

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from torch import nn

from fedmef_fx.errors import ConfigError
from fedmef_fx.federated.checkpoint import Checkpoint, read_state_file, save_checkpoint
from fedmef_fx.federated.rounds import RoundRecord
from fedmef_fx.federated.server import Server
from fedmef_fx.federated.state import ModelState, load_state
from fedmef_fx.files.atomic import usable_folder

__all__ = ["Callback", "EarlyStopping", "KeepBest", "OnRound"]

OnRound = Callable[[RoundRecord, Server], object]
"""Called with every finished round and the server with the new model; what gives True ends the run."""

_LOWER_IS_BETTER: Final = ("loss", "error", "perplexity")


class Callback:
    """A callback that also knows of the rounds before a run went on from a checkpoint."""

    def on_resume(self, rounds: Sequence[RoundRecord], server: Server) -> bool:
        """Called once, before a run goes on.

        Args:
            rounds: All that were played before.
            server: `server.model` is the model after the last of them.

        Returns:
            Whether the run is over.
        """
        del rounds, server
        return False

    def __call__(self, record: RoundRecord, server: Server) -> bool:
        """Called with every finished round.

        Returns:
            Whether the run ends here.
        """
        raise NotImplementedError


class _Watched(Callback):
    """Looks at one number of every record."""

    def __init__(self, by: str, *, higher_is_better: bool | None) -> None:
        self.by = by
        lower = any(word in by for word in _LOWER_IS_BETTER)
        self._sign = 1.0 if (not lower if higher_is_better is None else higher_is_better) else -1.0

    def _score(self, record: RoundRecord) -> float | None:
        """The number, larger is better; None where the round has none."""
        value = getattr(record, self.by, None) if self.by not in record.metrics else record.metrics[self.by]
        if value is None and not hasattr(record, self.by) and record.test_loss is not None:
            names = ", ".join(["train_loss", "test_loss", "test_accuracy", *record.metrics])
            raise ConfigError(
                f"{type(self).__name__}: by: got {self.by!r}, which round {record.round_index} does not have; expected "
                f"one of {names}"
            )
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            return None
        return self._sign * value


class EarlyStopping(_Watched):
    """Ends a run in which a number has not become better for some rounds.

    Args:
        by: A field of `RoundRecord`, or the name of one of its metrics.
        patience: After how many evaluated rounds without a better one, >= 1.
        least: By how much a number has to be better to count, >= 0.
        higher_is_better: None for what the name says: losses, errors and perplexities should be low.

    Raises:
        ConfigError: A value out of range.

    Example:
        >>> run(net, clients, rounds=200, test=test, on_round=EarlyStopping(patience=10))  # doctest: +SKIP
    """

    def __init__(
        self, by: str = "test_loss", *, patience: int = 5, least: float = 0.0, higher_is_better: bool | None = None
    ) -> None:
        if type(patience) is not int or patience < 1:
            raise ConfigError(f"EarlyStopping: patience: got {patience!r}; expected an integer >= 1")
        if isinstance(least, bool) or not isinstance(least, int | float) or not 0 <= least < math.inf:
            raise ConfigError(f"EarlyStopping: least: got {least!r}; expected a number >= 0")
        super().__init__(by, higher_is_better=higher_is_better)
        self._patience, self._least = patience, least
        self._forget()

    def _forget(self) -> None:
        self._best, self._waited = -math.inf, 0

    def on_resume(self, rounds: Sequence[RoundRecord], server: Server) -> bool:
        """See `Callback.on_resume`."""
        self._forget()
        ends = [self(record, server) for record in rounds]
        return bool(ends) and ends[-1]

    def __call__(self, record: RoundRecord, server: Server) -> bool:
        """See `Callback`."""
        if record.round_index == 0:  # of another run
            self._forget()
        score = self._score(record)
        if score is None:
            return False
        is_better = score > self._best + self._least or self._best == -math.inf
        self._best, self._waited = (score, 0) if is_better else (self._best, self._waited + 1)
        return self._waited >= self._patience


class KeepBest(_Watched):
    """Keeps the model of the round in which a number was best.

    Args:
        by: A field of `RoundRecord`, or the name of one of its metrics.
        directory: Where it is written as `best.safetensors` whenever it changes; None for memory alone, where it does
            not survive an interruption.
        higher_is_better: None for what the name says: losses, errors and perplexities should be low.

    Attributes:
        record: Of the best round; None before the first evaluated one.

    Example:
        >>> best = KeepBest("test_accuracy")
        >>> run(net, clients, rounds=20, test=test, on_round=best)  # doctest: +SKIP
        >>> fedmef_fx.save(best.model(), "best.safetensors")  # doctest: +SKIP
    """

    file_name: Final = "best.safetensors"

    def __init__(
        self,
        by: str = "test_accuracy",
        *,
        directory: str | Path | None = None,
        higher_is_better: bool | None = None,
    ) -> None:
        super().__init__(by, higher_is_better=higher_is_better)
        self.record: RoundRecord | None = None
        self._directory = None if directory is None else Path(directory)
        self._state: ModelState | None = None
        self._like: nn.Module | None = None

    def on_resume(self, rounds: Sequence[RoundRecord], server: Server) -> bool:
        """See `Callback.on_resume`."""
        self.record = None
        scores = {record.round_index: score for record in rounds if (score := self._score(record)) is not None}
        if not scores:
            return False
        best = max(scores, key=lambda index: (scores[index], -index))
        if best == rounds[-1].round_index:
            self._keep(rounds[-1], server)
            return False
        path = None if self._directory is None else self._directory / self.file_name
        if path is not None and path.exists():
            state = read_state_file(path)
            if state.version == best + 1:
                self.record = next(record for record in rounds if record.round_index == best)
                self._state, self._like = state, server.model
        return False

    def __call__(self, record: RoundRecord, server: Server) -> bool:
        """See `Callback`."""
        if record.round_index == 0:  # of another run
            self.record = None
        score = self._score(record)
        before = None if self.record is None else self._score(self.record)
        if score is not None and (before is None or score > before):
            self._keep(record, server)
        return False

    def model(self) -> nn.Module:
        """The best model, transformed and in eval mode.

        Raises:
            ConfigError: There is none yet.
        """
        if self._state is None or self._like is None:
            raise ConfigError(f"KeepBest: no round had a number {self.by!r}; expected a run with one, e.g. with test=")
        model = copy.deepcopy(self._like)
        load_state(model, self._state)
        return model.eval()

    def _keep(self, record: RoundRecord, server: Server) -> None:
        self.record, self._state, self._like = record, server.state, server.model
        if self._directory is not None:
            usable_folder(self._directory, error=ConfigError)
            save_checkpoint(self._directory, Checkpoint(server.state, {}, {}, (), {}), name=self.file_name)
