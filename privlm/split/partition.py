"""A decoder in two parts: head and tail at the client, body at the server.

Shapes: T = positions of this call, D = width, V = vocabulary.
"""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from privlm.models.decoder import Cache, Decoder


@dataclass(frozen=True)
class Cut:
    """Blocks [0, first) at the client, [first, last) at the server, the rest at the client.

    Embedding, last norm and head are the client's.

    Raises:
        ValueError: The server would hold no block, or ``first`` is negative.
    """

    first: int
    last: int

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.last:
            raise ValueError(
                f"a cut needs 0 <= first < last, or the server would hold no block; "
                f"got first {self.first}, last {self.last}"
            )


class HeldElsewhere(nn.Module):
    """Stands where a module is that the other party holds."""

    def forward(self, *_: object, **__: object) -> Tensor:
        """Raise RuntimeError."""
        raise RuntimeError("this part of the model is held by the other party")


@dataclass(frozen=True)
class ClientPart:
    """Embedding, blocks [0, first) and [last, L), norm and head."""

    model: Decoder = field(repr=False)
    cut: Cut

    @torch.no_grad()
    def head(self, ids_T: Tensor, start: int, cache: Cache) -> Tensor:
        """Rows (T, D) that block ``first`` takes, for tokens from position ``start`` on."""
        x_1TD = self.model.embed_tokens(ids_T[None].to(_like(self.model).device), start)
        return self.model.run_blocks(x_1TD, cache, last=self.cut.first)[0]

    @torch.no_grad()
    def tail(self, rows_TD: Tensor, cache: Cache) -> Tensor:
        """Logits (T, V) from the server's rows."""
        x_1TD = self.model.run_blocks(
            rows_TD[None].to(_like(self.model)), cache, first=self.cut.last
        )
        return self.model.predict(x_1TD)[0]


@dataclass(frozen=True)
class ServerPart:
    """Blocks [first, last); neither embedding nor head."""

    model: Decoder = field(repr=False)
    cut: Cut

    @torch.no_grad()
    def body(self, rows_TD: Tensor, cache: Cache) -> Tensor:
        """Rows (T, D) that block ``last`` takes."""
        x_1TD = rows_TD[None].to(_like(self.model))
        return self.model.run_blocks(x_1TD, cache, self.cut.first, self.cut.last)[0]


def client_part(model: Decoder, cut: Cut) -> ClientPart:
    """The client's part; it shares its modules with ``model`` and holds no others.

    Raises:
        ValueError: If the model has fewer blocks than the cut, or would apply dropout.
    """
    _require_usable(model, cut)
    kept = {*range(cut.first), *range(cut.last, model.layers)}
    return ClientPart(_keeping(model, kept, ends=True), cut)


def server_part(model: Decoder, cut: Cut) -> ServerPart:
    """The server's part; it shares its modules with ``model`` and holds no others.

    Raises:
        ValueError: If the model has fewer blocks than the cut, would apply dropout, or has
            parameters or buffers outside its modules: the server would hold what may be the ends'.
    """
    _require_usable(model, cut)
    own = [name for name, _ in _own_tensors(model)]
    if own:
        raise ValueError(
            f"{type(model).__name__} itself holds {', '.join(own)}, which the server would get; "
            "put them into a module of the ends or into the blocks"
        )
    return ServerPart(_keeping(model, range(cut.first, cut.last), ends=False), cut)


def _like(model: Decoder) -> Tensor:
    """A tensor on the device and of the type that the part computes with."""
    return next(model.parameters())


def _require_usable(model: Decoder, cut: Cut) -> None:
    if cut.last > model.layers:
        raise ValueError(f"a cut at block {cut.last} does not fit a model of {model.layers} blocks")
    require_no_dropout(model)


def require_no_dropout(model: Decoder) -> None:
    """Raise ValueError if the model would apply dropout."""
    if any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in model.modules()):
        raise ValueError("the model would apply dropout to every answer; call its eval() first")


def _own_tensors(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(recurse=False)
    yield from model.named_buffers(recurse=False)


def _keeping(model: Decoder, blocks: Iterable[int], *, ends: bool) -> Decoder:
    """A shallow copy in which all but the given blocks, and the ends if asked, are held elsewhere.

    Blocks keep their numbers.
    """
    kept = set(blocks)
    part = copy.copy(model)
    # The copy shares the dictionary of children; it needs its own before any is replaced.
    part.__dict__["_modules"] = {
        name: child if ends else HeldElsewhere() for name, child in model.named_children()
    }
    part.blocks = nn.ModuleList(
        block if number in kept else HeldElsewhere() for number, block in enumerate(model.blocks)
    )
    return part
