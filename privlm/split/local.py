"""One request with both parties in this process."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from privlm.split.client import SplitClient
from privlm.split.messages import SESSION_BYTES, Session, received_rows
from privlm.split.partition import ClientPart, ServerPart
from privlm.split.protection import Protection
from privlm.split.server import SplitServer
from protocols.randomness import Stream
from protocols.transport import InMemoryNetwork, Outcome


@dataclass(frozen=True, eq=False)
class Request:
    """A request that was answered.

    Attributes:
        client: With what it generated.
        outcome: Views, traffic and rounds.
    """

    client: SplitClient = field(repr=False)
    outcome: Outcome

    @property
    def sent_TD(self) -> Tensor:
        """The rows as the server received them, float32."""
        return received_rows(self.outcome.views["server"])


def run_in_memory(
    client: ClientPart,
    server: ServerPart,
    prompt: Sequence[int],
    protection: Protection,
    stream: Stream,
    *,
    max_new_tokens: int = 0,
    temperature: float = 0.0,
    stop_token: int | None = None,
) -> Request:
    """Run one request from the first row to the last answer.

    Args:
        client: The client's part of the model.
        server: The server's part of the same cut.
        prompt: Token ids.
        protection: Of the rows.
        stream: Of the session id, the client and the server, in this order.
        max_new_tokens: Tokens to generate; 0: only the prompt's logits are wanted.
        temperature: 0 takes the likeliest token.
        stop_token: Generation ends with it.

    Raises:
        ProtocolError: What closed a party.
        ValueError: The parts are of different cuts, or as :class:`SplitClient`.
    """
    if client.cut != server.cut:
        raise ValueError(f"the client is cut at {client.cut}, the server at {server.cut}")
    model = client.model
    session = Session(stream.bytes(SESSION_BYTES), client.cut, model.width, model.layers)
    asking = SplitClient(
        session,
        client,
        prompt,
        protection,
        stream,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        stop_token=stop_token,
    )
    outcome = InMemoryNetwork([asking, SplitServer(session, server, stream)]).run()
    for error in outcome.errors.values():
        raise error
    return Request(asking, outcome)
