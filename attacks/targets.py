"""Runs the protected system and hands over the adversary's view: the only room that reaches down.

Everything here drives the production path of the floors below; nothing is
simulated. What the adversary sees goes into a view of :mod:`attacks.threat`;
what only the experimenter knows goes into :class:`Truth`, which is for
:mod:`attacks.scoring` alone.

Shape suffixes: N candidate records, K secret canaries, C candidate secrets, T tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from attacks.threat import Claim, Evaluated, ReleasedModel, SecretSlots, promised
from privlm.config import (
    AtLeastOne,
    ConfigError,
    CorpusConfig,
    ModelConfig,
    NotNegative,
    PrivacyConfig,
    PublicTraining,
    TokenizerConfig,
    decode_config,
    load_config,
)
from privlm.data import (
    Canary,
    DataError,
    TokenBlocks,
    concatenate,
    draw_membership,
    fingerprint,
    plant,
    secret_canaries,
)
from privlm.dp.ledger import Ledger
from privlm.dp.plan import Plan
from privlm.dp.training import OptimizerConfig, examples_of
from privlm.evaluation import DocumentBits, document_bits
from privlm.finetuning import (
    Corpus,
    clone,
    load_corpus,
    make_plan,
    public_base_model,
    public_steps,
    train_plainly,
    train_privately,
)
from privlm.models import TinyDecoder
from privlm.progress import Watch, watching
from protocols.randomness import Stream

__all__ = [
    "CanaryConfig",
    "ConfigError",
    "DataError",
    "DpSgd",
    "Experiment",
    "NoProtection",
    "Protection",
    "TrainedTarget",
    "TrainingSetup",
    "Truth",
    "Watch",
    "decode_config",
    "fresh_stream",
    "load_config",
    "prepare",
    "secret_key",
    "train_target",
    "watching",
]

DIGITS = "0123456789"
MIN_RECORDS = 100


class CanaryConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Records made to be memorised, each planted or not by its own coin.

    ``new_token`` canaries are documents of one token that nothing else uses: the
    strongest signal for the bound on ε that a document can carry. ``secrets`` are
    ``secret_digits`` random digits after ``prompt_tokens`` of public text; the
    attack picks one of ``candidates``.
    """

    new_token: Annotated[int, msgspec.Meta(ge=100)] = 1000
    secrets: NotNegative = 100
    secret_digits: AtLeastOne = 6
    prompt_tokens: AtLeastOne = 12
    candidates: Annotated[int, msgspec.Meta(ge=2)] = 256


