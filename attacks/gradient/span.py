"""Exact recovery of texts from a gradient: the span check (DAGER, Petrov et al. 2024), completed.

Shape suffixes: C candidate tokens, K uploads, P parameters, O outputs, V vocabulary, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attacks.gradient.closed_forms import embedding_tokens
from attacks.gradient.endings import complete
from attacks.gradient.prefixes import grow, tokens_in
from attacks.gradient.subspace import RowSpan
from attacks.threat import Attack, Gradient, OpenModel, Reconstruction, Recovered, SeenUpdates

NAME = "gradient span"
FULL = "the span is full: as many rows as the width has room for, or noise in every direction"
DROWNED = "no row stands out of the rounding"
SHALLOW = "one layer gives tokens without order"


def recover_texts(model: OpenModel, gradient: Gradient) -> Recovered:
    """All texts behind a gradient, in order, as a set.

    The gradient of a value projection is Δᵀ X with X the layer's inputs, so that its rows span
    them. Layer 0 tells which tokens (with absolute positions: where) were read; at layer 1 a row
    tells its whole prefix, so texts grow from their first token on, and the rank says how many
    distinct prefixes there are. The head's gradient adds each text's last token, which no span
    holds, once all prefixes are found. A prefix that cannot be continued is reported as far as it
    goes, without its last token.

    Args:
        model: known to the adversary.
        gradient: of the texts' summed losses, each to a scale of its own; several clients' too.

    Returns:
        Texts of at least two tokens. With as many distinct prefixes as dimensions, or noise, the
        span holds everything: then there are none, and ``tokens`` alone may be known, from an
        untied embedding.
    """
    vocabulary_C = model.vocabulary_C
    if not model.tied:
        read_C = embedding_tokens(gradient.embedding_VD)
        vocabulary_C = vocabulary_C[torch.isin(vocabulary_C, read_C)]
    # With noise every row of the embedding is nonzero, and tells nothing.
    listed = len(vocabulary_C) < len(model.vocabulary_C)
    tokens = frozenset(vocabulary_C.tolist()) if listed else frozenset[int]()
    bag = RowSpan.of(gradient.values[0], gradient.resolution)
    places = model.context - 1 if model.positional else 1
    if not bag.tells(len(vocabulary_C) * places):
        return Recovered((), tokens, FULL if bag.rank else DROWNED)
    read = [tokens_in(model, bag, vocabulary_C, position) for position in range(places)]
    tokens = frozenset(torch.cat(read).tolist())
    if len(gradient.values) < 2:
        return Recovered((), tokens, SHALLOW)
    order = RowSpan.of(gradient.values[1], gradient.resolution)
    if not order.tells(order.rank * max(map(len, read))):
        return Recovered((), tokens, FULL if order.rank else DROWNED)
    tree = grow(model, order, lambda position: read[position if model.positional else 0])
    if not tree.nodes:
        return Recovered((), tokens, "no token begins a text")
    texts, notes = complete(model, gradient, tree, tokens)
    texts = {text for text in texts if len(text) > 1}
    return Recovered(
        tuple(sorted(texts)),
        tokens.union(*texts),
        "; ".join(sorted(notes)),
    )


def _run(view: SeenUpdates) -> Reconstruction:
    """Each victim's upload alone; failing that, less each other, where masks may cancel."""
    return Reconstruction(
        NAME, tuple(_recover_victim(view, uploads_KP) for uploads_KP in view.uploads)
    )


def _recover_victim(view: SeenUpdates, uploads_KP: Tensor) -> Recovered:
    best = _attempt(view, uploads_KP[0], view.step)
    for other_P in uploads_KP[1:]:
        if best.texts and not best.note:
            break
        # Two roundings; the subtraction wraps around as the ring does.
        difference = _attempt(view, uploads_KP[0] - other_P, math.sqrt(2) * view.step)
        best = max(best, difference, key=_yield)
    return best


def _attempt(view: SeenUpdates, units_P: Tensor, resolution: float) -> Recovered:
    return recover_texts(view.model, view.gradient(units_P.double() * view.step, resolution))


def _yield(recovered: Recovered) -> tuple[int, int]:
    return sum(map(len, recovered.texts)), len(recovered.tokens)


span = Attack(NAME, SeenUpdates, _run)
"""Finds the texts behind an upload, alone or where another's mask cancels its own."""
