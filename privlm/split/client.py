"""The client of a split model: holds the prompt, both ends of the model and the sampling."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from privlm.models.decoder import next_token, tempered
from privlm.split.messages import (
    ClientRows,
    End,
    ServerRows,
    Session,
    max_bytes,
    pack_rows,
    unpack_rows,
)
from privlm.split.partition import ClientPart
from privlm.split.protection import Protection, RowBudgetSpent
from protocols.errors import NonFiniteResult, UnexpectedMessage
from protocols.party import Outgoing, Party
from protocols.randomness import Stream
from protocols.wire import decode, encode


class SplitClient(Party):
    """One session's client: sends the prompt's rows, then one row for each token it generates.

    A row is sent only once all rows of the request fit into the protection's budget; the last
    token generated is never sent. Keys and values of the client's own blocks stay here. Rows of the
    server that give logits which are infinite or none are refused.

    Attributes:
        tokens: Generated so far; grows.
        logits_TV: At all positions of the prompt, if nothing is to be generated; else None.

    Args:
        session: What both sides know.
        part: The client's blocks, embedding and head.
        prompt: Token ids.
        protection: Of the rows.
        stream: Of the party: noise, and sampling if there is a temperature.
        max_new_tokens: Tokens to generate; 0: only ``logits_TV`` is wanted.
        temperature: 0 takes the likeliest token; else logits are divided by it and sampled.
        stop_token: Generation ends with it.

    Raises:
        ValueError: If the prompt is empty or holds an unknown token, an argument is out of range,
            prompt and new tokens exceed the context, the part is not the session's, or it would
            apply dropout.
    """

    def __init__(
        self,
        session: Session,
        part: ClientPart,
        prompt: Sequence[int],
        protection: Protection,
        stream: Stream,
        *,
        max_new_tokens: int = 0,
        temperature: float = 0.0,
        stop_token: int | None = None,
    ) -> None:
        session.check_part(part)
        inputs = {
            "prompt": tuple(prompt),
            "protection": protection,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "stop_token": stop_token,
        }
        super().__init__(session.client, stream, inputs)
        model = part.model
        if not prompt or not all(0 <= token < model.vocab_size for token in prompt):
            raise ValueError(f"a prompt is one token or more, from 0 to {model.vocab_size - 1}")
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must not be negative, got {max_new_tokens}")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be finite and not negative, got {temperature}")
        # The last token is chosen and not sent.
        self._rows = len(prompt) + max(max_new_tokens - 1, 0)
        if self._rows > model.context:
            raise ValueError(
                f"{len(prompt)} tokens and {max_new_tokens} new ones exceed the context of "
                f"{model.context}"
            )
        self.tokens: list[int] = []
        self.logits_TV: Tensor | None = None
        self._session = session
        self._part = part
        self._prompt = torch.tensor(prompt)
        self._protection = protection
        self._max_new_tokens = max_new_tokens
        self._temperature = temperature
        self._stop_token = stop_token
        self._sent = 0
        self._awaited = 0
        self._head_cache = model.new_cache()
        self._tail_cache = model.new_cache()

    def _on_start(self) -> list[Outgoing]:
        budget = self._protection.max_rows
        if budget is not None and self._rows > budget:
            raise RowBudgetSpent(
                f"the request would send {self._rows} rows, its protection accounts for {budget}"
            )
        return [self._send(self._prompt)]

    def _on_message(self, sender: str, data: bytes) -> list[Outgoing]:
        if sender != self._session.server:
            raise UnexpectedMessage(f"a message from {sender!r}, not {self._session.server!r}")
        model = self._part.model
        message = decode(data, ServerRows, max_bytes=max_bytes(self._awaited, model.width))
        if (message.rows, message.width) != (self._awaited, model.width):
            raise UnexpectedMessage(
                f"{message.rows} rows of {message.width} numbers, expected {self._awaited} "
                f"of {model.width}"
            )
        rows_TD = unpack_rows(message, self._session, self._sent - self._awaited)
        logits_TV = self._part.tail(rows_TD, self._tail_cache)
        if not logits_TV.isfinite().all():
            raise NonFiniteResult("the server's rows give logits that are not finite")
        if not self._max_new_tokens:
            self.logits_TV = logits_TV
            return [self._end()]
        token = self._choose(logits_TV[-1])
        self.tokens.append(token)
        if len(self.tokens) == self._max_new_tokens or token == self._stop_token:
            return [self._end()]
        return [self._send(torch.tensor([token]))]

    def _send(self, ids_T: Tensor) -> Outgoing:
        start, self._awaited = self._sent, len(ids_T)
        self._sent += len(ids_T)
        assert self._sent <= self._rows, "more rows than the budget was checked for"
        rows_TD = self._part.head(ids_T, start, self._head_cache)
        sent_TD = self._protection.protect(rows_TD, self._stream)
        return Outgoing(self._session.server, pack_rows(ClientRows, self._session, start, sent_TD))

    def _choose(self, logits_V: Tensor) -> int:
        if self._temperature == 0:
            return int(next_token(logits_V[None]))
        below_V = tempered(logits_V.double(), self._temperature).cumsum(0)
        uniform = int(self._stream.integers(1 << 53, ())) * 2.0**-53
        # Rounding may leave the last sum a little below 1.
        return int((below_V <= uniform * below_V[-1]).sum())

    def _end(self) -> Outgoing:
        self._finish()
        return Outgoing(self._session.server, encode(End(session=self._session.digest)))
