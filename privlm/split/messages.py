"""What client and server of a split model send each other.

Shapes: T = rows, D = width.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, TypeVar

import msgspec
import numpy as np
import torch
from msgspec import Meta
from torch import Tensor

from privlm.split.partition import ClientPart, Cut, ServerPart, require_no_dropout
from protocols.errors import LocalProtocolError, MalformedMessage, UnexpectedMessage, WrongSession
from protocols.party import View
from protocols.wire import HEADER_BYTES, Message, decode, encode

SESSION_BYTES = 16
DIGEST_BYTES = 32
_ENVELOPE_BYTES = 256
"""More than everything but the numbers takes."""


class NonFiniteRows(LocalProtocolError):
    """A row that is no number cannot be clipped; sent, it would tell of the prompt by that."""


Digest = Annotated[bytes, Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]


class _Rows(Message, frozen=True):
    """Hidden states of ``rows`` positions from ``start`` on: little-endian float32, row by row."""

    session: Digest
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

    session: Digest


R = TypeVar("R", ClientRows, ServerRows)


@dataclass(frozen=True)
class Session:
    """What both sides know before the first message; no message counts under another description.

    Args:
        id: 16 bytes that no other session has.
        cut: Which blocks the server runs.
        width: Numbers in a row.
        layers: Blocks of the whole model.
        client: The client's name.
        server: The server's name.

    Raises:
        ValueError: If the id has another length, the names are alike, or the cut does not fit.
    """

    id: bytes
    cut: Cut
    width: int
    layers: int
    client: str = "client"
    server: str = "server"

    def __post_init__(self) -> None:
        if len(self.id) != SESSION_BYTES:
            raise ValueError(f"a session id has {SESSION_BYTES} bytes, not {len(self.id)}")
        if self.client == self.server:
            raise ValueError(f"client and server are both named {self.client!r}")
        if self.width < 1 or self.cut.last > self.layers:
            raise ValueError(
                f"{self.cut} does not fit {self.layers} blocks, or the width {self.width} is none"
            )

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the description: two sessions that differ anywhere have two digests."""
        description = (
            "privlm/split/session/v1",
            self.id,
            self.client,
            self.server,
            (self.cut.first, self.cut.last),
            self.width,
            self.layers,
        )
        return hashlib.sha256(msgspec.msgpack.encode(description)).digest()

    def check_part(self, part: ClientPart | ServerPart) -> None:
        """Raise ValueError unless ``part`` is cut as the session says, and applies no dropout."""
        theirs = (part.cut, part.model.width, part.model.layers)
        if theirs != (self.cut, self.width, self.layers):
            raise ValueError(
                f"the session is of {self.cut}, width {self.width} and {self.layers} blocks; "
                f"the part is of {part.cut}, width {part.model.width} and {part.model.layers}"
            )
        require_no_dropout(part.model)  # the whole model, which shares it, may train by now


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
        kind(session=session.digest, start=start, rows=rows, width=width, data=array_TD.tobytes())
    )


def unpack_rows(message: ClientRows | ServerRows, session: Session, start: int) -> Tensor:
    """Return the rows (T, D), float32, of a message.

    Raises:
        WrongSession: Of another session, or of one described otherwise.
        UnexpectedMessage: Not from position ``start`` on.
        MalformedMessage: Too few or too many bytes, or a number is infinite or none.
    """
    require_session(message, session)
    if message.start != start:
        raise UnexpectedMessage(f"rows from position {message.start} on, expected {start}")
    return _numbers(message)


def require_session(message: ClientRows | ServerRows | End, session: Session) -> None:
    """Raise WrongSession unless the message belongs to this session."""
    if message.session != session.digest:
        raise WrongSession("a message of another session, or of one described otherwise")


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
