"""Which of these updates did the client upload? The game that a promise of secrecy must survive.

The adversary puts the updates forward itself, so nothing is left to chance but the protection: if
what it holds depends on the choice at all, matching is to show it.

Shape suffixes: B trials at once, C candidates, P parameters, H contrasts of a trial, R = 2H
readings of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attacks.threat import Attack, ChosenUpload, ChosenUploads, Scores

_AT_ONCE = 16
"""Trials in one product: the candidates are then read from memory once for all of them."""

_ROUNDING_VARIANCE = 1 / 12
"""Of a number rounded to the nearest step, in steps squared."""

_LARGEST_SHARE = 1 - 2.0**-40
"""Beyond it a match is perfect, and what is left the rounding of this computation."""


@dataclass(frozen=True, eq=False)
class _Candidates:
    """C updates in units of ``step``, as offsets from their mean.

    Attributes:
        source: the tensor they were read from.
        step: the real value of one unit.
        mean_P: their mean, in steps.
        offset_CP: of each from the mean, in steps.
        square_CP: of the offsets.
        reach_P: the farthest that any candidate lies from the mean, and a step for the rounding.
    """

    source: Tensor = field(repr=False)
    step: float
    mean_P: Tensor = field(repr=False)
    offset_CP: Tensor = field(repr=False)
    square_CP: Tensor = field(repr=False)
    reach_P: Tensor = field(repr=False)

    @classmethod
    def of(cls, trial: ChosenUpload) -> _Candidates:
        mean_P = trial.update_CP.mean(0)
        offset_CP = (trial.update_CP - mean_P) / trial.step
        return cls(
            trial.update_CP,
            trial.step,
            mean_P / trial.step,
            offset_CP,
            offset_CP.square(),
            offset_CP.abs().amax(0) + 1,
        )

    def cover(self, trial: ChosenUpload) -> bool:
        """Whether the trial is over these very candidates."""
        return trial.update_CP is self.source and trial.step == self.step

    def contrasts(self, trial: ChosenUpload) -> Tensor:
        """What the client's holding says beyond the mean, alone and less each other; (H, P), steps.

        Each is scaled so that the candidate stands in it once: held₀ - held_h + known_h holds it
        1 - weight_h times, so a partner of weight -1 gives twice of it.
        """
        weight_H1 = trial.weight_H[1:, None]
        # The subtraction wraps around as the ring does; only then is a mask used twice gone.
        difference_HP = (trial.held_HP[:1] - trial.held_HP[1:]).double()
        known_HP = trial.known_HP[1:] / trial.step
        others_HP = (difference_HP + known_HP) / (1 - weight_H1)
        return torch.cat([trial.held_HP[:1].double(), others_HP]) - self.mean_P

    def log_likelihood(self, contrasts_BHP: Tensor) -> Tensor:
        """The best reading's log-likelihood ratio of each candidate over none; (B, C), in nats.

        A reading is one contrast x on a set S of n parameters, under Gaussian noise of unknown
        variance. On all parameters, candidate d stands against noise around the candidates:

            -n/2 · ln(‖x - d‖² / mean_c ‖x - d_c‖²) = -n/2 · ln(1 - share),
            share = (2⟨x, d⟩ - ‖d‖² + mean_c ‖d_c‖²) / (‖x‖² + mean_c ‖d_c‖²),

        with a floor of n/12 for the fixed-point rounding. In this form a share of 10^-12, all that
        there is beside the ‖x‖² of a uniform mask, is not rounded away into ties. On the parameters
        where x is within the candidates' reach r, which a mask leaves only by chance, it stands
        against what is uniform there: the same, plus Σ ln 2r - n/2 · ln(2πe mean_c ‖x - d_c‖²/n).
        So masks on other parameters do not drown these.
        """
        local = contrasts_BHP.shape[1]  # readings from here on are of parameters within reach
        within_BHP = contrasts_BHP.abs() <= self.reach_P
        set_BRP = torch.cat([torch.ones_like(within_BHP), within_BHP], dim=1).double()
        x_BRP = torch.cat([contrasts_BHP, contrasts_BHP], dim=1) * set_BRP
        count_BR1 = set_BRP.sum(-1, keepdim=True)
        square_BRC = set_BRP @ self.square_CP.T
        mean_square_BR1 = square_BRC.mean(-1, keepdim=True)
        gain_BRC = 2 * (x_BRP @ self.offset_CP.T) - square_BRC + mean_square_BR1
        total_BR1 = x_BRP.square().sum(-1, keepdim=True) + mean_square_BR1
        total_BR1 = total_BR1 + _ROUNDING_VARIANCE * count_BR1.clamp(min=1)
        share_BRC = (gain_BRC / total_BR1).clamp(max=_LARGEST_SHARE)
        ratio_BRC = -count_BR1 / 2 * torch.log1p(-share_BRC)
        variance_BH1 = (total_BR1 / count_BR1.clamp(min=1))[:, local:]
        uniform_BH1 = set_BRP[:, local:] @ (2 * self.reach_P).log()[:, None]
        gaussian_BH1 = count_BR1[:, local:] / 2 * (2 * math.pi * math.e * variance_BH1).log()
        nothing_BH1 = count_BR1[:, local:] == 0
        ratio_BRC[:, local:] += (uniform_BH1 - gaussian_BH1).masked_fill(nothing_BH1, -math.inf)
        return ratio_BRC.amax(1)


@torch.no_grad()
def match(view: ChosenUploads) -> Scores:
    """How well each candidate explains what is held of the client; shape (N, C), in nats.

    The best of several contrasts counts: what is held of the client alone, which is the update
    itself where nothing masks it, and its difference to each other upload, in which a mask that
    served twice cancels. A mask that covers some of the parameters is looked past.

    Equal updates tie, and nothing here prefers one of them: whoever counts hits must count a shared
    first place against the attack. Where masks are fresh and uniform, what is held is independent
    of the choice, so whichever candidate comes first is right with probability 1/C.

    Raises:
        ValueError: the view has no trials.
    """
    parts = [
        candidates.log_likelihood(torch.stack(contrasts))
        for candidates, contrasts in _batches(view.trials)
    ]
    if not parts:
        raise ValueError("the view has no trials; there is nothing to match")
    return Scores("matching", torch.cat(parts))


def _batches(trials: Iterable[ChosenUpload]) -> Iterator[tuple[_Candidates, list[Tensor]]]:
    """Successive trials over the same candidates, together."""
    candidates: _Candidates | None = None
    contrasts: list[Tensor] = []
    for trial in trials:
        if candidates is None or not candidates.cover(trial):
            if candidates is not None:
                yield candidates, contrasts
            candidates, contrasts = _Candidates.of(trial), []
        elif len(contrasts) == _AT_ONCE:
            yield candidates, contrasts
            contrasts = []
        contrasts.append(candidates.contrasts(trial))
    if candidates is not None:
        yield candidates, contrasts


matching = Attack("matching", ChosenUploads, match)
