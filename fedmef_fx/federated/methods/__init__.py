"""FedMef and its rivals, as the few policies in which they differ; one small file each, `catalogue` has them all."""

from fedmef_fx.federated.methods.catalogue import METHODS, method_of
from fedmef_fx.federated.methods.method import Method
from fedmef_fx.federated.methods.policies import Adjustment, AfterRound, Opening
from fedmef_fx.federated.methods.top_gradients import TopGradients

__all__ = ["METHODS", "Adjustment", "AfterRound", "Method", "Opening", "TopGradients", "method_of"]
