"""``privlm train``: a run in a folder, that survives being killed.

After a crash the model goes back to its checkpoint and the ledger does not. Where noise and
batches are drawn afresh, steps that were paid for and lost stay paid for, and the run takes that
many fewer. Where the plan needs one seed throughout, it is sealed in the folder, and lost steps
are made again bitwise as they were.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec
import torch
from torch import nn

from privlm.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
    save_weights,
)
from privlm.config import ConfigError, TrainConfig
from privlm.dp.accounting import rounded_up
from privlm.dp.clipping import NonFiniteGradient
from privlm.dp.history import LedgerError
from privlm.dp.ledger import BudgetExceeded, Ledger
from privlm.dp.plan import Guarantee, Plan
from privlm.dp.training import fit, private_gradients
from privlm.evaluation import NonFinitePrediction, example_bits
from privlm.finetuning import steps_of, train_plainly
from privlm.interruption import Interrupted, checkpointing, is_due
from privlm.materials import Materials, adapted, prepare, records_of, trained_parameters
from privlm.models import loss_for
from privlm.models.pretrained import FolderTokenizer
from privlm.planning import check_record, new_record
from privlm.privacy import needs_one_seed, planned_steps
from privlm.progress import Show, Watch
from privlm.run_folder import RunFolder, RunRecord, open_ledger, opened_folder, stream_of
from privlm.steps import Meter, StepLog

__all__ = ["Interrupted", "RunResult", "train_run"]


class RunResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a run achieved.

    Attributes:
        guarantee: None if the run was unprotected.
        unit: what one example is; of images or sounds, a ``record``.
        spent_on_data_set: ε at the guarantee's δ of everything on the ledger, other
            runs included; None if the run was unprotected.
        bits_per_byte: of the trained model on test documents.
        base_bits_per_byte: of the public base model.
        test_documents: how many.
        records: private examples; their number is treated as public.
        public_documents: trained on without protection.
        steps: taken and paid for; the plan's, unless the budget ended the run before.
        steps_lost: of these, paid for and undone by an interruption.
        seconds: of the process that finished the run.
        planned_steps: the plan's.
    """

    guarantee: Guarantee | None
    unit: Literal["block", "document", "record"]
    spent_on_data_set: float | None
    bits_per_byte: float
    base_bits_per_byte: float
    test_documents: int
    records: int
    public_documents: int
    steps: int
    steps_lost: int
    seconds: float
    planned_steps: int


def train_run(config: TrainConfig, out: Path, *, resume: bool, watch: Watch) -> RunResult:
    """Train as configured into the folder ``out``.

    Args:
        config: the run.
        out: made if missing; holds a finished or interrupted run only with ``resume``.
        resume: go on where the run in ``out`` stopped; a finished one is reported again.
        watch: where progress is shown.

    Raises:
        ConfigError: ``out`` holds something else than what ``config`` describes.
        DataError, ModelError, LedgerError, CheckpointError, NonFiniteGradient,
            NonFinitePrediction, ReplayDiffers, OSError: nothing half-written is left, and nothing
            was released unrecorded.
        KeyboardInterrupt: after Ctrl-C or SIGTERM; :class:`Interrupted` if a
            checkpoint of the last step was written.
    """
    started = time.perf_counter()
    with opened_folder(out, resume=resume, ledger=config.ledger) as folder:
        earlier = folder.read_record(config) if resume else None
        with watch("reading documents", 1):
            materials = prepare(config)
        if earlier is None:
            record = new_record(config, materials, watch)
        else:
            record = earlier
            check_record(record, materials, folder)
        with contextlib.ExitStack() as stack:
            ledger = None
            if record.plan is not None:
                ledger = stack.enter_context(
                    open_ledger(folder, record, resume=resume, spend=config.budget)
                )
            if not resume:
                folder.write(folder.record, record)
            if not isinstance(materials.tokenizer, FolderTokenizer):
                materials.tokenizer.save(folder.tokenizer)
            result = _finished(folder)
            if result is None:
                result = _train(config, materials, record, ledger, folder, watch)
                result = msgspec.structs.replace(result, seconds=time.perf_counter() - started)
            elif ledger is not None:
                _check_all_paid(record, result.steps, ledger)
            if ledger is not None and record.plan is not None:
                # Counted anew for a finished run too: others may have spent since.
                with watch("adding up the privacy spent", 1):
                    result = msgspec.structs.replace(
                        result,
                        guarantee=record.plan.guarantee(),
                        spent_on_data_set=ledger.spent(record.plan.delta).value,
                    )
            folder.write(folder.result, result, mode=0o644)
            # No step will be made again: without its seed, nobody can take the noise off.
            folder.key.unlink(missing_ok=True)
            return result


