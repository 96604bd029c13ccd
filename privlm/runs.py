"""``privlm train``: a run in a folder, that survives being killed.

After a crash the model goes back to its checkpoint and the ledger does not: steps
that were paid for and lost stay paid for, and the run takes that many fewer.
"""

from __future__ import annotations

import contextlib
import hashlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch

from privlm.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
    save_weights,
)
from privlm.config import ConfigError, TrainConfig
from privlm.data import fingerprint
from privlm.dp.clipping import NonFiniteGradient
from privlm.dp.ledger import Ledger, LedgerError
from privlm.dp.plan import Guarantee, Plan
from privlm.dp.training import examples_of
from privlm.evaluation import NonFinitePrediction, document_bits
from privlm.finetuning import (
    Corpus,
    check_batch_size,
    load_corpus,
    make_plan,
    new_model,
    planned_steps,
    public_base_model,
    public_steps,
    train_plainly,
    train_privately,
)
from privlm.models import TinyDecoder
from privlm.progress import Watch
from privlm.run_folder import RunFolder, RunRecord, open_ledger, opened_folder
from protocols.randomness import Stream

CALIBRATION_SLACK = 1e-3
"""ε of a plan calibrated by another version of the accountant may differ by this share."""


class RunResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a run achieved.

    Attributes:
        guarantee: None if the run was unprotected.
        unit: what one example, the unit of the guarantee, is.
        spent_on_data_set: ε at the guarantee's δ of everything on the ledger, other
            runs included; None if the run was unprotected.
        bits_per_byte: of the trained model on test documents.
        base_bits_per_byte: of the public base model.
        test_documents: how many.
        records: private examples; their number is treated as public.
        public_documents: trained on without protection.
        steps: the plan's; those paid for.
        steps_lost: of these, paid for and undone by an interruption.
        seconds: of the process that finished the run.
    """

    guarantee: Guarantee | None
    unit: Literal["block", "document"]
    spent_on_data_set: float | None
    bits_per_byte: float
    base_bits_per_byte: float
    test_documents: int
    records: int
    public_documents: int
    steps: int
    steps_lost: int
    seconds: float


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after the step in progress was finished and checkpointed."""


def train_run(config: TrainConfig, out: Path, *, resume: bool, watch: Watch) -> RunResult:
    """Train as configured into the folder ``out``.

    Args:
        config: the run.
        out: made if missing; holds a finished or interrupted run only with ``resume``.
        resume: go on where the run in ``out`` stopped; a finished one is reported again.
        watch: where progress is shown.

    Raises:
        ConfigError: ``out`` holds something else than what ``config`` describes.
        DataError, LedgerError, CheckpointError, NonFiniteGradient, NonFinitePrediction,
            OSError: nothing half-written is left, and nothing was released unrecorded.
        KeyboardInterrupt: after Ctrl-C or SIGTERM; :class:`Interrupted` if a
            checkpoint of the last step was written.
    """
    started = time.perf_counter()
    with opened_folder(out, resume=resume, ledger=config.ledger) as folder:
        earlier = folder.read_record(config) if resume else None
        with watch("reading documents", 1):
            corpus = load_corpus(config.corpus, config.tokenizer, seed=config.seed)
        if earlier is None:
            record = _new_record(config, corpus, watch)
        else:
            record = earlier
            _check_record(record, corpus, folder)
        with contextlib.ExitStack() as stack:
            ledger = None
            if record.plan is not None:
                ledger = stack.enter_context(open_ledger(folder, record, resume=resume))
            if not resume:
                folder.write(folder.record, record)
            corpus.tokenizer.save(folder.tokenizer)
            result = _finished(folder)
            if result is None:
                result = _train(config, corpus, record, ledger, folder, watch)
                result = msgspec.structs.replace(result, seconds=time.perf_counter() - started)
            elif ledger is not None and record.plan is not None:
                _check_all_paid(record, record.plan, ledger)
            if ledger is not None and record.plan is not None:
                # Counted anew for a finished run too: others may have spent since.
                with watch("adding up the privacy spent", 1):
                    result = msgspec.structs.replace(
                        result,
                        guarantee=record.plan.guarantee(),
                        spent_on_data_set=ledger.spent(record.plan.delta).value,
                    )
            folder.write(folder.result, result, mode=0o644)
            return result


