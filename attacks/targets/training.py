"""Training: a released model, whoever holds it, and which records it was trained on.

Shape suffixes: N candidate records, K secret canaries, T tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import msgspec
import numpy as np
import torch

from attacks.statistics import ratio_estimate
from attacks.targets.canaries import CanaryConfig, draw_secrets, hide, token_canaries
from attacks.targets.frame import Details, Draft, Scene, Target, Task, Truth
from attacks.targets.white_box import Planted, check_room, plant_gradients, trade_off_of
from attacks.threat import (
    Claim,
    Cost,
    Evaluated,
    Moment,
    ReleasedModel,
    SecretSlots,
    Utility,
    promised,
)
from attacks.white_box import SeenGradients
from privlm.config import AtLeastOne, CorpusConfig, PrivacyConfig
from privlm.data import DataError, TokenBlocks, concatenate, draw_membership, fingerprint, plant
from privlm.dp.ledger import Ledger
from privlm.dp.plan import Plan
from privlm.dp.training import (
    OptimizerConfig,
    causal_lm_loss,
    examples_of,
    fit,
    private_gradients,
)
from privlm.evaluation import document_bits
from privlm.finetuning import Corpus, clone, make_plan, new_model, train_plainly
from privlm.models import TinyDecoder
from protocols.randomness import Stream

MIN_RECORDS = 100
ADVERSARY = "whoever holds the released model"


class TrainingSetup(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What every protection of training shares."""

    canaries: CanaryConfig = CanaryConfig()
    max_records: Annotated[int, msgspec.Meta(ge=100)] = 2400


@dataclass(frozen=True)
class TrainingExperiment:
    """One drawing of members, canaries and secrets.

    ``candidates`` holds text records first, new-token canaries after them;
    ``members`` is what training sees: those candidates and secret canaries whose
    coin said so.
    """

    candidates: TokenBlocks = field(repr=False)
    members: TokenBlocks = field(repr=False)
    population: int
    slots: SecretSlots | None = field(repr=False)
    truth: Truth = field(repr=False)
    reference: Evaluated | None = field(default=None, repr=False)

    def with_reference(self, base: TinyDecoder) -> TrainingExperiment:
        """The same, with the public model to compare with."""
        reference = Evaluated(base, self.candidates.ids_NT, self.candidates.mask_NT, self.slots)
        return dataclasses.replace(self, reference=reference)


def draw(
    corpus: Corpus, config: CorpusConfig, setup: TrainingSetup, *, seed: int, stream: Stream
) -> TrainingExperiment:
    """Toss every record's coin, and the canaries'.

    Raises:
        DataError: too little text, or the canaries do not fit.
    """
    canaries = setup.canaries
    text = corpus.blocks.private
    if len(text) > setup.max_records:
        kept = np.random.default_rng(seed).permutation(len(text))[: setup.max_records]
        text = text.select(np.sort(kept))
    if len(text) < MIN_RECORDS:
        raise DataError(
            f"{config.source}: an audit needs at least {MIN_RECORDS} private records, this "
            f"corpus gives {len(text)}; add text, shorten corpus.context or raise "
            "corpus.private_share"
        )
    end_id, context = corpus.tokenizer.end_id, config.context
    candidates = concatenate(text, plant(token_canaries(corpus), context, end_id))
    member_N = draw_membership(len(candidates), stream.child("membership"))
    parts = [candidates.select(member_N)]
    slots, secret_member_K, secret_place_K = None, np.zeros(0, bool), np.zeros(0, np.int64)
    if canaries.secrets:
        planted = draw_secrets(corpus, canaries, stream.child("secrets"))
        secret_member_K = draw_membership(len(planted), stream.child("secret membership"))
        slots, secret_place_K = hide(
            planted, canaries.candidates, context, end_id, stream.child("candidates")
        )
        if secret_member_K.any():
            parts.append(plant(planted, context, end_id).select(secret_member_K))
    canary_N = np.arange(len(candidates)) >= len(text)
    return TrainingExperiment(
        candidates=candidates,
        members=concatenate(*parts),
        population=(len(candidates) + canaries.secrets) // 2,
        slots=slots,
        truth=Truth(member_N, canary_N, secret_member_K, secret_place_K),
    )