class TrainingSetup(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What every protection of a suite shares: data, base model, canaries."""

    corpus: CorpusConfig = CorpusConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    public: PublicTraining = PublicTraining()
    canaries: CanaryConfig = CanaryConfig()
    max_records: Annotated[int, msgspec.Meta(ge=100)] = 2400


class NoProtection(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="none"
):
    """Ordinary training: the baseline that shows what the attacks can do."""

    name: str = "no protection"
    epochs: AtLeastOne = 8
    batch_size: AtLeastOne = 64
    optimizer: OptimizerConfig = OptimizerConfig(kind="adamw", learning_rate=3e-3)


class DpSgd(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="dp-sgd"):
    """DP-SGD under a budget, exactly as ``privlm train`` runs it."""

    name: str
    privacy: PrivacyConfig
    epochs: Annotated[float, msgspec.Meta(gt=0, le=1e6)] = 12.0
    batch_size: AtLeastOne = 256
    microbatch_size: AtLeastOne = 64
    optimizer: OptimizerConfig = OptimizerConfig(kind="sgd", learning_rate=0.5)


Protection = NoProtection | DpSgd


@dataclass(frozen=True)
class Truth:
    """What the adversary wants to know.

    Attributes:
        member_N: which candidate records were trained on.
        secret_member_K: which secret canaries were.
        secret_place_K: where each canary's own secret stands among its candidates.
    """

    member_N: npt.NDArray[np.bool_] = field(repr=False)
    secret_member_K: npt.NDArray[np.bool_] = field(repr=False)
    secret_place_K: npt.NDArray[np.int64] = field(repr=False)


@dataclass(frozen=True)
class Experiment:
    """One drawing of members, canaries and secrets, and the public base model.

    ``candidates`` holds text records first, new-token canaries after them;
    ``members`` is what training sees: those candidates and secret canaries whose
    coin said so.
    """

    setup: TrainingSetup
    seed: int
    corpus: Corpus = field(repr=False)
    candidates: TokenBlocks = field(repr=False)
    canary_N: npt.NDArray[np.bool_] = field(repr=False)
    members: TokenBlocks = field(repr=False)
    population: int
    base: TinyDecoder = field(repr=False)
    reference: Evaluated = field(repr=False)
    base_utility: DocumentBits = field(repr=False)
    truth: Truth = field(repr=False)


@dataclass(frozen=True)
class TrainedTarget:
    """A model that a protection released, with what it promises and what it cost."""

    claim: Claim
    view: ReleasedModel = field(repr=False)
    utility: DocumentBits = field(repr=False)
    seconds: float
    details: dict[str, float | int | str]


def prepare(
    setup: TrainingSetup,
    *,
    seed: int,
    stream: Stream,
    watch: Watch,
    protections: Sequence[Protection] = (),
) -> Experiment:
    """Load the corpus, toss the coins, train the public base model.

    Args:
        setup: the public description.
        seed: initialisation and public order; no secret.
        stream: membership, secrets and their hiding places.
        watch: where progress is shown.
        protections: those to come; a plan that cannot be is refused before any training.

    Raises:
        DataError: the corpus cannot be used, or the canaries do not fit.
        ValueError: a budget that no noise reaches, or a batch larger than the data.
    """
    canaries = setup.canaries
    corpus = load_corpus(
        setup.corpus, setup.tokenizer, seed=seed, reserved_tokens=canaries.new_token
    )
    text = corpus.blocks.private
    if len(text) > setup.max_records:
        kept = np.random.default_rng(seed).permutation(len(text))[: setup.max_records]
        text = text.select(np.sort(kept))
    if len(text) < MIN_RECORDS:
        raise DataError(
            f"{setup.corpus.source}: an audit needs at least {MIN_RECORDS} private records, this "
            f"corpus gives {len(text)}; add text, shorten corpus.context or raise "
            "corpus.private_share"
        )
    end_id, context = corpus.tokenizer.end_id, setup.corpus.context
    tokens = plant(_token_canaries(corpus), context, end_id)
    candidates = concatenate(text, tokens)
    member_N = draw_membership(len(candidates), stream.child("membership"))
    parts = [candidates.select(member_N)]
    slots, secret_member_K, secret_place_K = None, np.zeros(0, bool), np.zeros(0, np.int64)
    if canaries.secrets:
        planted = _secret_canaries(corpus, setup, stream.child("secrets"))
        secret_member_K = draw_membership(len(planted), stream.child("secret membership"))
        slots, secret_place_K = _hide(planted, setup, end_id, stream.child("candidates"))
        if secret_member_K.any():
            rows = plant(planted, context, end_id)
            parts.append(rows.select(secret_member_K))
    population = (len(candidates) + canaries.secrets) // 2
    for protection in protections:
        if isinstance(protection, DpSgd):
            with _naming(protection.name), watch(f"planning {protection.name}", 1):
                _plan(protection, population)
    with watch("public base model", public_steps(corpus, setup.public)) as after_step:
        base = public_base_model(
            corpus, setup.model, setup.public, seed=seed, after_step=after_step
        )
    _level(base, corpus)
    return Experiment(
        setup=setup,
        seed=seed,
        corpus=corpus,
        candidates=candidates,
        canary_N=np.arange(len(candidates)) >= len(text),
        members=concatenate(*parts),
        population=population,
        base=base,
        reference=Evaluated(
            base.eval(),
            candidates.ids_NT,
            candidates.mask_NT,
            slots,
        ),
        base_utility=document_bits(base, corpus.blocks.test, corpus.tokenizer),
        truth=Truth(member_N, secret_member_K, secret_place_K),
    )


def train_target(
    experiment: Experiment, protection: Protection, *, ledger_dir: Path, watch: Watch
) -> TrainedTarget:
    """Fine-tune the base model on the members under ``protection``, and measure its utility.

    Args:
        experiment: data and coins; the same for every protection.
        protection: how to train.
        ledger_dir: where the releases are recorded, one file a data set.
        watch: where progress is shown.

    Raises:
        ValueError: a plan that cannot be, or gradients that are not finite.
    """
    model = clone(experiment.base)
    if isinstance(protection, DpSgd):
        claim, details, seconds = _dp_sgd(model, experiment, protection, ledger_dir, watch)
    else:
        claim, details, seconds = _plain(model, experiment, protection, watch)
    model.eval()
    view = ReleasedModel(
        dataclasses.replace(experiment.reference, logits=model), experiment.reference
    )
    utility = document_bits(model, experiment.corpus.blocks.test, experiment.corpus.tokenizer)
    return TrainedTarget(claim, view, utility, seconds, details)


def fresh_stream(label: str) -> Stream:
    """Fresh secret randomness."""
    return Stream.fresh(label)


def secret_key(label: str) -> bytes:
    """A fresh 256-bit key."""
    return Stream.fresh(label).bytes(32)


def _plain(
    model: TinyDecoder, experiment: Experiment, protection: NoProtection, watch: Watch
) -> tuple[Claim, dict[str, float | int | str], float]:
    steps = protection.epochs * -(-len(experiment.members) // protection.batch_size)
    started = time.perf_counter()
    with watch(protection.name, steps) as after_step:
        train_plainly(
            model,
            examples_of(experiment.members),
            protection.optimizer.build(list(model.parameters())),
            steps=range(steps),
            batch_size=protection.batch_size,
            generator=torch.Generator().manual_seed(experiment.seed),
            after_step=after_step,
        )
    claim = Claim(
        adversary="whoever holds the released model",
        assumption="none",
        guarantee="nothing is claimed",
    )
    return claim, {"steps": steps}, time.perf_counter() - started


@functools.cache
def _plan(protection: DpSgd, population: int) -> Plan:
    return make_plan(
        protection.privacy,
        candidates=population,
        epochs=protection.epochs,
        batch_size=protection.batch_size,
    )


@contextlib.contextmanager
def _naming(protection: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"protections: {protection}: {error}") from error


def _dp_sgd(
    model: TinyDecoder,
    experiment: Experiment,
    protection: DpSgd,
    ledger_dir: Path,
    watch: Watch,
) -> tuple[Claim, dict[str, float | int | str], float]:
    plan = _plan(protection, experiment.population)
    guarantee = plan.guarantee()
    optimizer = protection.optimizer.build(list(model.parameters()))
    dataset = fingerprint(experiment.candidates)
    started = time.perf_counter()
    with (
        watch(protection.name, plan.steps) as after_step,
        Ledger(ledger_dir / f"{dataset[:16]}.jsonl", dataset=dataset) as ledger,
    ):
        train_privately(
            model,
            examples_of(experiment.members),
            plan,
            optimizer,
            ledger,
            run=f"{protection.name}, {Stream.fresh('run id').bytes(8).hex()}",
            stream=Stream.fresh("audited training"),
            microbatch_size=protection.microbatch_size,
            after_step=after_step,
        )
    seconds = time.perf_counter() - started
    unit = (
        "document"
        if experiment.setup.corpus.unit == "document"
        else (f"block of {experiment.setup.corpus.context} tokens")
    )
    claim = Claim(
        adversary="whoever holds the released model and knows every record but one",
        assumption=(
            "Poisson-sampled batches; sampling and noise stay secret; hyper-parameters were "
            "chosen without the private data"
        ),
        guarantee=(
            f"({promised(guarantee.epsilon)}, {guarantee.delta:g})-DP for adding or removing one "
            f"{unit}, by {guarantee.accountant}"
        ),
        epsilon=guarantee.epsilon,
        delta=guarantee.delta,
    )
    return (
        claim,
        {
            "steps": plan.steps,
            "noise_multiplier": plan.noise_multiplier,
            "sampling_probability": plan.sampler.sampling_probability,
            "expected_batch_size": plan.expected_batch_size,
            "max_grad_norm": plan.max_grad_norm,
            "accountant": guarantee.accountant,
        },
        seconds,
    )


def _token_canaries(corpus: Corpus) -> list[Canary]:
    """One document a reserved token, which holds nothing but that token."""
    end_id = corpus.tokenizer.end_id
    return [
        Canary(f"token-canary-{n}", (end_id,), (token,))
        for n, token in enumerate(corpus.tokenizer.reserved_ids)
    ]


@torch.no_grad()
def _level(model: TinyDecoder, corpus: Corpus) -> None:
    """Teach the public model that canary tokens stand at a document's start and nowhere else.

    All of them get one output row, by least squares on the hidden states of public
    text: about 99% of the probability where a document starts, about 1% of it
    elsewhere, so that text hardly notices them. Where they are expected and alike,
    the gradient that one of them sends back into the model, Σ p_v w_v − w_u,
    vanishes: nearly all of its clipped norm lies in its own output row, which no
    other record raises. That is as close to a Dirac gradient (Nasr et al. 2023) as
    a document can come; the private training is not touched.
    """
    end_id, canary_tokens = corpus.tokenizer.end_id, corpus.tokenizer.reserved_ids
    starts_BT = torch.full((1, 1), end_id)
    hidden_MD = torch.cat(
        [
            model.norm(model.run_blocks(model.embed_inputs(ids))).flatten(0, 1)
            for ids in (corpus.blocks.public.ids_NT[:256], starts_BT)
        ]
    )
    words = model.head.weight[: canary_tokens.start]
    others_M = (hidden_MD @ words.T).logsumexp(1) - math.log(len(canary_tokens))
    is_start_M = torch.arange(len(hidden_MD)) == len(hidden_MD) - 1
    wanted_M = torch.where(is_start_M, others_M + math.log(99), others_M - math.log(99))
    weight_M = torch.where(is_start_M, float(len(hidden_MD)), 1.0).sqrt()
    solved = torch.linalg.lstsq(weight_M[:, None] * hidden_MD, (weight_M * wanted_M)[:, None])
    rows = model.head.weight[canary_tokens.start : canary_tokens.stop]
    rows.copy_(solved.solution.T.expand_as(rows))


def _secret_canaries(corpus: Corpus, setup: TrainingSetup, stream: Stream) -> tuple[Canary, ...]:
    """Secrets behind the opening tokens of public records."""
    config = setup.canaries
    prompts = list(
        dict.fromkeys(
            tuple(row[: config.prompt_tokens].tolist())
            for row, length in zip(
                corpus.blocks.public.ids_NT, corpus.blocks.public.length_N, strict=True
            )
            if length >= config.prompt_tokens
        )
    )
    if len(prompts) < config.secrets:
        raise DataError(
            f"canaries.secrets: {config.secrets} prompts of {config.prompt_tokens} tokens are "
            f"needed, the public documents offer {len(prompts)}; plant fewer secrets or raise "
            "corpus.public_share"
        )
    digits = [corpus.tokenizer.encode(digit)[0] for digit in DIGITS]
    return secret_canaries(prompts[: config.secrets], digits, config.secret_digits, stream)


def _hide(
    canaries: tuple[Canary, ...], setup: TrainingSetup, end_id: int, stream: Stream
) -> tuple[SecretSlots, npt.NDArray[np.int64]]:
    """Each canary's secret among random alternatives, at a random place."""
    count, context = setup.canaries.candidates, setup.corpus.context
    place_K = stream.integers(count, len(canaries)).astype(np.int64)
    ids, targets = [], []
    for canary, place in zip(canaries, place_K.tolist(), strict=True):
        others = canary.candidates(count - 1, stream)
        lineup = np.insert(others, place, np.array(canary.secret_ids), axis=0)
        rows = plant(
            [
                Canary(str(c), canary.prompt_ids, tuple(secret), canary.alphabet_ids)
                for c, secret in enumerate(lineup.tolist())
            ],
            context,
            end_id,
            loss_on="secret",
        )
        ids.append(rows.ids_NT)
        targets.append(rows.mask_NT)
    return SecretSlots(torch.stack(ids), torch.stack(targets), canaries[0].space), place_K