def _train(
    config: TrainConfig,
    materials: Materials,
    record: RunRecord,
    ledger: Ledger | None,
    folder: RunFolder,
    watch: Watch,
) -> RunResult:
    """From wherever the run stands to its weights; privacy and time are for the caller to add."""
    model, optimizer, checkpoint = _standing(config, materials, record, ledger, folder, watch)
    private = materials.private
    if record.plan is not None:
        steps = record.plan.steps
    else:
        steps = planned_steps(len(private), config.epochs, config.batch_size)
    what = "private training" if ledger is not None else "training without protection"

    with _diverging(what), watch(what, steps) as show:
        show(checkpoint.step)
        if ledger is not None and record.plan is not None:
            taken = _Private(config, materials, record, record.plan, ledger, folder).train(
                model, optimizer, checkpoint, show
            )
        else:
            taken = steps

            def save(step: int) -> None:
                where = msgspec.structs.replace(checkpoint, step=step)
                save_checkpoint(folder.checkpoint, model, optimizer, where)

            with checkpointing(save, config.checkpoint_every, steps) as keep:

                def after_step(step: int) -> None:
                    show(step)
                    keep(step)

                train_plainly(
                    model,
                    private.tensors,
                    optimizer,
                    steps=range(checkpoint.step, steps),
                    batch_size=config.batch_size,
                    generator=torch.Generator().manual_seed(config.seed + checkpoint.step),
                    loss=loss_for(model),
                    after_step=after_step,
                )
    with _diverging("the trained model"):
        utility = example_bits(model, materials.held_out)
    save_weights(folder.weights, model)
    media = {"pixel_values", "input_features"} & set(private.tensors)
    return RunResult(
        guarantee=None,
        unit="record" if media else config.corpus.unit,
        spent_on_data_set=None,
        bits_per_byte=utility.bits_per_byte,
        base_bits_per_byte=checkpoint.base_bits_per_byte,
        test_documents=len(utility.bits_D),
        records=len(private),
        public_documents=materials.public_documents,
        steps=taken,
        steps_lost=checkpoint.steps_lost,
        seconds=0.0,
        planned_steps=steps,
    )


class _Private:
    """The private steps of one run."""

    def __init__(
        self,
        config: TrainConfig,
        materials: Materials,
        record: RunRecord,
        plan: Plan,
        ledger: Ledger,
        folder: RunFolder,
    ) -> None:
        self._config = config
        self._materials = materials
        self._run = record.run
        self._plan = plan
        self._ledger = ledger
        self._folder = folder

    def train(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        start: Checkpoint,
        show: Show,
    ) -> int:
        """Take the steps that are left; how many were taken in the end.

        Fewer than planned if the next would exceed the budget.

        Raises:
            BudgetExceeded: not even one step fits.
        """
        plan, config, folder = self._plan, self._config, self._folder
        if start.step >= plan.steps:
            return plan.steps
        stream = stream_of(folder, plan, paid=self._ledger.steps(self._run))
        records, loss = records_of(self._materials.private, plan, loss_for(model), stream)
        log = StepLog(folder.steps, start.step, self._materials.context)
        meter = Meter(plan)
        with private_gradients(
            model,
            loss,
            records,
            plan,
            self._ledger,
            run=self._run,
            stream=stream,
            start=start.step,
            released=log.digests if needs_one_seed(plan) else None,
            microbatch_size=config.microbatch_size,
        ) as gradients:
            releases = gradients.releases
            if start.max_grad_norm is not None:
                releases.max_grad_norm = start.max_grad_norm

            def save(step: int) -> None:
                where = msgspec.structs.replace(
                    start, step=step, max_grad_norm=releases.max_grad_norm
                )
                save_checkpoint(folder.checkpoint, model, optimizer, where)

            with checkpointing(save, config.checkpoint_every, plan.steps) as keep:

                def after_step(step: int) -> None:
                    due = is_due(step, config.checkpoint_every, plan.steps)
                    epsilon = meter.after(step) if due else None
                    log.write(releases, epsilon=epsilon, release=releases.digest)
                    if epsilon is None:
                        show(step)
                    else:
                        show(step, f"ε = {rounded_up(epsilon)} so far")
                    keep(step)

                try:
                    fit(model, gradients, optimizer, range(start.step, plan.steps), after_step)
                except BudgetExceeded:
                    if releases.step == 0:
                        raise
                    save(releases.step)
            return releases.step


