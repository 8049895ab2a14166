"""fedtune's ClientApp for the Flower engine: the same app, with its events relayed."""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.app import app as client_app
from simulations.engines.relay import relaying


class _Relayed(ClientApp):
    """Flower loads only instances of ClientApp, so this is one."""

    def __call__(self, message: Message, context: Context) -> Message:
        with relaying(with_error=False):
            return client_app(message, context)


app = _Relayed()
