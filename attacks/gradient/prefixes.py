"""Growing texts from their first token on: the prefixes whose rows a gradient contains.

Shape suffixes: B prefixes, t tokens of a prefix, C candidate tokens, D width, N prefixes found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attacks.gradient.subspace import EPS, RowSpan
from attacks.threat import OpenModel

# Numbers computed at once, caches included: 128 MiB in float32.
AT_ONCE = 1 << 25
# A rejected row at most this many times its squared tolerance away is a near miss. In plain floats
# there are none, by factors of thousands. Where there are N, about N / CLOSE wrong rows must have
# passed: measured, the squared distances of wrong rows are spread about evenly there.
CLOSE = 16.0

Prefix = tuple[int, ...]


@dataclass(frozen=True)
class PrefixTree:
    """Every prefix whose row lies in the span, and all of its own prefixes with it.

    Attributes:
        nodes: by length.
        repeats: nodes whose row is their parent's. A token that so far only follows itself attends
            to copies of one value, so without absolute positions ``a``, ``aa``, ``aaa`` have one
            row: their number is not in it.
        clear: there were no near misses, so nothing has passed by chance.
    """

    nodes: tuple[Prefix, ...] = field(repr=False)
    repeats: frozenset[Prefix] = field(repr=False)
    clear: bool


def grow(model: OpenModel, span: RowSpan, tokens_at: Callable[[int], Tensor]) -> PrefixTree:
    """Extend prefixes by every token whose row at layer 1 lies in the span, all at once.

    Distinct true rows are independent, so no more of them than the rank can be true. Chance may add
    a few, which lead nowhere; the search ends where all that pass must be expected to be false,
    or half of them are more than can be true. A text's last token has no row.

    Args:
        model: known to the adversary.
        span: of layer 1.
        tokens_at: position -> candidate ids there.
    """
    alive_Bt = torch.empty(1, 0, dtype=torch.int64)
    parents_BD: Tensor | None = None
    nodes: list[Prefix] = []
    repeats: set[Prefix] = set()
    clear = True
    for position in range(model.context - 1):
        ids_C = tokens_at(position)
        if not len(ids_C):
            break
        prefix_B, choice_B, rows_BD, near_misses = _passing(model, span, alive_Bt, ids_C)
        clear = clear and not near_misses
        if not len(prefix_B) or near_misses / CLOSE > len(prefix_B):
            break
        grown_Bt = torch.cat([alive_Bt[prefix_B], ids_C[choice_B, None]], dim=1)
        repeated_B = torch.zeros(len(rows_BD), dtype=torch.bool)
        if parents_BD is not None:
            moved_B = (rows_BD - parents_BD[prefix_B]).square().sum(1)
            repeated_B = moved_B <= EPS * rows_BD.square().sum(1)
        found = [tuple(prefix) for prefix in grown_Bt.tolist()]
        repeats.update(
            p for p, repeated in zip(found, repeated_B.tolist(), strict=True) if repeated
        )
        if len(nodes) + len(found) - len(repeats) > 2 * span.rank:
            repeats.difference_update(found)
            clear = False
            break
        nodes += found
        alive_Bt, parents_BD = grown_Bt, rows_BD
    return PrefixTree(tuple(nodes), frozenset(repeats), clear)


def tokens_in(model: OpenModel, span: RowSpan, ids_C: Tensor, position: int) -> Tensor:
    """Of the ids, those whose row at layer 0 lies in the span when they stand at ``position``."""
    prefix_1t = torch.zeros(1, position, dtype=torch.int64)
    return ids_C[_passing(model, span, prefix_1t, ids_C, layer=0)[1]]


def _passing(
    model: OpenModel, span: RowSpan, prefix_Bt: Tensor, ids_C: Tensor, layer: int = 1
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Which (prefix, token) pairs pass, their rows, and how many of the others came near."""
    a_prefix = max(1, len(ids_C)) * model.width * (2 * prefix_Bt.shape[1] + 4)
    prefixes, choices, rows, near_misses = [], [], [], 0
    for start, part_Bt in enumerate(prefix_Bt.split(max(1, AT_ONCE // a_prefix))):
        rows_BCD = model.attended_after(layer, part_Bt, ids_C)
        excess_BC = span.excess(rows_BCD)
        prefix_N, choice_N = (excess_BC <= 1).nonzero(as_tuple=True)
        near_misses += int((excess_BC <= CLOSE).sum()) - len(prefix_N)
        prefixes.append(prefix_N + start * max(1, AT_ONCE // a_prefix))
        choices.append(choice_N)
        rows.append(rows_BCD[prefix_N, choice_N])
    return torch.cat(prefixes), torch.cat(choices), torch.cat(rows), near_misses
