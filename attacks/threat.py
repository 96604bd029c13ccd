"""What is promised, what the adversary sees, and what an attack returns.

No type here holds the ground truth: which records were trained on lives in
:mod:`attacks.targets` and meets the scores in :mod:`attacks.scoring` alone.

Shape suffixes: N candidate records, T tokens a record, V vocabulary, C candidate secrets,
B records scored at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from attacks.statistics import Estimate

Logits = Callable[[Tensor], Tensor]
"""ids (B, T) -> logits (B, T, V); position t predicts token t + 1."""

Population = Literal["text", "canaries", "secrets"]


@dataclass(frozen=True)
class Claim:
    """What a protection promises.

    Attributes:
        adversary: who looks, and what that party sees.
        assumption: what must hold for the guarantee.
        guarantee: in words, with its numbers.
        epsilon: the ε promised at ``delta``; None where nothing is promised.
        delta: the δ of that promise.
    """

    adversary: str
    assumption: str
    guarantee: str
    epsilon: float | None = None
    delta: float | None = None


def promised(epsilon: float) -> str:
    """A claimed ε in print: at most three decimals, rounded up so that it still holds."""
    if math.isinf(epsilon):
        return "∞"
    return f"{math.ceil(epsilon * 1000) / 1000:.3f}".rstrip("0").rstrip(".")


class Status(StrEnum):
    """The verdict on one attack against one claim."""

    LEAK = "leak"
    """Beyond the claim, or nothing was claimed."""
    WITHIN_CLAIM = "within claim"
    NO_EVIDENCE = "no evidence"
    NOT_APPLICABLE = "not applicable"
    NOT_EVALUABLE = "not evaluable"


@dataclass(frozen=True)
class TokenStatistics:
    """What one forward pass tells of every record; all membership scores are functions of it.

    Attributes:
        logp_NS: log-probability (nats) of token t + 1 given those before; S = T - 1.
        mean_NS: expectation of the log-probability under the model's own prediction.
        std_NS: its standard deviation there.
        target_NS: bool, true where the token counts.
    """

    logp_NS: Tensor = field(repr=False)
    mean_NS: Tensor = field(repr=False)
    std_NS: Tensor = field(repr=False)
    target_NS: Tensor = field(repr=False)

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        logits: Logits,
        ids_NT: Tensor,
        target_NT: Tensor,
        batch_size: int = 256,
    ) -> TokenStatistics:
        """Evaluate ``logits`` on every record; memory O(batch_size · T · V)."""
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for ids_BT in ids_NT.split(batch_size):
            logp_BSV = F.log_softmax(logits(ids_BT)[:, :-1].float(), dim=-1)
            p_BSV = logp_BSV.exp()
            mean_BS = (p_BSV * logp_BSV).sum(-1)
            variance_BS = (p_BSV * logp_BSV.square()).sum(-1) - mean_BS.square()
            logp_BS = logp_BSV.gather(-1, ids_BT[:, 1:, None]).squeeze(-1)
            parts.append((logp_BS, mean_BS, variance_BS.clamp(min=0).sqrt()))
        logp, mean, std = (torch.cat(part) for part in zip(*parts, strict=True))
        return cls(logp, mean, std, target_NT[:, 1:])

    @property
    def mean_logp_N(self) -> Tensor:
        """Mean log-probability of each record's own target tokens."""
        count_N = self.target_NS.sum(1).clamp(min=1)
        return self.logp_NS.masked_fill(~self.target_NS, 0.0).sum(1) / count_N


@dataclass(frozen=True, eq=False)
class SecretSlots:
    """Prompts, each with candidate secrets of which one was drawn for it; which, is not said.

    Attributes:
        ids_NCT: prompt and candidate as token rows.
        secret_NCT: bool, true at the candidate's tokens.
        space: |R|, the number of secrets that the candidates were sampled from.
    """

    ids_NCT: Tensor = field(repr=False)
    secret_NCT: Tensor = field(repr=False)
    space: int


@dataclass(frozen=True, eq=False)
class Evaluated:
    """A model and the candidates it is asked about; every answer is computed once.

    Attributes:
        logits: may be evaluated at will.
        ids_NT: the candidate records, trained on or not.
        target_NT: bool, true at tokens that training counted.
        secrets: the canaries whose secret is to be guessed, if any were planted.
    """

    logits: Logits = field(repr=False)
    ids_NT: Tensor = field(repr=False)
    target_NT: Tensor = field(repr=False)
    secrets: SecretSlots | None = field(default=None, repr=False)

    @cached_property
    def statistics(self) -> TokenStatistics:
        """Of the candidate records; one pass, shared by all attacks."""
        return TokenStatistics.of(self.logits, self.ids_NT, self.target_NT)

    @cached_property
    def secret_logp_NC(self) -> Tensor:
        """Log-probability (nats) of every candidate secret after its prompt.

        Raises:
            ValueError: no secrets were planted.
        """
        if self.secrets is None:
            raise ValueError("no secret canaries were planted; there is nothing to guess")
        return torch.stack(
            [
                _log_likelihood(self.logits, ids_CT, secret_CT)
                for ids_CT, secret_CT in zip(
                    self.secrets.ids_NCT, self.secrets.secret_NCT, strict=True
                )
            ]
        )


@torch.no_grad()
def _log_likelihood(logits: Logits, ids_CT: Tensor, secret_CT: Tensor) -> Tensor:
    """Of the marked tokens of each row; nothing beyond the last of them is computed."""
    marked_T = secret_CT.any(0).nonzero().flatten()
    first, last = int(marked_T[0]), int(marked_T[-1])
    ids_CT, secret_CT = ids_CT[:, : last + 1], secret_CT[:, first : last + 1]
    logp_CSV = F.log_softmax(logits(ids_CT)[:, first - 1 : last].float(), dim=-1)
    logp_CS = logp_CSV.gather(-1, ids_CT[:, first:, None]).squeeze(-1)
    return logp_CS.masked_fill(~secret_CT, 0.0).sum(1)


@dataclass(frozen=True, eq=False)
class ReleasedModel:
    """The view of whoever holds the released model, knows the candidates and a public reference.

    Attributes:
        released: the model under attack.
        reference: a model of the same shape trained on public text alone.
    """

    released: Evaluated = field(repr=False)
    reference: Evaluated = field(repr=False)


@dataclass(frozen=True, eq=False)
class Scores:
    """One number a candidate, higher for "more likely"; shape (N,) or (N, C)."""

    attack: str
    values: Tensor = field(repr=False)


@dataclass(frozen=True)
class Control:
    """A figure that the attack's figure must be read against."""

    name: str
    value: float
    low: float
    high: float
    p_value: float | None = None


@dataclass(frozen=True)
class Finding:
    """One attack on one protection, measured.

    Attributes:
        attack: its name.
        population: what was attacked.
        metric: what ``estimate`` is, with its unit.
        estimate: with a simultaneous interval.
        n: independent trials behind it.
        ceiling: the largest bound that a perfect attack could have shown here.
        lower_bound: what is contested with the claim, in the claim's unit.
        controls: the blind baseline and the label permutation.
        status: the verdict.
        reason: why, in one sentence.
        further: other estimates of the same attack, by metric.
    """

    attack: str
    population: Population
    metric: str
    estimate: Estimate
    n: int
    lower_bound: float
    ceiling: float
    controls: tuple[Control, ...]
    status: Status
    reason: str
    further: dict[str, Estimate] = field(default_factory=dict)
