"""How much loss runs through every prefix and to which next tokens, from the head's gradient.

Shape suffixes: V vocabulary, D width, M distinct prefixes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from scipy.stats import norm
from torch import Tensor

from attacks.gradient.closed_forms import prediction_errors
from attacks.gradient.subspace import EPS

# Of all the label weights of a victim: taken for one although it is noise.
FALSE_LABELS = 1e-3
# Keeps quotients of vanishing probabilities finite.
TINY = 1e-30


@dataclass(frozen=True)
class Weight:
    """A loss weight and its standard deviation."""

    value: float
    std: float


@dataclass(frozen=True, eq=False)
class Flow:
    """Loss weights by distinct prefix.

    A text lends each of its predictions its own weight. The prefixes' errors are
    E = through · P - Y with Y the weight to each label, so that Σ Y = through. What runs into a
    prefix by a token and does not run on ends there. A difference of two gradients has weights of
    both signs.

    Attributes:
        through: total weight of the predictions made from each prefix.
        labels: by prefix and token, what of it goes to that token; only what stands out of noise.
        least: √EPS of the largest weight; below it nothing is told apart, as all are products of
            float32.
        explained: whether these prefixes account for the whole gradient, up to rounding; if not,
            others share in the weights.
    """

    through: tuple[Weight, ...] = field(repr=False)
    labels: tuple[dict[int, Weight], ...] = field(repr=False)
    least: float
    explained: bool

    @classmethod
    def of(
        cls,
        head_VD: Tensor,
        ids_V: Tensor,
        hidden_MD: Tensor,
        probability_MV: Tensor,
        resolution: float = 0.0,
    ) -> Flow:
        """Solve E = through · P - Y for one number and few labels a prefix.

        First by the weighted median of E / P (the least absolute deviations, blind to the few
        labels), then by least squares over all that is no label. Rounding to a step is no chance
        error where a whole row of the gradient rounds to zero, so it counts with its worst case.

        Args:
            head_VD: rows of the head's gradient that hold nothing else.
            ids_V: their token ids.
            hidden_MD: the head's inputs after each prefix.
            probability_MV: float64, the model's predictions there of the same tokens.
            resolution: the step to which the gradient is rounded, 0 for plain floats.

        Raises:
            ValueError: the inputs depend on each other, or are as many as the width.
        """
        errors_MV, noise_MV, outside_V = prediction_errors(head_VD, hidden_MD)
        through_M1 = _weighted_median(errors_MV, probability_MV)
        through_std_M1 = torch.zeros_like(through_M1)
        deviations = float(norm.isf(FALSE_LABELS / errors_MV.numel() / 2))
        width, energy_V = head_VD.shape[1], head_VD.double().square().sum(1)
        # Of each entry: a step, where two roundings meet, and √D EPS of the largest in float32.
        rounding = width * (resolution**2 / 2 + EPS**2 * float(energy_V.max()))
        explained = bool((outside_V <= rounding).all())
        worst_M = resolution / 2 * torch.linalg.pinv(hidden_MD.double()).abs().sum(0)
        noise_MV = noise_MV.maximum(worst_M[:, None] / deviations)
        for _ in range(3):
            weight_MV = through_M1 * probability_MV - errors_MV
            std_MV = torch.hypot(noise_MV, through_std_M1 * probability_MV)
            least = math.sqrt(EPS) * float(max(weight_MV.abs().max(), through_M1.abs().max()))
            label_MV = weight_MV.abs() > (deviations * std_MV).clamp(min=least)
            regressor_MV = probability_MV.masked_fill(label_MV, 0.0)
            energy_M1 = regressor_MV.square().sum(1, keepdim=True).clamp(min=TINY)
            through_M1 = (errors_MV * regressor_MV).sum(1, keepdim=True) / energy_M1
            through_std_M1 = (regressor_MV * noise_MV).sum(1, keepdim=True) / energy_M1
        labels: tuple[dict[int, Weight], ...] = tuple({} for _ in hidden_MD)
        for m, v in label_MV.nonzero().tolist():
            labels[m][int(ids_V[v])] = Weight(float(weight_MV[m, v]), float(std_MV[m, v]))
        pairs = zip(through_M1[:, 0].tolist(), through_std_M1[:, 0].tolist(), strict=True)
        return cls(tuple(Weight(*pair) for pair in pairs), labels, least, explained)


def _weighted_median(errors_MV: Tensor, probability_MV: Tensor) -> Tensor:
    """Of E / P, weighted by P, capped so that no likely label outweighs half of the others."""
    cap_M1 = probability_MV.median(dim=1, keepdim=True).values
    ratio_MV, order_MV = (errors_MV / probability_MV.clamp(min=TINY)).sort(dim=1)
    mass_MV = probability_MV.minimum(cap_M1).gather(1, order_MV).cumsum(1)
    middle_M1 = (mass_MV < mass_MV[:, -1:] / 2).sum(1, keepdim=True)
    return ratio_MV.gather(1, middle_M1)
