"""FedMef (Huang et al., CVPR 2024, arXiv 2403.14737): FedTiny's adjustment after extrusion, and pruned activations.

Clients extrude the k_l lowest weights in adjustment rounds (Eq. 2-5); NSConv and activation pruning are as the
configuration says.
"""

from typing import Final

from fedmef_fx.federated.methods.method import Method

__all__ = ["FEDMEF"]

FEDMEF: Final = Method(name="fedmef")
"""Everything else as `Config` says."""
