"""``make_private``: a torch training loop under differential privacy, changed as little as can be.

::

    model, optimizer, loader = make_private(model, optimizer, loader, ...)
    for batch in loader:           # drawn by the plan's sampler, in secret; some may be empty
        optimizer.zero_grad()
        optimizer.backward(batch)  # per-example losses, clipped and added up in micro-batches
        optimizer.step()           # ledger, noise, 1 / expected batch size, the inner optimiser

``backward`` takes the batch because the losses are formed per example: no mean couples examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler

from privlm.dp.accounting import Neighbours
from privlm.dp.batches import Batch
from privlm.dp.clipping import Clipping, FlatClipping, PerExampleLoss
from privlm.dp.factorization import Correlation
from privlm.dp.fingerprints import fingerprint_of_items
from privlm.dp.ledger import Budget
from privlm.dp.plan import Guarantee, Plan
from privlm.dp.records import Collated
from privlm.dp.releases import StepReport
from privlm.dp.sampling import Sampler
from privlm.dp.turns import (
    OutOfTurn,
    Turns,
    epsilon_after,
    new_run_name,
    open_turns,
    planned,
)
from privlm.models.loss import loss_for


class PrivateLoader:
    """Batches of the plan's sampler, an epoch's worth at a time.

    Loading and collating happen in this process, which alone holds the secret stream.
    """

    def __init__(self, turns: Turns, dataset: Any, steps: int) -> None:
        self.dataset = dataset
        self._turns = turns
        self._steps = steps

    def __len__(self) -> int:
        """Steps of an epoch; the last one after an interruption may have fewer."""
        return self._steps

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches; each must be stepped on before the next.

        Raises:
            BudgetSpent: no step is left.
            OutOfTurn: a batch was passed over.
        """
        for number in range(self._steps):
            if number and not self._turns.left:
                return
            yield self._turns.draw()
            if self._turns.open:
                raise OutOfTurn(
                    "a batch was passed over: which are used must not depend on what they hold. "
                    "Call optimizer.backward and optimizer.step on each, empty ones too"
                )