def _train(
    config: TrainConfig,
    corpus: Corpus,
    record: RunRecord,
    ledger: Ledger | None,
    folder: RunFolder,
    watch: Watch,
) -> RunResult:
    """From wherever the run stands to its weights; privacy and time are for the caller to add."""
    model, optimizer, checkpoint = _standing(config, corpus, record, ledger, folder, watch)
    if ledger is not None and record.plan is not None:
        steps = record.plan.steps
    else:
        steps = planned_steps(len(corpus.blocks.private), config.epochs, config.batch_size)
    what = "private training" if ledger is not None else "training without protection"
    with (
        _diverging(what),
        watch(what, steps) as show,
        _checkpointing(folder.checkpoint, model, optimizer, config, checkpoint, steps) as keep,
    ):

        def after_step(step: int) -> None:
            show(step)
            keep(step)

        show(checkpoint.step)
        if ledger is not None and record.plan is not None:
            train_privately(
                model,
                examples_of(corpus.blocks.private),
                record.plan,
                optimizer,
                ledger,
                run=record.run,
                stream=Stream.fresh("private training"),
                microbatch_size=config.microbatch_size,
                after_step=after_step,
            )
        else:
            train_plainly(
                model,
                examples_of(corpus.blocks.private),
                optimizer,
                steps=range(checkpoint.step, steps),
                batch_size=config.batch_size,
                generator=torch.Generator().manual_seed(config.seed + checkpoint.step),
                after_step=after_step,
            )
    with _diverging("the trained model"):
        utility = document_bits(model, corpus.blocks.test, corpus.tokenizer)
    save_weights(folder.weights, model)
    return RunResult(
        guarantee=None,
        unit=config.corpus.unit,
        spent_on_data_set=None,
        bits_per_byte=utility.bits_per_byte,
        base_bits_per_byte=checkpoint.base_bits_per_byte,
        test_documents=len(utility.bits_D),
        records=len(corpus.blocks.private),
        public_documents=len(corpus.documents.public),
        steps=steps,
        steps_lost=checkpoint.steps_lost,
        seconds=0.0,
    )


def _standing(
    config: TrainConfig,
    corpus: Corpus,
    record: RunRecord,
    ledger: Ledger | None,
    folder: RunFolder,
    watch: Watch,
) -> tuple[TinyDecoder, torch.optim.Optimizer, Checkpoint]:
    """Model and optimiser to go on with, and where that is, losses counted.

    The first checkpoint holds the base model and precedes the first private step.
    """
    paid = 0 if ledger is None else ledger.steps(record.run)
    if paid and not folder.checkpoint.exists():
        raise CheckpointError(
            f"{folder.checkpoint}: missing, though {paid} private steps were taken; restore it "
            "from a backup, or start anew in another --out"
        )
    if folder.checkpoint.exists():
        model = new_model(corpus, config.model, seed=config.seed)
        optimizer = config.optimizer.build(list(model.parameters()))
        checkpoint = load_checkpoint(folder.checkpoint, model, optimizer, run=record.run)
        if ledger is None:
            return model, optimizer, checkpoint
        if checkpoint.step > paid:
            raise LedgerError(
                f"{ledger.path}: {checkpoint.step} private steps were taken and only {paid} are "
                "on record; restore the ledger from a backup"
            )
        lost = checkpoint.steps_lost + paid - checkpoint.step
        return (
            model,
            optimizer,
            msgspec.structs.replace(checkpoint, step=paid, steps_lost=lost),
        )
    with (
        _diverging("public base model"),
        watch("public base model", public_steps(corpus, config.public)) as after_step,
    ):
        model = public_base_model(
            corpus, config.model, config.public, seed=config.seed, after_step=after_step
        )
        base = document_bits(model, corpus.blocks.test, corpus.tokenizer)
    optimizer = config.optimizer.build(list(model.parameters()))
    checkpoint = Checkpoint(run=record.run, step=0, base_bits_per_byte=base.bits_per_byte)
    save_checkpoint(folder.checkpoint, model, optimizer, checkpoint)
    return model, optimizer, checkpoint


