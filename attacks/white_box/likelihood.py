"""The most powerful test of one record against DP-SGD: the law of its coordinate, step by step.

Shape suffixes: C canaries, W witnesses, S steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from attacks.threat import Attack, Scores

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_LEAST_STD = 1e-6
"""Of the noise, over the clipping bound: below it a coordinate is read off, and squares overflow
before long."""


@dataclass(frozen=True, eq=False)
class SeenGradients:
    """Every noised gradient of a training, seen by the adversary that its analysis assumes.

    That adversary knows the public plan, every record but a canary, and which other records each
    batch held. A canary is a record whose clipped gradient is ``norm`` at one coordinate, which no
    other canary raises; whether it was trained on is the question. Witnesses are coordinates that
    no canary raises: what they release beyond the known is noise and nothing else.

    Sums are those before division by the expected batch size.

    Attributes:
        released_SC: the noised sums at the canaries' coordinates.
        background_SC: what all other records add there.
        noise_SW: the noised sums at the witnesses' less what all records add there.
        tensor_C, tensor_W: which parameter tensor each coordinate belongs to.
        norm: the clipping bound.
        noise_std: of the noise that is claimed.
        sampling_probability: with which a record joins a batch.
    """

    released_SC: Floats = field(repr=False)
    background_SC: Floats = field(repr=False)
    noise_SW: Floats = field(repr=False)
    tensor_C: Ints = field(repr=False)
    tensor_W: Ints = field(repr=False)
    norm: float
    noise_std: float
    sampling_probability: float


def log_likelihood_ratio(view: SeenGradients) -> Scores:
    """Log-likelihood ratio (nats) of "trained on" over "not"; shape (C,).

    What is left of a coordinate when all that is known is taken away is x ~ N(0, σ²) without the
    canary and (1-q) N(0, σ²) + q N(c, σ²) with it, independently in every step:

        ln L₁/L₀ = Σ_s ln((1-q) + q exp((c x_s - c²/2) / σ²)),

    the most powerful test of one against the other (Neyman and Pearson 1933), and the pair of laws
    whose divergence the accountant bounds. σ is measured on the tensor's witnesses, so that a
    tensor with less noise than is claimed gives its canaries away.
    """
    std_C = _measured_std(view)
    rest_SC = view.released_SC - view.background_SC
    q = view.sampling_probability
    with np.errstate(divide="ignore"):
        absent, present = np.log1p(-q), np.log(q)
    exponent_SC = (view.norm * rest_SC - view.norm**2 / 2) / std_C**2
    return Scores("white-box", torch.from_numpy(np.logaddexp(absent, present + exponent_SC).sum(0)))


def _measured_std(view: SeenGradients) -> Floats:
    """Of the noise at each canary's coordinate; what is claimed where its tensor has no witness."""
    std_C = np.full(len(view.tensor_C), view.noise_std)
    for tensor in np.unique(view.tensor_W):
        noise = view.noise_SW[:, view.tensor_W == tensor]
        std_C[view.tensor_C == tensor] = np.sqrt(np.square(noise).mean())
    return np.asarray(np.maximum(std_C, _LEAST_STD * view.norm))


white_box = Attack("white-box", SeenGradients, log_likelihood_ratio)
