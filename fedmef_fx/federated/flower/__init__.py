"""Federations on Flower (extra `flower`): its transport, TLS, authentication and simulation, our rounds and messages.

`serve` is the body of a ServerApp, `client_app` makes a ClientApp; `fedmef-fx flower new DIR` writes both. A message
holds one array of bytes, which `federated.Server` and `federated.Client` make and read.
"""

try:
    from fedmef_fx.federated.flower.client import ClientSetup, client_app
    from fedmef_fx.federated.flower.server import serve
except ModuleNotFoundError as error:
    if error.name != "flwr":
        raise
    raise ModuleNotFoundError(
        "fedmef_fx.federated.flower needs Flower: pip install 'fedmef-fx[flower]'", name="flwr"
    ) from error

__all__ = ["ClientSetup", "client_app", "serve"]
