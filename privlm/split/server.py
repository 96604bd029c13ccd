"""The server of a split model: runs its blocks over rows that a client sends."""

from privlm.split.messages import (
    ClientRows,
    End,
    ServerRows,
    Session,
    max_bytes,
    pack_rows,
    require_session,
    unpack_rows,
)
from privlm.split.partition import ServerPart
from protocols.errors import NonFiniteResult, UnexpectedMessage
from protocols.party import Outgoing, Party
from protocols.randomness import Stream
from protocols.wire import decode


class SplitServer(Party):
    """One session's server: answers rows with rows, in order, until the client ends.

    It holds keys and values of its own blocks for this session alone; the part is shared by all
    sessions and never written to.

    Refused, with the party closed: another sender or session, rows out of order, of another width
    or beyond the context, and numbers that are infinite or none, or that the blocks turn into such.

    Args:
        session: What both sides know.
        part: The server's blocks.
        stream: Of the party; the server draws nothing.

    Raises:
        ValueError: If the part is not the session's, or would apply dropout.
    """

    def __init__(self, session: Session, part: ServerPart, stream: Stream) -> None:
        session.check_part(part)
        super().__init__(session.server, stream, {})
        self._session = session
        self._part = part
        self._cache = part.model.new_cache()
        self._max_bytes = max_bytes(part.model.context, part.model.width)

    def _on_start(self) -> list[Outgoing]:
        return []

    def _on_message(self, sender: str, data: bytes) -> list[Outgoing]:
        if sender != self._session.client:
            raise UnexpectedMessage(f"a message from {sender!r}, not {self._session.client!r}")
        message = decode(data, ClientRows, End, max_bytes=self._max_bytes)
        if isinstance(message, End):
            require_session(message, self._session)
            self._finish()
            return []
        assert isinstance(message, ClientRows)
        model, start = self._part.model, self._cache.length
        if message.width != model.width or start + message.rows > model.context:
            raise UnexpectedMessage(
                f"{message.rows} rows of {message.width} numbers after {start}, where "
                f"{model.context} of {model.width} fit"
            )
        received_TD = unpack_rows(message, self._session, start)
        rows_TD = self._part.body(received_TD, self._cache).float()
        if not rows_TD.isfinite().all():
            raise NonFiniteResult("what the server's blocks make of the rows is not finite")
        return [
            Outgoing(self._session.client, pack_rows(ServerRows, self._session, start, rows_TD))
        ]
