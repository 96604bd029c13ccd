"""``PrivateTrainer``: transformers' Trainer under differential privacy. A door to ``transformers``.

Import it from here; :mod:`privlm.dp` itself needs no transformers.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from privlm.dp.batches import Batch
from privlm.dp.clipping import MAX_MICROBATCH, PerExampleLoss
from privlm.dp.fingerprints import fingerprint_of_items
from privlm.dp.history import LedgerError
from privlm.dp.plan import Guarantee, Plan
from privlm.dp.private import PrivateLoader, PrivateOptimizer
from privlm.dp.records import Collated
from privlm.dp.releases import BudgetSpent
from privlm.dp.trainer_arguments import (
    ArgumentRefused,
    PrivacyArguments,
    check_arguments,
    check_data,
    plan_of,
    steps_per_epoch,
)
from privlm.dp.turns import NO_LEDGER, Turns, epsilon_after, new_run_name, open_turns
from privlm.models.loss import loss_for
from protocols.files import write_atomically

try:
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_utils import SaveStrategy, get_last_checkpoint
except ImportError:
    raise ImportError("PrivateTrainer needs transformers: pip install 'privlm[hf]'") from None

MARKER = "privacy.json"
"""Beside the weights of every checkpoint: its run, the plan, and the steps behind them."""

_NOTE = (
    "values under private/ are computed from protected examples without noise, and are not "
    "covered by the guarantee: publish none of them, nor trainer_state.json, which keeps them"
)
_PRIVATE_METRICS = frozenset({"loss", "train_loss"})
_SHARE_OF_ACCOUNTING = 0.05

_logger = logging.getLogger(__name__)


class Marker(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What weights in a folder have behind them; public.

    Attributes:
        run: the name in the ledger.
        steps: taken by these weights, or lost before them.
        plan: of the run.
    """

    run: str
    steps: int
    plan: Plan


