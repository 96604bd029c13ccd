"""Prompts read off their activations, token after token, by trying every candidate.

Whoever has the weights can compute what an honest client sends after a known prefix, for every
token that may follow. So the first row gives the first token, both give the second, and so on, in
time linear in the length (Nikolaou et al. 2025, "SipIt", for exact activations).

Shape suffixes: N requests, W live prefixes of each, B = N·W prefixes at once, T tokens, t of them
already read, C candidates, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attacks.threat import Attack, Reconstruction, Recovered, SentActivations

BEAM = 4
"""Prefixes that :data:`with_prior` keeps alive for each request.

Under noise a wrong token costs more than itself, for all later rows are then compared with what
follows a wrong prefix; a beam takes it back. Time grows with the width, the gain ever less.
"""

_NUMBERS = 1 << 21  # float32s at once, 8 MiB: beyond a core's cache temporaries cost more

Score = Callable[[SentActivations, Tensor, Tensor], Tensor]
"""view, rows (B, D), prefixes (B, t) -> (B, C), higher for likelier tokens; adds up over t."""


def closeness(view: SentActivations, rows_BD: Tensor, prefix_Bt: Tensor) -> Tensor:
    """Minus the squared distance between each row and every candidate's honest activation."""
    at_once = max(1, _NUMBERS // (len(rows_BD) * _numbers_a_candidate(view)))
    parts = [
        (view.sent_after(prefix_Bt, ids_C) - rows_BD[:, None]).square().sum(-1)
        for ids_C in view.vocabulary_C.split(at_once)
    ]
    return -torch.cat(parts, dim=1)


def posterior(view: SentActivations, rows_BD: Tensor, prefix_Bt: Tensor) -> Tensor:
    """Log-likelihood under noise of the known deviation plus log-prior, up to a constant (nats)."""
    likelihood_BC = closeness(view, rows_BD, prefix_Bt) / (2 * view.noise_std**2)
    return likelihood_BC + view.log_prior(prefix_Bt)


def prior(view: SentActivations, rows_BD: Tensor, prefix_Bt: Tensor) -> Tensor:
    """What the model itself expects, whatever was sent (nats)."""
    return view.log_prior(prefix_Bt)


@torch.no_grad()
def read(view: SentActivations, score: Score, width: int = 1) -> Tensor:
    """The prompts of highest summed score that a beam search finds: int64 ids (N, T).

    All requests advance together, in chunks of bounded memory; the only loop is over positions.
    ``width`` prefixes of each stay alive; 1 takes the best token at once.
    """
    length = view.rows_NTD.shape[1]
    numbers = width * len(view.vocabulary_C) * _numbers_a_candidate(view)
    chunks = view.rows_NTD.split(max(1, _NUMBERS // numbers))
    return torch.cat([_read_chunk(view, rows_NTD, score, width, length) for rows_NTD in chunks])


def _read_chunk(
    view: SentActivations, rows_NTD: Tensor, score: Score, width: int, length: int
) -> Tensor:
    count, candidates = len(rows_NTD), len(view.vocabulary_C)
    prefix_NWt = torch.empty(count, 1, 0, dtype=torch.int64)
    total_NW = torch.zeros(count, 1, dtype=torch.float64)
    for t in range(length):
        rows_BD = rows_NTD[:, t].repeat_interleave(prefix_NWt.shape[1], dim=0)
        gain_BC = score(view, rows_BD, prefix_NWt.flatten(0, 1))
        total_NX = (total_NW[..., None] + gain_BC.unflatten(0, (count, -1))).flatten(1)
        total_NW, place_NW = total_NX.topk(min(width, total_NX.shape[1]), dim=1)
        parent_NWt = (place_NW // candidates)[..., None].expand(-1, -1, t)
        token_NW1 = view.vocabulary_C[place_NW % candidates][..., None]
        prefix_NWt = torch.cat([prefix_NWt.gather(1, parent_NWt), token_NW1], dim=2)
    return prefix_NWt[:, 0]


def _numbers_a_candidate(view: SentActivations) -> int:
    """Of its activation, and of the keys and values that a client model may repeat for it."""
    return 2 * (view.rows_NTD.shape[1] + 1) * view.rows_NTD.shape[2]


def _reconstruction(attack: str, ids_NT: Tensor) -> Reconstruction:
    texts = (tuple(ids) for ids in ids_NT.tolist())
    return Reconstruction(attack, tuple(Recovered((text,), frozenset(text)) for text in texts))


def _nearest(view: SentActivations) -> Reconstruction:
    return _reconstruction("nearest neighbour", read(view, closeness))


def _with_prior(view: SentActivations) -> Reconstruction:
    if view.noise_std == 0:  # nothing to weigh the prior against
        return _reconstruction("nearest neighbour with prior", read(view, closeness))
    return _reconstruction("nearest neighbour with prior", read(view, posterior, BEAM))


def _prior_only(view: SentActivations) -> Reconstruction:
    return _reconstruction("prior alone", read(view, prior))


nearest_neighbour = Attack("nearest neighbour", SentActivations, _nearest)
"""Takes the candidate whose honest activation lies nearest: exact where nothing was added."""

with_prior = Attack("nearest neighbour with prior", SentActivations, _with_prior)
"""Knows the deviation of the noise and what the model expects: the likeliest prompt, given the rows
and as far as a beam of `BEAM` finds it. Without noise the same as `nearest_neighbour`."""

prior_only = Attack("prior alone", SentActivations, _prior_only)
"""Writes what the model expects from an empty prefix on and never looks at a row: a control."""