def _standing(
    config: TrainConfig,
    materials: Materials,
    record: RunRecord,
    ledger: Ledger | None,
    folder: RunFolder,
    watch: Watch,
) -> tuple[nn.Module, torch.optim.Optimizer, Checkpoint]:
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
        model = adapted(materials.model, config.lora, seed=config.seed)
        optimizer = config.optimizer.build(trained_parameters(model))
        checkpoint = load_checkpoint(folder.checkpoint, model, optimizer, run=record.run)
        if ledger is None or record.plan is None:
            return model, optimizer, checkpoint
        if checkpoint.step > paid:
            raise LedgerError(
                f"{ledger.path}: {checkpoint.step} private steps were taken and only {paid} are "
                "on record; restore the ledger from a backup"
            )
        if needs_one_seed(record.plan):
            return model, optimizer, checkpoint  # steps behind it are made again
        lost = checkpoint.steps_lost + paid - checkpoint.step
        return (
            model,
            optimizer,
            msgspec.structs.replace(checkpoint, step=paid, steps_lost=lost),
        )
    model = materials.model
    with _diverging("public base model"):
        public_base_model(config, materials, watch)
        base = example_bits(model, materials.held_out)
    model = adapted(model, config.lora, seed=config.seed)
    optimizer = config.optimizer.build(trained_parameters(model))
    checkpoint = Checkpoint(run=record.run, step=0, base_bits_per_byte=base.bits_per_byte)
    save_checkpoint(folder.checkpoint, model, optimizer, checkpoint)
    return model, optimizer, checkpoint


def public_base_model(config: TrainConfig, materials: Materials, watch: Watch) -> None:
    """Train the model on public examples alone, in place; what the private steps start from."""
    training, public = config.public_training, materials.public
    if public is None or not training.epochs:
        return
    steps = steps_of(training, len(public))
    with watch("public base model", steps) as after_step:
        train_plainly(
            materials.model,
            public.tensors,
            training.optimizer.build(trained_parameters(materials.model)),
            steps=range(steps),
            batch_size=training.batch_size,
            generator=torch.Generator().manual_seed(config.seed),
            loss=loss_for(materials.model),
            after_step=after_step,
        )


@contextmanager
def _diverging(what: str) -> Iterator[None]:
    """Say what had diverged."""
    try:
        yield
    except NonFiniteGradient as error:
        raise NonFiniteGradient(f"{what}: {error}") from error
    except NonFinitePrediction as error:
        raise NonFinitePrediction(f"{what}: {error}") from error


def _finished(folder: RunFolder) -> RunResult | None:
    """The result of a run that needs nothing more; a damaged one is made again."""
    if not (folder.result.exists() and folder.weights.exists()):
        return None
    try:
        return folder.read(folder.result, RunResult)
    except ConfigError:
        return None


def _check_all_paid(record: RunRecord, steps: int, ledger: Ledger) -> None:
    paid = ledger.steps(record.run)
    if paid < steps:
        raise LedgerError(
            f"{ledger.path}: the run is finished and only {paid} of its {steps} steps are on "
            "record; restore the ledger from a backup"
        )
