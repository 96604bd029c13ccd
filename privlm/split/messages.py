"""What client and server of a split model send each other.

Shapes: T = rows, D = width.
"""

from dataclasses import dataclass
from typing import Annotated, TypeVar

import numpy as np
import torch
from msgspec import Meta
from torch import Tensor

from protocols.errors import LocalProtocolError, MalformedMessage, UnexpectedMessage
from protocols.party import View
from protocols.wire import HEADER_BYTES, Message, decode, encode

SESSION_BYTES = 16
_ENVELOPE_BYTES = 256
"""More than everything but the numbers takes."""


class NonFiniteRows(LocalProtocolError):
    """A row that is no number cannot be clipped; sent, it would tell of the prompt by that."""


SessionId = Annotated[bytes, Meta(min_length=SESSION_BYTES, max_length=SESSION_BYTES)]


class _Rows(Message, frozen=True):
    """Hidden states of ``rows`` positions from ``start`` on: little-endian float32, row by row."""

    session: SessionId
    start: Annotated[int, Meta(ge=0, le=1 << 31)]
    rows: Annotated[int, Meta(ge=1, le=1 << 31)]
    width: Annotated[int, Meta(ge=1, le=1 << 31)]
    data: Annotated[bytes, Meta(max_length=1 << 32)]


class ClientRows(_Rows, frozen=True, tag="split/client-rows"):
    """What the client's head made of tokens, protected: input of block ``first``."""


class ServerRows(_Rows, frozen=True, tag="split/server-rows"):
    """What the server's body made of them: input of block ``last``."""


class End(Message, frozen=True, tag="split/end"):
    """The client sends no more rows."""

    session: SessionId


R = TypeVar("R", ClientRows, ServerRows)


@dataclass(frozen=True)
class Session:
    """What both sides know before the first message.

    Args:
        id: 16 bytes that no other session has.
        client: The client's name.
        server: The server's name.

    Raises:
        ValueError: If the id has another length or the names are alike.
    """

    id: bytes
    client: str = "client"
    server: str = "server"

    def __post_init__(self) -> None:
        if len(self.id) != SESSION_BYTES:
            raise ValueError(f"a session id has {SESSION_BYTES} bytes, not {len(self.id)}")
        if self.client == self.server:
            raise ValueError(f"client and server are both named {self.client!r}")


def max_bytes(positions: int, width: int) -> int:
    """The longest message that carries so many rows."""
    return HEADER_BYTES + _ENVELOPE_BYTES + 4 * positions * width


def pack_rows(kind: type[R], session: Session, start: int, rows_TD: Tensor) -> bytes:
    """Put rows from position ``start`` on into a message.

    Raises:
        NonFiniteRows: If a number is infinite or none.
    """
    array_TD = rows_TD.detach().cpu().float().numpy().astype("<f4", copy=False)
    if not np.isfinite(array_TD).all():
        raise NonFiniteRows("a hidden state is infinite or no number; nothing was sent")
    rows, width = array_TD.shape
    return encode(
        kind(session=session.id, start=start, rows=rows, width=width, data=array_TD.tobytes())
    )


def unpack_rows(message: ClientRows | ServerRows, session: Session, start: int) -> Tensor:
    """Return the rows (T, D), float32, of a message.

    Raises:
        UnexpectedMessage: Of another session, or not from position ``start`` on.
        MalformedMessage: Too few or too many bytes, or a number is infinite or none.
    """
    require_session(message, session)
    if message.start != start:
        raise UnexpectedMessage(f"rows from position {message.start} on, expected {start}")
    return _numbers(message)


def require_session(message: ClientRows | ServerRows | End, session: Session) -> None:
    """Raise UnexpectedMessage if the message is of another session."""
    if message.session != session.id:
        raise UnexpectedMessage("a message of another session")


def received_rows(view: View) -> Tensor:
    """All rows that a server received, in the order of their arrival: (T, D) float32.

    Raises:
        ValueError: If it received none.
        ProtocolError: If it received what is no message of a split session.
    """
    messages = [
        decode(item.data, ClientRows, End, max_bytes=len(item.data)) for item in view.received
    ]
    rows = [_numbers(message) for message in messages if isinstance(message, ClientRows)]
    if not rows:
        raise ValueError(f"{view.party} received no rows")
    return torch.cat(rows)


def _numbers(message: ClientRows | ServerRows) -> Tensor:
    if len(message.data) != 4 * message.rows * message.width:
        raise MalformedMessage(
            f"{len(message.data)} bytes are not {message.rows} rows of {message.width} numbers"
        )
    # The copy is writable, as torch wants its memory to be.
    numbers = np.frombuffer(message.data, "<f4").astype(np.float32)
    if not np.isfinite(numbers).all():
        raise MalformedMessage("a row with a number that is infinite or none")
    return torch.from_numpy(numbers).view(message.rows, message.width)