@contextmanager
def _checkpointing(
    path: Path,
    model: TinyDecoder,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    start: Checkpoint,
    steps: int,
) -> Iterator[Callable[[int], None]]:
    """Checkpoint every few steps, at the end, and when a signal asks to stop after this step.

    A second signal stops at once; the last checkpoint and the ledger then decide.

    Raises:
        Interrupted: on leaving, if a signal came after the last step.
    """
    asked = False
    interrupted = Interrupted(
        "interrupted after the step in progress, which was saved; add --resume to go on"
    )

    def ask(signum: int, frame: object) -> None:
        nonlocal asked
        asked = True
        _restore(previous)

    def keep(step: int) -> None:
        if asked or step % config.checkpoint_every == 0 or step == steps:
            save_checkpoint(path, model, optimizer, msgspec.structs.replace(start, step=step))
        if asked:
            raise interrupted

    previous = _handle(ask)
    try:
        yield keep
    finally:
        _restore(previous)
    if asked:
        raise interrupted


Handlers = dict[signal.Signals, Any]
"""A signal and what handled it before."""


def _handle(handler: Callable[[int, object], None]) -> Handlers:
    """Catch SIGINT and SIGTERM, unless the process was started to ignore them.

    Signals belong to the main thread: in another one, nothing is caught.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    caught = {n: old for n, old in previous.items() if old not in (signal.SIG_IGN, None)}
    for number in caught:
        signal.signal(number, handler)
    return caught


def _restore(previous: Handlers) -> None:
    for number, handler in previous.items():
        signal.signal(number, handler)


@contextmanager
def _diverging(what: str) -> Iterator[None]:
    """Say what had diverged."""
    try:
        yield
    except NonFiniteGradient as error:
        raise NonFiniteGradient(f"{what}: {error}") from error
    except NonFinitePrediction as error:
        raise NonFinitePrediction(f"{what}: {error}") from error


def _new_record(config: TrainConfig, corpus: Corpus, watch: Watch) -> RunRecord:
    candidates = len(corpus.blocks.private)
    check_batch_size(config.batch_size, candidates)
    plan = None
    if config.privacy is not None:
        with watch("planning the noise", 1):
            plan = make_plan(
                config.privacy,
                candidates=candidates,
                epochs=config.epochs,
                batch_size=config.batch_size,
            )
    dataset, all_records = _fingerprints(corpus)
    return RunRecord(
        run=Stream.fresh("run id").bytes(8).hex(),
        dataset=dataset,
        corpus=all_records,
        config=config,
        plan=plan,
        ledger=str(Path(config.ledger).absolute()) if config.ledger else None,
    )


def _fingerprints(corpus: Corpus) -> tuple[str, str]:
    """Of the private records, which names them in the ledger, and of all records."""
    blocks = corpus.blocks
    parts = [fingerprint(part) for part in (blocks.private, blocks.public, blocks.test)]
    return parts[0], hashlib.sha256("".join(parts).encode()).hexdigest()


def _check_record(record: RunRecord, corpus: Corpus, folder: RunFolder) -> None:
    """Refuse documents that changed, and a plan that the configuration would not have made."""
    dataset, all_records = _fingerprints(corpus)
    if (record.dataset, record.corpus) != (dataset, all_records):
        raise ConfigError(
            f"{folder.record}: the documents changed since the run was started; restore them, "
            "or start anew in another --out"
        )
    config, plan = record.config, record.plan
    if config.privacy is None and plan is None:
        return
    if config.privacy is not None and plan is not None:
        expected = make_plan(
            msgspec.structs.replace(
                config.privacy, target_epsilon=None, noise_multiplier=plan.noise_multiplier
            ),
            candidates=len(corpus.blocks.private),
            epochs=config.epochs,
            batch_size=config.batch_size,
        )
        target = config.privacy.target_epsilon
        if plan == expected and (
            plan.noise_multiplier == config.privacy.noise_multiplier
            if target is None
            else plan.guarantee().epsilon <= target * (1 + CALIBRATION_SLACK)
        ):
            return
    raise ConfigError(
        f"{folder.record}: damaged, because its plan does not follow from its configuration; "
        "restore it from a backup, or start anew in another --out"
    )


def _finished(folder: RunFolder) -> RunResult | None:
    """The result of a run that needs nothing more; a damaged one is made again."""
    if not (folder.result.exists() and folder.weights.exists()):
        return None
    try:
        return folder.read(folder.result, RunResult)
    except ConfigError:
        return None


def _check_all_paid(record: RunRecord, plan: Plan, ledger: Ledger) -> None:
    paid = ledger.steps(record.run)
    if paid < plan.steps:
        raise LedgerError(
            f"{ledger.path}: the run is finished and only {paid} of its {plan.steps} steps are on "
            "record; restore the ledger from a backup"
        )
