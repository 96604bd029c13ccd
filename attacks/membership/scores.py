"""Membership scores of language models, all functions of one forward pass.

Shape suffixes: N records, S = T - 1 predicted tokens.
"""

from __future__ import annotations

import torch

from attacks.threat import Attack, ReleasedModel, Scores


def loss(view: ReleasedModel) -> Scores:
    """Mean log-likelihood of the record's tokens (Yeom et al. 2018)."""
    return Scores("loss", view.released.statistics.mean_logp_N)


def min_k_plus_plus(view: ReleasedModel, fraction: float = 0.2) -> Scores:
    """Mean of the lowest ``fraction`` of standardised token log-probabilities.

    Each token's log-probability is standardised by the mean and deviation of
    log p under the model's own prediction at that position (Zhang et al. 2025,
    "Min-K%++").
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie in (0, 1], got {fraction}")
    s = view.released.statistics
    z_NS = ((s.logp_NS - s.mean_NS) / s.std_NS.clamp(min=1e-6)).masked_fill(~s.target_NS, torch.inf)
    count_N = s.target_NS.sum(1)
    keep_N = (count_N * fraction).ceil().long().clamp(min=1)
    lowest_NS = z_NS.sort(dim=1).values
    kept_NS = torch.arange(z_NS.shape[1]) < keep_N[:, None]
    return Scores("min-k%++", lowest_NS.masked_fill(~kept_NS, 0.0).sum(1) / keep_N)


def reference(view: ReleasedModel) -> Scores:
    """Log-likelihood gained over a public reference model (Carlini et al. 2021, section 5)."""
    gained_N = view.released.statistics.mean_logp_N - view.reference.statistics.mean_logp_N
    return Scores("reference", gained_N)


MEMBERSHIP: tuple[Attack[ReleasedModel], ...] = (
    Attack("loss", ReleasedModel, loss),
    Attack("min-k%++", ReleasedModel, min_k_plus_plus),
    Attack("reference", ReleasedModel, reference),
)