class PrivateOptimizer(Optimizer):
    """An optimiser whose gradients are private releases.

    Everything that is not about privacy is the inner one's: parameter groups, state, hooks. A
    learning-rate scheduler may be over either. Gradients exist within :meth:`step` alone.

    Args:
        inner: over the trained parameters of the model.
        turns: where the gradients come from.
        close: makes the model ordinary and unlocks the ledger.

    Raises:
        ValueError: ``inner`` lacks a trained parameter, or has one that the model has not.
    """

    def __init__(
        self, inner: Optimizer, turns: Turns, model: nn.Module, close: Callable[[], None]
    ) -> None:
        # Without Optimizer.__init__, which would make groups and state of its own.
        self.inner = inner
        self._turns = turns
        self._close = close
        _check_covers(inner, model)

    def __getattr__(self, name: str) -> Any:
        """Hooks and whatever else is not here: the inner optimiser's."""
        return getattr(self.__dict__["inner"], name)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimiser's, with the learning rates."""
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.inner.param_groups = groups

    @property
    def state(self) -> Any:
        """The inner optimiser's."""
        return self.inner.state

    @state.setter
    def state(self, state: Any) -> None:
        self.inner.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The inner optimiser's."""
        return self.inner.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.inner.defaults = defaults

    @property
    def plan(self) -> Plan:
        """The public parameters."""
        return self._turns.releases.plan

    @property
    def report(self) -> StepReport | None:
        """What the last step did; private, see :class:`StepReport`."""
        return self._turns.releases.report

    @property
    def steps_taken(self) -> int:
        """Steps that the ledger counts for this run, those lost in an interruption too."""
        return self._turns.releases.step

    @property
    def steps_left(self) -> int:
        """Steps that the plan still allows."""
        return self._turns.left

    def backward(self, batch: Batch) -> None:
        """Sum the batch's clipped gradients; see :meth:`Turns.clip`."""
        self._turns.clip(batch)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Record the step, release its gradient, and move the parameters.

        Raises:
            OutOfTurn: without a backward since the last step.
            LedgerError: the step could not be recorded; nothing was released.
            ValueError: a closure, which would look at the data once more.
        """
        if closure is not None:
            raise ValueError("a closure would look at the data once more; call step without one")
        gradients = self._turns.release()
        try:
            self.inner.zero_grad(set_to_none=True)
            for parameter, gradient in zip(self._turns.parameters, gradients, strict=True):
                parameter.grad = gradient.to(parameter.dtype)
            self.inner.step()
        finally:
            self.inner.zero_grad(set_to_none=True)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget a sum that was not released, and gradients."""
        self._turns.forget()
        self.inner.zero_grad(set_to_none=True)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the sensitivity is that of the parameters there were."""
        raise ValueError("add parameters before the model is made private")

    def state_dict(self) -> dict[str, Any]:
        """The inner optimiser's: moments of released gradients, no noise or secret."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Into the inner optimiser. What was spent is the ledger's business."""
        self.inner.load_state_dict(state_dict)

    def guarantee(self) -> Guarantee:
        """The guarantee of the full run; costs one accounting."""
        return self.plan.guarantee()

    def epsilon(self, step: int | None = None) -> float:
        """ε of the first ``step`` steps, by default of those taken; costs one accounting."""
        return epsilon_after(self.plan, self.steps_taken if step is None else step)

    def close(self) -> None:
        """Make the model an ordinary one and unlock the ledger; idempotent."""
        self._close()


class PrivateTraining(NamedTuple):
    """What :func:`make_private` returns; as a context manager it closes the optimiser."""

    model: nn.Module
    optimizer: PrivateOptimizer
    data_loader: PrivateLoader

    def __enter__(self) -> PrivateTraining:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.optimizer.close()


def make_private(
    model: nn.Module,
    optimizer: Optimizer,
    data_loader: DataLoader[Any],
    *,
    target_delta: float,
    epochs: float,
    ledger: Path | str,
    target_epsilon: float | None = None,
    noise_multiplier: float | None = None,
    max_grad_norm: float | None = None,
    clipping: Clipping | None = None,
    loss: PerExampleLoss | None = None,
    sampler: Sampler | None = None,
    neighbours: Neighbours = "add-or-remove-one",
    correlation: Correlation | None = None,
    microbatch_size: int | None = None,
    run: str | None = None,
    dataset: str | None = None,
    budget: Budget | None = None,
) -> PrivateTraining:
    """Put a model, its optimiser and its data under (ε, δ)-differential privacy per example.

    The run has ``epochs`` × ``len(data_loader)`` steps, whose batches are drawn in secret; the
    loader's own order, and any seed, play no part. The number of examples is treated as public.

    Args:
        model: its parameters that require a gradient are trained, in place.
        optimizer: any of torch's, over those parameters.
        data_loader: of a data set with indices; ``batch_size`` is the *expected* size of a batch.
        target_delta: δ.
        epochs: how often an example is used, in expectation.
        ledger: the data set's file, one for all runs on it; or :data:`~privlm.dp.turns.NO_LEDGER`.
        target_epsilon: ε of the whole run; or
        noise_multiplier: standard deviation of the noise over the clipping bound.
        max_grad_norm: the bound of flat clipping, by default 1; or
        clipping: another rule.
        loss: (model, batch) -> one loss an example; by default what the model's class tells.
        sampler: by default Poisson, at ``batch_size`` over the number of examples.
        neighbours: the relation of the guarantee.
        correlation: of the noise; it needs the sampler that goes with it.
        microbatch_size: examples back-propagated at once; bounds memory, changes nothing else.
        run: its name in the ledger. A name that is there already goes on with that run: steps
            that were lost stay counted. By default a new one.
        dataset: what names the data set in the ledger; by default a digest of all its items.
        budget: what all runs on the ledger may spend together.

    Returns:
        The model, the private optimiser and the loader; use it as a context manager, or close the
        optimiser when done.

    Raises:
        ValueError: a loader, optimiser or parameter that cannot be honoured; says which and why.
        UnknownLossError: the model does not tell its loss.
        LedgerError: the ledger cannot vouch for this data set or run.
    """
    _check_loader(data_loader)
    if clipping is not None and max_grad_norm is not None:
        raise ValueError("give max_grad_norm, or a clipping rule with a bound of its own")
    examples, batch_size = len(data_loader.dataset), data_loader.batch_size  # type: ignore[arg-type]
    assert batch_size is not None
    if not epochs > 0:
        raise ValueError(f"epochs must be positive, got {epochs}")
    per_example = loss_for(model) if loss is None else loss
    plan = planned(
        examples=examples,
        batch_size=batch_size,
        steps=max(1, round(epochs * len(data_loader))),
        target_epsilon=target_epsilon,
        noise_multiplier=noise_multiplier,
        target_delta=target_delta,
        clipping=clipping or FlatClipping(1.0 if max_grad_norm is None else max_grad_norm),
        sampler=sampler,
        neighbours=neighbours,
        correlation=correlation,
    )
    with ExitStack() as stack:
        turns = open_turns(
            stack,
            model,
            per_example,
            Collated(data_loader.dataset, data_loader.collate_fn),
            plan,
            ledger=ledger,
            dataset=dataset or fingerprint_of_items(data_loader.dataset),
            run=run or new_run_name(),
            budget=budget,
            microbatch_size=microbatch_size,
        )
        opened = ExitStack()
        private = PrivateOptimizer(optimizer, turns, model, opened.close)
        loader = PrivateLoader(turns, data_loader.dataset, len(data_loader))
        opened.enter_context(stack.pop_all())  # last, so that whatever fails before undoes all
    return PrivateTraining(model, private, loader)


def _check_loader(loader: DataLoader[Any]) -> None:
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        raise ValueError(
            "the data set has no indices to sample from; use one with a length and items"
        )
    if loader.batch_size is None or not isinstance(
        loader.sampler, RandomSampler | SequentialSampler
    ):
        raise ValueError(
            "the DataLoader has a sampler of its own, for which no amplification is proven; leave "
            "it out, and name one of privlm.dp as sampler"
        )
    if loader.num_workers:
        raise ValueError(
            f"num_workers is {loader.num_workers}; batches are drawn and collated in the process "
            "that holds the secret. Prepare the examples beforehand, and set it to 0"
        )


def _check_covers(optimizer: Optimizer, model: nn.Module) -> None:
    covered = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in covered]
    if missing:
        raise ValueError(
            f"the optimizer does not train {', '.join(missing[:3])}; freeze what is not trained, "
            "or make the optimizer over all parameters that require a gradient"
        )
    if covered - {id(p) for p in model.parameters()}:
        raise ValueError("the optimizer has parameters that are not the model's; take them out")
