"""What a run starts from: arguments that are checked, the transformed model, settings, a directory."""

import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset

from fedmef_fx.config import Config, check_config
from fedmef_fx.errors import CheckpointError, ConfigError, FedmefError
from fedmef_fx.federated.batches import Collate
from fedmef_fx.federated.checkpoint import clear_leftovers
from fedmef_fx.federated.client_data import declared_samples, is_lazy, opened
from fedmef_fx.federated.drawing import drawing_from
from fedmef_fx.federated.local import LocalTraining
from fedmef_fx.federated.methods import Method
from fedmef_fx.federated.objective import Objective
from fedmef_fx.federated.opening import activate_all
from fedmef_fx.federated.strategy import Strategy
from fedmef_fx.files.atomic import usable_folder
from fedmef_fx.sparse_model.transformation import is_transformed, transformation_of
from fedmef_fx.transformation.transform import transform

__all__ = [
    "check_clients",
    "check_list",
    "example_of",
    "network_on",
    "own_strategy",
    "prepared",
    "sample_of",
    "settings_of",
    "usable_directory",
]


def own_strategy(strategy: Strategy | None, clients_per_round: int | None, *, clients: int) -> Strategy:
    """The strategy, with the number of clients of a round in it."""
    if not isinstance(strategy, Strategy | None):
        raise ConfigError(
            f"federated.run: strategy: got {strategy!r:.80}; expected a federated.Strategy(...). Methods, such as "
            "'fedavg', are named by method="
        )
    strategy = copy.copy(strategy) if strategy is not None else Strategy()
    if strategy.minimum > clients > 0:
        raise ConfigError(
            f"Strategy.minimum: got {strategy.minimum}; expected at most {clients}, the number of clients"
        )
    if clients_per_round is None:
        return strategy
    if strategy.clients_per_round not in (None, clients_per_round):
        raise ConfigError(
            f"federated.run: clients_per_round: got {clients_per_round} beside a strategy with "
            f"{strategy.clients_per_round}; expected one of the two"
        )
    strategy.clients_per_round = clients_per_round
    return strategy


def check_list(clients: object) -> None:
    """Whether clients are a list, or a sequence of one's own: one data set in the place of many has a length, too."""
    is_list = isinstance(clients, Sized) and hasattr(clients, "__getitem__")
    if not is_list or isinstance(clients, str | bytes | Mapping | Dataset | DataLoader | Tensor):
        raise ConfigError(
            f"federated.run: clients: got {type(clients).__name__}; expected a list of data sets, one per client, e.g. "
            "[Subset(dataset, part.tolist()) for part in fedmef_fx.data.dirichlet_partition(labels, clients=10)]"
        )


def check_clients(
    clients: Sequence[Any], *, rounds: int, clients_per_round: int | None, test: Any, client_tests: Sequence[Any] | None
) -> list[int | None]:
    """The number of samples of every client; None where that is not known before its data are opened."""
    if type(rounds) is not int or rounds < 1:
        raise ConfigError(f"federated.run: rounds: got {rounds!r}; expected an integer >= 1")
    if not clients:
        raise ConfigError("federated.run: got no clients; expected a list of data sets, one per client")
    sizes = [declared_samples(data) for data in clients]
    empty = [str(index) for index, size in enumerate(sizes) if size == 0]
    if empty:
        raise ConfigError(
            f"federated.run: client {', '.join(empty)} has no samples; expected at least one each: leave empty clients "
            "out, e.g. [data for data in clients if len(data)]"
        )
    if test is not None and declared_samples(test) == 0:
        raise ConfigError("federated.run: test: got a data set without samples; expected some, or test=None")
    if client_tests is not None and len(client_tests) != len(clients):
        raise ConfigError(
            f"federated.run: client_tests: got {len(client_tests)}; expected {len(clients)}, one per client, None for "
            "those without"
        )
    allowed = clients_per_round is None or (type(clients_per_round) is int and 1 <= clients_per_round <= len(clients))
    if not allowed:
        raise ConfigError(
            f"federated.run: clients_per_round: got {clients_per_round!r}; expected an integer in [1, {len(clients)}], "
            "the number of clients"
        )
    return sizes


