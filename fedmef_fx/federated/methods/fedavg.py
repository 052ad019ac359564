"""FedAvg (McMahan et al., AISTATS 2017): the dense model, averaged by samples."""

from typing import Final

from fedmef_fx.federated.methods.baseline import baseline

__all__ = ["FEDAVG"]

FEDAVG: Final = baseline("fedavg", "dense", "never", exchange="2 O_d")
"""No masks; dense weights travel both ways in every round."""
