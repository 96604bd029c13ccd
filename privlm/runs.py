"""``privlm train``: a run in a folder, that survives being killed.

A folder holds

======================  ==========================================================
run.json                configuration, plan, run id, fingerprint of the data; private
ledger.jsonl            every release, written before it was made; private
checkpoint.safetensors  model and optimiser of the last checkpoint; private
tokenizer.json          learned from public text
model.safetensors       the trained weights: what the guarantee is about
result.json             guarantee, utility, cost
======================  ==========================================================

After a crash the model goes back to its checkpoint and the ledger does not: steps
that were paid for and lost stay paid for, and the run takes that many fewer.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch

from privlm.checkpoint import load_checkpoint, save_checkpoint, save_weights
from privlm.config import ConfigError, TrainConfig
from privlm.data import fingerprint
from privlm.dp.ledger import Ledger
from privlm.dp.plan import Guarantee, Plan
from privlm.dp.training import examples_of
from privlm.evaluation import document_bits
from privlm.finetuning import (
    Corpus,
    load_corpus,
    make_plan,
    public_base_model,
    public_steps,
    train_plainly,
    train_privately,
)
from privlm.models import TinyDecoder
from privlm.progress import Watch
from protocols.files import write_atomically
from protocols.randomness import Stream


class RunRecord(msgspec.Struct, frozen=True):
    """What a run is, fixed when its folder is made."""

    run: str
    dataset: str
    config: TrainConfig
    plan: Plan | None


class RunResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a run achieved. ``steps_lost`` were paid for and undone by an interruption."""

    guarantee: Guarantee | None
    spent_on_data_set: float | None
    bits_per_byte: float
    base_bits_per_byte: float
    test_documents: int
    records: int
    steps: int
    steps_lost: int
    seconds: float


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after the step in progress was finished and checkpointed."""


def train_run(config: TrainConfig, out: Path, *, resume: bool, watch: Watch) -> RunResult:
    """Train as configured into the folder ``out``.

    Args:
        config: the run.
        out: made if missing; holds a finished or interrupted run only with ``resume``.
        resume: go on where the run in ``out`` stopped.
        watch: where progress is shown.

    Raises:
        ConfigError: ``out`` holds something else than what ``config`` describes.
        DataError, LedgerError, CheckpointError, NonFiniteGradient, OSError: nothing
            half-written is left, and nothing was released unrecorded.
        Interrupted: after Ctrl-C.
    """
    started = time.perf_counter()
    record_path = out / "run.json"
    _check_folder(out, record_path, resume)
    corpus = load_corpus(config.corpus, config.tokenizer, seed=config.seed)
    dataset = fingerprint(corpus.blocks.private)
    plan = _plan(config, len(corpus.blocks.private))
    if resume:
        record = _read_record(record_path, config, dataset)
    else:
        record = RunRecord(Stream.fresh("run id").bytes(8).hex(), dataset, config, plan)
        out.mkdir(parents=True, exist_ok=True)
        corpus.tokenizer.save(out / "tokenizer.json")
        write_atomically(record_path, _json(record))
    base = _base_model(corpus, config, watch)
    base_bits = document_bits(base, corpus.blocks.test, corpus.tokenizer).bits_per_byte
    if record.plan is None:
        steps, spent, lost = _train_plainly(base, corpus, config, out, watch), None, 0
        guarantee = None
    else:
        ledger_path = Path(config.ledger) if config.ledger else out / "ledger.jsonl"
        with Ledger(ledger_path, dataset=dataset) as ledger:
            lost = _train_privately(base, corpus, record, record.plan, ledger, out, watch)
            spent = ledger.spent(record.plan.delta).value
        steps, guarantee = record.plan.steps, record.plan.guarantee()
    utility = document_bits(base, corpus.blocks.test, corpus.tokenizer)
    result = RunResult(
        guarantee=guarantee,
        spent_on_data_set=spent,
        bits_per_byte=utility.bits_per_byte,
        base_bits_per_byte=base_bits,
        test_documents=len(utility.bits_D),
        records=len(corpus.blocks.private),
        steps=steps,
        steps_lost=lost,
        seconds=time.perf_counter() - started,
    )
    save_weights(out / "model.safetensors", base)
    write_atomically(out / "result.json", _json(result), mode=0o644)
    return result


def _train_privately(
    model: TinyDecoder,
    corpus: Corpus,
    record: RunRecord,
    plan: Plan,
    ledger: Ledger,
    out: Path,
    watch: Watch,
) -> int:
    config = record.config
    optimizer = config.optimizer.build(list(model.parameters()))
    checkpoint = out / "checkpoint.safetensors"
    spent = ledger.steps(record.run)
    lost = 0
    if checkpoint.exists():
        lost = spent - load_checkpoint(checkpoint, model, optimizer).step
    elif spent:
        lost = spent
    with (
        watch("private training", plan.steps) as show,
        _checkpointing(checkpoint, model, optimizer, config.checkpoint_every, plan.steps) as keep,
    ):

        def after_step(step: int) -> None:
            show(step)
            keep(step)

        train_privately(
            model,
            examples_of(corpus.blocks.private),
            plan,
            optimizer,
            ledger,
            run=record.run,
            stream=Stream.fresh("private training"),
            microbatch_size=config.microbatch_size,
            after_step=after_step,
        )
    return lost


def _train_plainly(
    model: TinyDecoder, corpus: Corpus, config: TrainConfig, out: Path, watch: Watch
) -> int:
    examples = examples_of(corpus.blocks.private)
    steps = max(1, round(config.epochs * len(examples) / config.batch_size))
    optimizer = config.optimizer.build(list(model.parameters()))
    checkpoint = out / "checkpoint.safetensors"
    done = load_checkpoint(checkpoint, model, optimizer).step if checkpoint.exists() else 0
    with (
        watch("training without protection", steps) as show,
        _checkpointing(checkpoint, model, optimizer, config.checkpoint_every, steps) as keep,
    ):

        def after_step(step: int) -> None:
            show(step)
            keep(step)

        train_plainly(
            model,
            examples,
            optimizer,
            steps=range(done, steps),
            batch_size=config.batch_size,
            generator=torch.Generator().manual_seed(config.seed + done),
            after_step=after_step,
        )
    return steps


@contextmanager
def _checkpointing(
    path: Path, model: TinyDecoder, optimizer: torch.optim.Optimizer, every: int, steps: int
) -> Iterator[Callable[[int], None]]:
    """Checkpoint every few steps, at the end, and when Ctrl-C asks to stop after this step.

    A second Ctrl-C stops at once; the last checkpoint and the ledger then decide.
    """
    asked = False

    def ask(signum: int, frame: object) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, previous)

    def keep(step: int) -> None:
        if asked or step % every == 0 or step == steps:
            save_checkpoint(path, model, optimizer, step)
        if asked:
            raise Interrupted

    previous = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, ask)
    try:
        yield keep
    finally:
        signal.signal(signal.SIGINT, previous)


def _base_model(corpus: Corpus, config: TrainConfig, watch: Watch) -> TinyDecoder:
    with watch("public base model", public_steps(corpus, config.public)) as after_step:
        return public_base_model(
            corpus, config.model, config.public, seed=config.seed, after_step=after_step
        )


def _plan(config: TrainConfig, records: int) -> Plan | None:
    if config.privacy is None:
        return None
    return make_plan(
        config.privacy, candidates=records, epochs=config.epochs, batch_size=config.batch_size
    )


def _check_folder(out: Path, record_path: Path, resume: bool) -> None:
    if resume and not record_path.exists():
        raise ConfigError(f"{out}: there is no run to resume; leave --resume out to start one")
    if not resume and out.exists() and any(out.iterdir()):
        raise ConfigError(
            f"{out}: the folder is not empty; add --resume to go on with the run in it, or "
            "choose another --out"
        )


def _read_record(path: Path, config: TrainConfig, dataset: str) -> RunRecord:
    try:
        record = msgspec.json.decode(path.read_bytes(), type=RunRecord)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    if record.config != config:
        changed = [
            name
            for name in config.__struct_fields__
            if getattr(record.config, name) != getattr(config, name)
        ]
        raise ConfigError(
            f"{path}: the run was started with another configuration (differs in "
            f"{', '.join(changed)}); restore it, or start anew in another --out"
        )
    if record.dataset != dataset:
        raise ConfigError(f"{path}: the documents changed since the run was started")
    return record


def _json(value: msgspec.Struct) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"
