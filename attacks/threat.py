"""What is promised, what the adversary sees, and what an attack returns.

No type here holds the ground truth: which records were trained on, which text a client
held, lives in :mod:`attacks.targets` and meets the scores in :mod:`attacks.scoring` alone. (Python
hides nothing: an attack that digs in the closures of its view cheats.)

Shape suffixes: N candidate records or trials, T tokens a record, V vocabulary, C candidates
of one choice, B records or prefixes at once, t tokens of a prefix, D width, K clients,
H uploads that bear on one choice, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from attacks.statistics import Estimate

Logits = Callable[[Tensor], Tensor]
"""ids (B, T) -> logits (B, T, V); position t predicts token t + 1."""

Population = Literal[
    "text",
    "canaries",
    "secrets",
    "gradients",
    "engine",
    "texts",
    "uploads",
    "prompts",
    "requests",
    "canary rows",
]


class Moment(StrEnum):
    """When private data is touched."""

    TRAINING = "training"
    AGGREGATION = "aggregation"
    INFERENCE = "inference"


@dataclass(frozen=True)
class Claim:
    """What a protection promises.

    Attributes:
        adversary: who looks, and what that party sees.
        assumption: what must hold for the guarantee.
        guarantee: in words, with its numbers.
        epsilon: the ε promised at ``delta``; None where no ε is promised.
        delta: the δ of that promise.
        nothing_leaks: the adversary is promised to learn nothing beyond what ``guarantee`` names.
        short: the guarantee in a few words, for a narrow column.
        trade_off: (false positive rate, highest true positive rate) of any test for one record,
            where that is known more exactly than from ε and δ.
    """

    adversary: str
    assumption: str
    guarantee: str
    epsilon: float | None = None
    delta: float | None = None
    nothing_leaks: bool = False
    short: str = ""
    trade_off: tuple[tuple[float, float], ...] = field(default=(), repr=False)

    @property
    def promises(self) -> bool:
        """Whether anything is promised that a measurement could contradict."""
        return self.epsilon is not None or self.nothing_leaks


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
class OpenModel:
    """The model that everybody knows: what an honest client computes from given tokens.

    Attributes:
        vocabulary_C: int64, the token ids that a text may hold.
        layers: how many attention layers there are.
        width: D.
        context: the longest text, in tokens.
        attended_after: ``(layer, prefix_Bt, ids_C) -> (B, C, D)``: what that layer's query, key and
            value projections multiply at the position after each prefix (t may be 0), for every
            candidate token there.
        predict: ``ids_BT -> (hidden_BTD, logits_BTV)``: what the output head multiplies, and its
            product.
        positional: whether rows of layer 0 depend on the position, not on the token alone.
        tied: whether the head shares the embedding's matrix.
    """

    vocabulary_C: Tensor = field(repr=False)
    layers: int
    width: int
    context: int
    attended_after: Callable[[int, Tensor, Tensor], Tensor] = field(repr=False)
    predict: Callable[[Tensor], tuple[Tensor, Tensor]] = field(repr=False)
    positional: bool
    tied: bool


@dataclass(frozen=True, eq=False)
class Gradient:
    """The parts of a gradient (or of anything shaped like one) that the attacks read.

    Attributes:
        values: for each layer, from the first: of the value projection, or of query, key and value
            in one; shape (outputs, D), so that its rows lie in the span of the layer's inputs.
        head_VD: of the output head; with tied embeddings the sum of head and embedding.
        embedding_VD: of the token embedding; with tied embeddings the same tensor as ``head_VD``.
        resolution: the step to which entries are rounded, 0 for plain floats.
    """

    values: tuple[Tensor, ...] = field(repr=False)
    head_VD: Tensor = field(repr=False)
    embedding_VD: Tensor = field(repr=False)
    resolution: float = 0.0


@dataclass(frozen=True, eq=False)
class SeenUpdates:
    """What the adversary of aggregation rounds can put together of every victim's update.

    A victim is a client, or the sum of several where only that is seen.

    Attributes:
        model: known to everybody in the round.
        uploads: over the victims; every pass runs the rounds again, with fresh randomness. Each
            item is int32 or int64 (K, P), wrapping around as the ring does: row 0 is what is held
            of the victim's encoded update, the rows below what is held of others in the round.
        step: the real value of one unit.
        gradient: ``(P,) reals, resolution -> Gradient``: the layout of an update.
    """

    model: OpenModel
    uploads: Iterable[Tensor] = field(repr=False)
    step: float
    gradient: Callable[[Tensor, float], Gradient] = field(repr=False)


@dataclass(frozen=True, eq=False)
class ChosenUpload:
    """One trial: a client uploads one of C updates that the adversary itself put forward.

    Its partner uploads a fixed sum less that one, so the published sum tells nothing of the choice.

    Attributes:
        held_HP: int32 or int64 as the ring: what is held of H encoded uploads. Row 0 is the
            client's, the others depend on the choice in a known way, or not at all.
        weight_H: float64; with c the choice, row h encodes ``weight_H[h] · update_CP[c] +
            known_HP[h]``. Row 0 has weight 1.
        known_HP: float64; row 0 is zero.
        update_CP: float64, the updates to choose from.
        step: the real value of one unit of ``held_HP``.
    """

    held_HP: Tensor = field(repr=False)
    weight_H: Tensor = field(repr=False)
    known_HP: Tensor = field(repr=False)
    update_CP: Tensor = field(repr=False)
    step: float


@dataclass(frozen=True, eq=False)
class ChosenUploads:
    """Trials, one after the other; every pass runs them again, with fresh randomness."""

    trials: Iterable[ChosenUpload] = field(repr=False)


@dataclass(frozen=True, eq=False)
class SentActivations:
    """What the server of a split model received from N requests of T tokens each.

    Attributes:
        rows_NTD: the activations, as they arrived.
        vocabulary_C: int64, the token ids that a prompt may hold.
        sent: ``ids_NT -> (N, T, D)``: what an honest client sends for whole prompts, before any
            noise.
        sent_after: ``(prefix_Bt, ids_C) -> (B, C, D)``: what an honest client sends for the
            position after each prefix, before any noise.
        log_prior: ``prefix_Bt -> (B, C)``: what the model itself expects there, in nats; t may be
            0, where it is uniform.
        noise_std: of the Gaussian noise on every number; 0 without.
    """

    rows_NTD: Tensor = field(repr=False)
    vocabulary_C: Tensor = field(repr=False)
    sent: Callable[[Tensor], Tensor] = field(repr=False)
    sent_after: Callable[[Tensor, Tensor], Tensor] = field(repr=False)
    log_prior: Callable[[Tensor], Tensor] = field(repr=False)
    noise_std: float


@dataclass(frozen=True, eq=False)
class PairedPrompts:
    """Requests of which each was one of two known prompts.

    Attributes:
        sent: what the server received.
        pairs_N2T: int64, the two prompts of each request.
    """

    sent: SentActivations
    pairs_N2T: Tensor = field(repr=False)


@dataclass(frozen=True, eq=False)
class Scores:
    """One number a candidate, higher for "more likely"; shape (N,) or (N, C)."""

    attack: str
    values: Tensor = field(repr=False)


@dataclass(frozen=True, eq=False)
class Recovered:
    """What an attack put together of one victim's text or texts.

    Attributes:
        texts: token ids in order; a set: which text belongs to whom is not known.
        tokens: ids that occur somewhere, whether or not their order was found.
        note: why there is no more, in a few words; empty if there is.
    """

    texts: tuple[tuple[int, ...], ...] = field(repr=False)
    tokens: frozenset[int] = field(repr=False)
    note: str = ""


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """Texts put together by one attack, victim by victim."""

    attack: str
    victims: tuple[Recovered, ...] = field(repr=False)


Seen = TypeVar("Seen")


@dataclass(frozen=True)
class Attack(Generic[Seen]):
    """An attack by name: the kind of view it needs, and the function that makes something of one.

    ``run`` returns :class:`Scores` or a :class:`Reconstruction`; it never receives the truth.
    """

    name: str
    sees: type[Seen]
    run: Callable[[Seen], Scores | Reconstruction] = field(repr=False)


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
        n: trials behind it.
        controls: figures that this one must be read against.
        status: the verdict.
        reason: why, in one sentence.
        lower_bound: of ε at the claim's δ; None where no ε is bounded.
        ceiling: the largest bound that a perfect attack could have shown here.
        chance: what guessing alone reaches in ``estimate``, where that is known.
        further: other estimates of the same attack, by metric.
        broken_bound: the bound on ε that the same attack shows where the protection is broken on
            purpose; None where that was not tried.
    """

    attack: str
    population: Population
    metric: str
    estimate: Estimate
    n: int
    controls: tuple[Control, ...]
    status: Status
    reason: str
    lower_bound: float | None = None
    ceiling: float | None = None
    chance: float | None = None
    further: dict[str, Estimate] = field(default_factory=dict)
    broken_bound: float | None = None


@dataclass(frozen=True)
class Utility:
    """What a protected system is still good for.

    Attributes:
        estimate: lower is better.
        unit: of the estimate, such as "bits per byte".
        baseline: the same figure without the protection, or before training; None if there is none.
    """

    estimate: Estimate
    unit: str
    baseline: float | None = None


@dataclass(frozen=True)
class Cost:
    """Time and traffic of the protected path, for one ``unit`` of work.

    ``sent_bytes`` is None where nothing crosses a wire.
    """

    seconds: float
    sent_bytes: float | None
    unit: str