class NoProtection(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="none"
):
    """Ordinary training: the baseline that shows what the attacks can do."""

    moment: ClassVar[Moment] = Moment.TRAINING
    shows: ClassVar[tuple[type, ...]] = (ReleasedModel,)

    name: str = "no protection"
    epochs: AtLeastOne = 8
    batch_size: AtLeastOne = 64
    optimizer: OptimizerConfig = OptimizerConfig(kind="adamw", learning_rate=3e-3)

    def check(self, draft: Draft) -> None:
        """Anything goes."""

    def run(self, scene: Scene) -> Target:
        """Fine-tune the base model on the members."""
        experiment = _experiment(scene)
        model = clone(scene.base)
        steps = self.epochs * -(-len(experiment.members) // self.batch_size)
        started = time.perf_counter()
        with scene.watch(self.name, steps) as after_step:
            train_plainly(
                model,
                examples_of(experiment.members),
                self.optimizer.build(list(model.parameters())),
                steps=range(steps),
                batch_size=self.batch_size,
                generator=torch.Generator().manual_seed(scene.seed),
                after_step=after_step,
            )
        seconds = time.perf_counter() - started
        claim = Claim(ADVERSARY, assumption="none", guarantee="nothing is claimed")
        return _released(scene, experiment, model, claim, seconds, {"steps": steps})


class DpSgd(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="dp-sgd"):
    """DP-SGD under a budget, as ``privlm train`` runs it, with gradient canaries in its data."""

    moment: ClassVar[Moment] = Moment.TRAINING
    shows: ClassVar[tuple[type, ...]] = (ReleasedModel, SeenGradients)

    name: str
    privacy: PrivacyConfig
    epochs: Annotated[float, msgspec.Meta(gt=0, le=1e6)] = 12.0
    batch_size: AtLeastOne = 256
    microbatch_size: AtLeastOne = 64
    optimizer: OptimizerConfig = OptimizerConfig(kind="sgd", learning_rate=0.5)

    def check(self, draft: Draft) -> None:
        """Refuse too many canaries, a batch larger than the data, a budget out of reach."""
        model = new_model(draft.corpus, draft.setup.model, seed=0)
        check_room(model, draft.setup.training.canaries.gradients)
        with draft.watch(f"planning {self.name}", 1):
            _plan(self, draft.population)

    def run(self, scene: Scene) -> Target:
        """Fine-tune the base model on the members under the plan; releases go on the ledger."""
        experiment = _experiment(scene)
        model = clone(scene.base)
        plan = _plan(self, experiment.population)
        guarantee = plan.guarantee()
        dataset = fingerprint(experiment.candidates)
        planted = plant_gradients(
            model,
            scene.setup.training.canaries.gradients,
            plan,
            seed=scene.seed,
            stream=scene.stream.child(f"{self.name}: gradient canaries"),
        )
        started = time.perf_counter()
        with (
            scene.watch(self.name, plan.steps) as after_step,
            Ledger(scene.ledger_dir / f"{dataset[:16]}.jsonl", dataset=dataset) as ledger,
            private_gradients(
                model,
                causal_lm_loss,
                examples_of(experiment.members),
                plan,
                ledger,
                run=f"{self.name}, {Stream.fresh('run id').bytes(8).hex()}",
                stream=Stream.fresh("audited training"),
                microbatch_size=self.microbatch_size,
                canaries=planted.canaries,
            ) as gradients,
        ):
            optimizer = self.optimizer.build(list(model.parameters()))
            fit(model, gradients, optimizer, range(plan.steps), after_step)
        seconds = time.perf_counter() - started
        corpus = scene.setup.corpus
        unit = "document" if corpus.unit == "document" else f"block of {corpus.context} tokens"
        claim = Claim(
            adversary=(
                f"{ADVERSARY}, or sees every noised gradient on the way, and knows every record "
                "but one"
            ),
            assumption=(
                "Poisson-sampled batches; sampling and noise stay secret; hyper-parameters were "
                "chosen without the private data"
            ),
            guarantee=(
                f"({promised(guarantee.epsilon)}, {guarantee.delta:g})-DP for adding or removing "
                f"one {unit}, by {guarantee.accountant}"
            ),
            epsilon=guarantee.epsilon,
            delta=guarantee.delta,
            trade_off=trade_off_of(plan),
        )
        details: Details = {
            "steps": plan.steps,
            "noise_multiplier": plan.noise_multiplier,
            "sampling_probability": planted.sampling_probability,
            "expected_batch_size": plan.expected_batch_size,
            "max_grad_norm": plan.max_grad_norm,
            "accountant": guarantee.accountant,
        }
        return _released(scene, experiment, model, claim, seconds, details, planted)


@functools.cache
def _plan(protection: DpSgd, population: int) -> Plan:
    return make_plan(
        protection.privacy,
        candidates=population,
        epochs=protection.epochs,
        batch_size=protection.batch_size,
    )


def _experiment(scene: Scene) -> TrainingExperiment:
    assert scene.training is not None  # prepare draws one for every protection of training
    return scene.training


def _released(
    scene: Scene,
    experiment: TrainingExperiment,
    model: TinyDecoder,
    claim: Claim,
    seconds: float,
    details: Details,
    planted: Planted | None = None,
) -> Target:
    assert experiment.reference is not None
    released = dataclasses.replace(experiment.reference, logits=model.eval())
    bits = document_bits(model, scene.corpus.blocks.test, scene.corpus.tokenizer)
    membership = Task("text", ReleasedModel(released, experiment.reference), experiment.truth)
    return Target(
        claim=claim,
        tasks=(membership,) if planted is None else (membership, planted.task()),
        utility=Utility(
            ratio_estimate(bits.bits_D, bits.bytes_D),
            "bits per byte",
            scene.base_utility.bits_per_byte,
        ),
        cost=Cost(seconds, None, "run"),
        details=details,
        trace=None if planted is None else planted.trace(),
    )
