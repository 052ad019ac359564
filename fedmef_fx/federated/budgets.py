"""Clients with different amounts of memory: the same masks for all, codes and parts of batches planned for each.

A client states how many bytes its training step may take (`ClientData.memory_budget`). For each budget the model is
transformed once more with `Config.memory_budget`: the planner chooses what is kept of activations, per layer, and how
small the parts of a batch are. Weights, masks and messages are the same for all clients.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fedmef_fx.config import Config
from fedmef_fx.display.sizes import parse_bytes
from fedmef_fx.errors import ConfigError, FedmefError
from fedmef_fx.federated.batches import Collate
from fedmef_fx.federated.client_data import ClientData, opened
from fedmef_fx.federated.drawing import drawing_from
from fedmef_fx.federated.local_training import LocalTraining
from fedmef_fx.federated.objective import Objective
from fedmef_fx.federated.state import Schema
from fedmef_fx.sparse_model.transformation import is_transformed, memory_plan, transformation_of
from fedmef_fx.transformation.transform import transform

__all__ = ["PLANS", "planned_models"]

PLANS = "plans"
"""Where a run's settings say what was planned for clients with budgets."""


def planned_models(
    model: nn.Module,
    network: nn.Module,
    clients: Sequence[Any],
    training: LocalTraining,
    *,
    objective: Objective,
    collate: Collate | None,
) -> tuple[dict[int, nn.Module], dict[str, Any]]:
    """Models of the clients that state a budget, and what was planned for them.

    Args:
        model: The original model.
        network: The server's, transformed.
        clients: As `run` takes them.
        training: Its batch size and optimizer are planned for.
        objective: It says how the model is called with a batch.
        collate: Makes a batch of items; None for what torch's loaders do.

    Returns:
        Client -> model, the same object for clients of the same budget; and client -> plan, as JSON can hold it.

    Raises:
        ConfigError: A model that was transformed before, or a budget that cannot be reached.
    """
    budgets = {
        index: data.memory_budget
        for index, data in enumerate(clients)
        if isinstance(data, ClientData) and data.memory_budget is not None
    }
    if not budgets:
        return {}, {}
    if is_transformed(model):
        raise ConfigError(
            "federated.run: clients state memory budgets, for which run transforms the model; expected the original one"
        )
    base = transformation_of(network).config.replace(memory_budget=None, budget_optimizer=_optimizer_of(training))
    made: dict[int, nn.Module] = {}
    models, plans = {}, {}
    for client, budget in budgets.items():
        size = parse_bytes(budget, name="ClientData.memory_budget")
        if size not in made:
            batch = _batch(clients[client], training.batch_size, collate)
            made[size] = _planned(model, base, size, objective, batch, client=client)
            if Schema.of(made[size]) != Schema.of(network):
                raise ConfigError(
                    f"federated.run: client {client}: its plan changed what is exchanged; expected a bug report"
                )
        models[client] = made[size].to(next(network.parameters()).device)
        plans[str(client)] = _described(made[size])
    return models, plans


def _optimizer_of(training: LocalTraining) -> str:
    """The optimizer whose state counts; of one that is not known, as much as Adam's."""
    if training.optimizer == "sgd":
        return "sgd-momentum" if training.momentum else "sgd"
    return "adam"


def _batch(data: Any, batch_size: int, collate: Collate | None) -> Any:
    cpu = torch.device("cpu")
    with drawing_from(0, cpu, data):
        return next(opened(data, collate=collate).batches(batch_size=batch_size, shuffle=False, device=cpu))


def _planned(
    model: nn.Module, base: Config, budget: int, objective: Objective, batch: Any, *, client: int
) -> nn.Module:
    args, kwargs = objective.call(model, batch)
    try:
        return transform(model, base.replace(memory_budget=budget), example_inputs=args, example_kwargs=kwargs)
    except FedmefError as error:
        raise ConfigError(f"federated.run: client {client}: ClientData.memory_budget: {error}") from error


def _described(model: nn.Module) -> dict[str, Any]:
    plan = memory_plan(model)
    if plan is None:
        raise ConfigError("federated.run: got a model without a plan; expected one for its memory budget")
    return {
        "budget": plan.budget,
        "predicted_peak": plan.predicted_peak,
        "micro_batch": plan.micro_batch,
        "settings": dict(plan.settings),
        "layers": {choice.layer: [choice.gamma, choice.bits] for choice in plan.layers},
    }