class PrivateTrainer(Trainer):
    """A ``Trainer`` whose training is (ε, δ)-differentially private per example of its data set.

    ``per_device_train_batch_size`` × ``gradient_accumulation_steps`` is the expected batch size,
    the former alone the micro-batch; ``max_grad_norm`` bounds each example's gradient. Every
    argument is honoured, or refused by name. Evaluation is as ever: the guarantee is not about
    evaluation data, by which the best checkpoint or an early end may be chosen.

    An interrupted training goes on with ``train(resume_from_checkpoint=True)``: steps after the
    checkpoint stay counted, and the run takes that many fewer.

    Args:
        model: of transformers, with peft's adapters or without.
        args: of transformers.
        privacy: see :class:`PrivacyArguments`.
        train_dataset: the private data; it needs a length and items. One item is one example.
        loss: (model, batch) -> one loss an example; by default what the model's class tells.
        eval_dataset: not private.
        others: of ``Trainer``: ``data_collator``, ``processing_class``, ``compute_metrics``,
            ``callbacks``, ``optimizers``, ``optimizer_cls_and_kwargs``,
            ``preprocess_logits_for_metrics``.

    Raises:
        ArgumentRefused: an argument that cannot be honoured.
        ValueError: a plan that cannot be.
        UnknownLossError: the model does not tell its loss.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        privacy: PrivacyArguments,
        train_dataset: Any,
        loss: PerExampleLoss | None = None,
        eval_dataset: Any = None,
        **others: Any,
    ) -> None:
        for name in ("model_init", "compute_loss_func"):
            if others.get(name) is not None:
                raise ArgumentRefused(f"{name}: pass a model, and a loss with one value an example")
        if type(self).compute_loss is not Trainer.compute_loss:
            raise ArgumentRefused("compute_loss is not called in private training; pass loss")
        check_arguments(args)
        check_data(train_dataset, eval_dataset)
        self.privacy = privacy
        self._loss = loss_for(model) if loss is None else loss
        self._expected_batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
        self._steps_per_epoch = steps_per_epoch(args, len(train_dataset))
        self.plan = plan_of(args, privacy, len(train_dataset))
        self.marker: Marker | None = None
        self._turns: Turns | None = None
        self._open: Callable[[Collated], Turns] | None = None
        self._seen, self._unclipped = 0, 0
        self._next_accounting = 0.0
        # One batch of the loader is one step: the engine itself makes micro-batches of it. What
        # was drawn before an interruption is drawn no more, so there is nothing to skip.
        args = copy.copy(args)
        args.gradient_accumulation_steps = 1
        args.ignore_data_skip = True
        super().__init__(
            model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, **others
        )
        self.add_callback(_StopAtTheEnd(self))

    def guarantee(self) -> Guarantee:
        """The guarantee of the full run; costs one accounting."""
        return self.plan.guarantee()

    def epsilon(self) -> float:
        """ε spent by this run so far, lost steps included; costs one accounting."""
        return epsilon_after(self.plan, 0 if self.marker is None else self.marker.steps)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """As ``Trainer.train``.

        Raises:
            LedgerError: the ledger cannot vouch for this data set, run or checkpoint.
            BudgetSpent: no step of the plan is left.
        """
        if trial is not None:
            raise ArgumentRefused("trial: a search costs privacy; see privlm.dp.Search")
        checkpoint = _checkpoint(resume_from_checkpoint, str(self.args.output_dir))
        earlier = None if checkpoint is None else self._continued(checkpoint)
        run = self.privacy.run or (new_run_name() if earlier is None else earlier.run)
        _logger.warning(_NOTE)
        with ExitStack() as stack:
            self._open = lambda records: open_turns(
                stack,
                self._trained,
                self._loss,
                records,
                self.plan,
                ledger=self.privacy.ledger,
                dataset=self.privacy.dataset or fingerprint_of_items(self.train_dataset),
                run=run,
                budget=self.privacy.budget,
                microbatch_size=min(self.args.per_device_train_batch_size, MAX_MICROBATCH),
                at_least=0 if earlier is None else earlier.steps,
            )
            self.marker = Marker(run, 0 if earlier is None else earlier.steps, self.plan)
            try:
                return super().train(checkpoint, ignore_keys_for_eval=ignore_keys_for_eval)
            finally:
                self._mark()
                self._open, self._turns = None, None
                self.optimizer = _ordinary(self.optimizer)

    def get_train_dataloader(self) -> PrivateLoader:  # type: ignore[override]
        """Batches drawn in secret; only while :meth:`train` is at work."""
        if self._open is None:
            raise ValueError("batches are drawn in secret, and only during train()")
        dataset, collate = self.train_dataset, self.data_collator
        if hasattr(dataset, "remove_columns"):  # a data set of the datasets library
            dataset = self._remove_unused_columns(dataset, description="training")
        else:
            collate = self._get_collator_with_removed_columns(collate, description="training")
        self._turns = self._open(Collated(dataset, collate))
        if not self._turns.left:
            raise BudgetSpent(
                f"all {self.plan.steps} steps of the plan are spent; another would exceed the "
                "guarantee. Make a new run with a larger budget to train on"
            )
        return PrivateLoader(self._turns, dataset, self._steps_per_epoch)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimiser that the arguments name, over private gradients while training."""
        inner = super().create_optimizer(model)
        if self._turns is not None:
            self.optimizer = PrivateOptimizer(
                _ordinary(inner), self._turns, self._trained, lambda: None
            )
            return self.optimizer
        return inner

    def training_step(
        self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None
    ) -> Tensor:
        """Sum the clipped gradients of a whole logical batch; returns its mean loss, private."""
        model.train()
        optimizer: Any = self.optimizer
        if callable(getattr(optimizer, "train", None)):
            optimizer.train()  # of optimisers that keep two sets of weights
        turns = self._turns
        assert turns is not None
        with self.accelerator.autocast():
            clipped = turns.clip(inputs)
        self._seen += clipped.examples
        self._unclipped += clipped.unclipped
        return torch.tensor(clipped.loss / max(1, clipped.examples), device=self.args.device)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], None]:
        """The next batch, uncounted: no loss is divided by the tokens of its neighbours."""
        batch = next(epoch_iterator, None)
        return ([] if batch is None else [batch]), None

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """The expected size of a logical batch."""
        return self._expected_batch

    def floating_point_ops(self, inputs: Batch) -> int:
        """Not counted: the number would tell how large the secret batches were."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As ``Trainer.log``; what is private is called so, and ε stands beside it."""
        if not _PRIVATE_METRICS.isdisjoint(logs):
            for name in _PRIVATE_METRICS & set(logs):
                logs[f"private/{name}"] = logs.pop(name)
            if self._seen:
                logs["private/clipped_fraction"] = 1 - self._unclipped / self._seen
                self._seen, self._unclipped = 0, 0
            self._add_epsilon(logs, always="private/train_loss" in logs)
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As ``Trainer.save_model``, with :data:`MARKER` beside the weights."""
        super().save_model(output_dir, _internal_call)
        self._mark()
        if self.marker is not None:
            folder = Path(output_dir or str(self.args.output_dir))
            write_atomically(folder / MARKER, msgspec.json.encode(self.marker), mode=0o644)

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: every trial releases something about the data."""
        raise ArgumentRefused("a search costs privacy; see privlm.dp.Search for what it costs")

    @property
    def steps_left(self) -> int:
        """Steps that the plan allows still, all that the ledger counts taken off."""
        return self.plan.steps if self._turns is None else self._turns.left

    @property
    def _trained(self) -> nn.Module:
        assert isinstance(self.model, nn.Module)
        return self.model

    def _clip_grad_norm(self, model: nn.Module) -> None:
        """Nothing: every example's gradient is clipped, and the sum must not be."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """None: no gradient exists outside of the optimiser's step."""

    def _mark(self) -> None:
        if self.marker is not None and self._turns is not None:
            self.marker = msgspec.structs.replace(self.marker, steps=self._turns.releases.step)

    def _add_epsilon(self, logs: dict[str, float], *, always: bool) -> None:
        """ε so far; seconds of accounting, and therefore seldom."""
        begun = time.monotonic()
        if self._turns is None or (begun < self._next_accounting and not always):
            return
        logs["epsilon"] = epsilon_after(self.plan, self._turns.releases.step)
        took = time.monotonic() - begun
        self._next_accounting = begun + took / _SHARE_OF_ACCOUNTING

    def _continued(self, checkpoint: str) -> Marker:
        earlier = _marker(Path(checkpoint))
        if self.privacy.ledger == NO_LEDGER:
            raise LedgerError(
                "a run without a ledger cannot be resumed: nothing says which steps were lost"
            )
        if self.privacy.run not in (None, earlier.run):
            raise LedgerError(f"the checkpoint is of run {earlier.run!r}, not {self.privacy.run!r}")
        if earlier.plan != self.plan:
            raise LedgerError(
                "the checkpoint is of a run with another plan; go on with its batch size, steps, "
                "bound and noise, or begin a new run"
            )
        return earlier


