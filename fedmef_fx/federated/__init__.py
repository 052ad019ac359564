"""Federated training: transport-neutral client and server cores, and an in-process engine.

`run` trains a federation in one process. `Client` and `Server` are its two halves, for other transports: they exchange
bytes and know nothing of how these travel.
"""

from fedmef_fx.federated.aggregation import (
    Aggregator,
    CoordinateMedian,
    Krum,
    MeanAroundMedian,
    NormClipping,
    TrimmedMean,
    WeightedMean,
)
from fedmef_fx.federated.callbacks import Callback, EarlyStopping, KeepBest
from fedmef_fx.federated.cells import Contender, compare_methods
from fedmef_fx.federated.client import Client
from fedmef_fx.federated.client_data import ClientData
from fedmef_fx.federated.comparison import MethodComparison, compare
from fedmef_fx.federated.engine import run
from fedmef_fx.federated.failures import Failure
from fedmef_fx.federated.history import History
from fedmef_fx.federated.hooks import ClientHooks, ServerHooks
from fedmef_fx.federated.limits import Limits
from fedmef_fx.federated.local import LocalTraining, train_locally
from fedmef_fx.federated.local_round import LocalRound
from fedmef_fx.federated.logging_callbacks import JsonLines, TensorBoard
from fedmef_fx.federated.messages import RoundTask, Update
from fedmef_fx.federated.methods import METHODS, Method
from fedmef_fx.federated.neighbour_mixing import NeighbourMixing
from fedmef_fx.federated.objective import Objective
from fedmef_fx.federated.privacy import Privacy
from fedmef_fx.federated.rounds import RoundRecord
from fedmef_fx.federated.server import Server
from fedmef_fx.federated.server_round import ServerRound
from fedmef_fx.federated.state import ModelState
from fedmef_fx.federated.strategy import Strategy

__all__ = [
    "METHODS",
    "Aggregator",
    "Callback",
    "Client",
    "ClientData",
    "ClientHooks",
    "Contender",
    "CoordinateMedian",
    "EarlyStopping",
    "Failure",
    "History",
    "JsonLines",
    "KeepBest",
    "Krum",
    "Limits",
    "LocalRound",
    "LocalTraining",
    "MeanAroundMedian",
    "Method",
    "MethodComparison",
    "ModelState",
    "NeighbourMixing",
    "NormClipping",
    "Objective",
    "Privacy",
    "RoundRecord",
    "RoundTask",
    "Server",
    "ServerHooks",
    "ServerRound",
    "Strategy",
    "TensorBoard",
    "TrimmedMean",
    "Update",
    "WeightedMean",
    "compare",
    "compare_methods",
    "run",
    "train_locally",
]