def example_of(model: nn.Module, objective: Objective, data: Sequence[Any], collate: Collate | None) -> Any:
    """Arguments by name with which the model is called, for `prepared`; None where batches are no dictionaries.

    A model that computes its loss where it gets labels has to be traced with them. Data that are opened when their
    client is chosen are not opened for it.
    """
    cpu = torch.device("cpu")
    for source in data:
        if source is None or is_lazy(source):
            continue
        try:
            with drawing_from(0, cpu, source):
                batch = next(opened(source, collate=collate).batches(batch_size=1, shuffle=False, device=cpu), None)
            return dict(objective.arguments(model, batch)) if isinstance(batch, Mapping) else None
        except FedmefError:  # a client whose data cannot be used is left out when it is its turn
            continue
    return None


def prepared(
    model: nn.Module, config: Config | None, method: Method, *, example: Mapping[str, Any] | None = None
) -> nn.Module:
    """A transformed copy of the model that fits the method, traced with an example where there is one."""
    check_config(config, where="federated.run")
    if not is_transformed(model):
        network = transform(model, method.configure(config or Config()), example_kwargs=example)
        if method.opening is not None:
            activate_all(network, model, method=method.name)
        return network
    own = transformation_of(model).config
    wanted = method.configure(config or own)
    different = [
        f"{field.name}={getattr(own, field.name)!r} instead of {getattr(wanted, field.name)!r}"
        for field in dataclasses.fields(Config)
        if getattr(own, field.name) != getattr(wanted, field.name)
    ]
    if different:
        raise ConfigError(
            f"federated.run: the model was transformed with {', '.join(different)}, which method {method.name!r} and "
            "config ask for; expected the original model, which run transforms itself, or one with this configuration"
        )
    network = copy.deepcopy(model)
    if method.opening is not None:
        activate_all(network, model, method=method.name)
    return network


def settings_of(
    model: nn.Module,
    method: Method,
    training: LocalTraining,
    strategy: Strategy,
    *,
    rounds: int,
    sizes: Sequence[int | None],
) -> dict[str, Any]:
    """What a run depends on, as JSON can hold it."""
    return {
        "method": method.settings(),
        "config": json.loads(transformation_of(model).config.to_json()),
        "training": training.settings(),
        "rounds": rounds,
        "clients_per_round": strategy.clients_per_round,
        "client_samples": list(sizes),
        "strategy": {name: value for name, value in strategy.settings().items() if name != "clients_per_round"},
    }


def sample_of(data: Any, collate: Collate | None) -> Tensor:
    """One input of a client, without the batch dimension."""
    batch = next(opened(data, collate=collate).batches(batch_size=1, shuffle=False, device=torch.device("cpu")))
    first: Tensor = next(leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))[0]
    return first


def network_on(network: nn.Module, device: torch.device | str) -> nn.Module:
    """Move a model.

    Raises:
        ConfigError: A device that cannot be used here.
    """
    try:
        return network.to(device)
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without a kind of device
        raise ConfigError(
            f"federated.run: device: got {str(device)!r}, which cannot be used here: {error!s:.200}; expected "
            "cpu, cuda, cuda:1, ..."
        ) from error


def usable_directory(checkpoint_dir: str | Path) -> Path:
    """Make a directory for checkpoints if it is missing.

    Raises:
        CheckpointError: It cannot be used.
    """
    directory = usable_folder(checkpoint_dir, error=lambda text: CheckpointError(f"checkpoint_dir: {text}"))
    try:
        clear_leftovers(directory)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint_dir: {directory}: cannot be used: {error}; expected a writable directory"
        ) from error
    return directory