class _StopAtTheEnd(TrainerCallback):
    """Stops when the ledger counts all steps: sooner than expected if some were lost."""

    def __init__(self, trainer: PrivateTrainer) -> None:
        self._trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> Any:
        if not self._trainer.steps_left:
            control.should_training_stop = True
            control.should_save |= args.save_strategy == SaveStrategy.STEPS
        return control


def _checkpoint(asked: str | bool | None, output_dir: str) -> str | None:
    if not asked:
        return None
    found = get_last_checkpoint(output_dir) if asked is True else asked  # type: ignore[no-untyped-call]
    if found is None:
        raise ValueError(f"{output_dir} holds no checkpoint to resume from")
    return str(found)


def _marker(checkpoint: Path) -> Marker:
    try:
        return msgspec.json.decode((checkpoint / MARKER).read_bytes(), type=Marker)
    except (OSError, msgspec.DecodeError) as error:
        raise LedgerError(
            f"{checkpoint} does not say which run it is of ({error}); resume from a whole "
            "checkpoint of a private training"
        ) from error


def _ordinary(optimizer: Any) -> Any:
    """The optimiser inside accelerate's and our wrappers."""
    while not isinstance(optimizer, PrivateOptimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer.inner if isinstance(optimizer, PrivateOptimizer) else optimizer
