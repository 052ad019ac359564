"""FedTiny (Huang et al., ICDCS 2023): the server adjusts by averaged top-k gradients; masks start at random.

Of the paper the adjustment is here. Its choice among coarsely pruned models by batch statistics is not: all methods
start from the same kind of mask.
"""

from typing import Final

from fedmef_fx.federated.methods.baseline import baseline

__all__ = ["FEDTINY"]

FEDTINY: Final = baseline("fedtiny", "random", "server", exchange="2 O_s + O_xi")
"""Dense activations, BatchNorm, no extrusion."""
