"""Which of two prompts was it? The test that a claimed ε speaks of.

Shape suffixes: N requests, B of them at once, T tokens, D width.
"""

from __future__ import annotations

import torch

from attacks.threat import Attack, PairedPrompts, Scores

_ROWS = 1 << 14  # of activations at once


@torch.no_grad()
def log_likelihood_ratio(view: PairedPrompts) -> Scores:
    """Log-likelihood ratio (nats) of the second prompt over the first; shape (N,).

    With f(p) what an honest client sends for p and Gaussian noise of deviation σ,

        ln L(p₁)/L(p₀) = (‖rows - f(p₀)‖² - ‖rows - f(p₁)‖²) / 2σ²
                       = ⟨f(p₁) - f(p₀), rows - (f(p₀) + f(p₁))/2⟩ / σ²,

    the most powerful test of one prompt against the other (Neyman and Pearson 1933). It is
    distributed as N(±μ²/2, μ²), μ = ‖f(p₁) - f(p₀)‖/σ, with the plus sign where the second prompt
    was sent. Without noise it is the difference of squared distances instead.
    """
    sent = view.sent
    at_once = max(1, _ROWS // sent.rows_NTD.shape[1])
    parts = []
    for rows_BTD, pairs_B2T in zip(
        sent.rows_NTD.split(at_once), view.pairs_N2T.split(at_once), strict=True
    ):
        first_BTD, second_BTD = (sent.sent(pairs_B2T[:, which]).double() for which in (0, 1))
        # A product, for the difference of the two squares would lose what little tells them apart.
        middle_BTD = (first_BTD + second_BTD) / 2
        parts.append(((second_BTD - first_BTD) * (rows_BTD - middle_BTD)).sum((1, 2)))
    precision = 2.0 if sent.noise_std == 0 else sent.noise_std**-2
    return Scores("distinguish", torch.cat(parts) * precision)


distinguish = Attack("distinguish", PairedPrompts, log_likelihood_ratio)
