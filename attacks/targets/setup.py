"""The public description of a suite, and the scene made from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from attacks.targets.aggregation import AggregationSetup
from attacks.targets.canaries import level
from attacks.targets.frame import Draft, Protection, Scene, naming
from attacks.targets.inference import InferenceSetup
from attacks.targets.training import TrainingSetup, draw
from attacks.threat import Moment
from privlm.config import CorpusConfig, ModelConfig, PublicTraining, TokenizerConfig
from privlm.evaluation import document_bits
from privlm.finetuning import load_corpus, public_base_model, public_steps
from privlm.progress import Watch
from protocols.randomness import Stream


class Setup(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What every protection of a suite shares: text, base model, and one part a moment."""

    corpus: CorpusConfig = CorpusConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    public: PublicTraining = PublicTraining()
    training: TrainingSetup = TrainingSetup()
    aggregation: AggregationSetup = AggregationSetup()
    inference: InferenceSetup = InferenceSetup()


def prepare(
    setup: Setup,
    protections: Sequence[Protection],
    *,
    seed: int,
    stream: Stream,
    ledger_dir: Path,
    watch: Watch,
) -> Scene:
    """Load the corpus, toss the coins, train the public base model.

    Args:
        setup: the public description.
        protections: those to come; what cannot be is refused before anything is trained.
        seed: initialisation and public order; no secret.
        stream: membership, secrets and their hiding places.
        ledger_dir: where releases are recorded.
        watch: where progress is shown.

    Raises:
        DataError: the corpus cannot be used, or the canaries do not fit.
        ValueError: a budget that no noise reaches, or a batch larger than the data.
    """
    trains = any(protection.moment is Moment.TRAINING for protection in protections)
    reserved = setup.training.canaries.new_token if trains else 0
    corpus = load_corpus(setup.corpus, setup.tokenizer, seed=seed, reserved_tokens=reserved)
    drawn = (
        draw(corpus, setup.corpus, setup.training, seed=seed, stream=stream.child("training"))
        if trains
        else None
    )
    draft = Draft(setup, corpus, 0 if drawn is None else drawn.population, watch)
    for protection in protections:
        with naming(protection.name):
            protection.check(draft)
    with watch("public base model", public_steps(corpus, setup.public)) as after_step:
        base = public_base_model(
            corpus, setup.model, setup.public, seed=seed, after_step=after_step
        ).eval()
    if drawn is not None:
        level(base, corpus)
    return Scene(
        setup=setup,
        seed=seed,
        corpus=corpus,
        base=base,
        base_utility=document_bits(base, corpus.blocks.test, corpus.tokenizer),
        training=None if drawn is None else drawn.with_reference(base),
        ledger_dir=ledger_dir,
        watch=watch,
        stream=stream,
    )
