"""Per-example gradient clipping: the one place where sensitivity is made.

Shape suffixes: N examples of a batch, C of them counted, P parameters of one tensor.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from privlm.dp.batches import Batch, cycle, part, size, split
from privlm.dp.bookkeeping import Book, Patches, UnknownUse
from privlm.dp.bookkeeping.operations import exact
from privlm.dp.selfcheck import WithoutDropout, shaken, sums, versions, written

PerExampleLoss = Callable[[nn.Module, Any], Tensor]
"""(model, batch of N examples) -> losses of shape (N,), each of its example alone."""

ROUNDING_MARGIN = 1e-4
"""Float32 norms of 10^8 terms, and float32 sums over a microbatch of up to 1024 examples (n · 2^-24
bounds), err by less; microbatches are added up in float64. Clipped norms stay below the bound
despite both."""

MAX_MICROBATCH = 1024
CPU_MICROBATCH = 16
MIN_GRAD_NORM = 1e-6
"""Below it the squares of float32 gradients may underflow and the norm with them."""


class FlatClipping(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="flat"):
    """g · min(1, max_grad_norm / ‖g‖) over all parameters together (Abadi et al. 2016)."""

    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        check_bound(self.max_grad_norm)


class PerLayerClipping(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="per-layer"):
    """Each of L parameter tensors to max_grad_norm / √L, so that together they keep the bound."""

    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        check_bound(self.max_grad_norm)


class AutomaticClipping(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="automatic"):
    """g · max_grad_norm / (‖g‖ + stability): AUTO-S (Bu et al. 2023), no threshold to tune."""

    max_grad_norm: float = 1.0
    stability: float = 0.01

    def __post_init__(self) -> None:
        check_bound(self.max_grad_norm)
        if not (self.stability > 0 and math.isfinite(self.stability)):
            raise ValueError(f"stability must be positive and finite, got {self.stability}")


class AdaptiveClipping(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="adaptive"):
    """Flat clipping whose bound follows a quantile of the norms (Andrew et al. 2021).

    Each step also releases how many norms lay below the bound C, minus half the batch, under noise
    of standard deviation ``count_noise_multiplier`` / 2: one example moves it by 1/2. With b that
    count over the expected batch size plus 1/2, C ← C · e^(−learning_rate (b − target_quantile)).

    Attributes:
        max_grad_norm: the first bound.
        target_quantile: share of examples that shall not be clipped.
        learning_rate: of the logarithm of the bound.
        count_noise_multiplier: noise on the count over its sensitivity; the noise on the gradients
            grows so that both releases together cost what the plan's noise multiplier says.
    """

    max_grad_norm: float = 1.0
    target_quantile: float = 0.5
    learning_rate: float = 0.2
    count_noise_multiplier: float = 20.0

    def __post_init__(self) -> None:
        check_bound(self.max_grad_norm)
        if not 0 < self.target_quantile < 1:
            raise ValueError(f"target_quantile must lie in (0, 1), got {self.target_quantile}")
        for name in ("learning_rate", "count_noise_multiplier"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")

    def gradient_noise_multiplier(self, noise_multiplier: float) -> float:
        """Noise on the gradients such that gradients and count together cost ``noise_multiplier``.

        (σ⁻² − σ_b⁻²)^(−1/2), with both multipliers relative to their sensitivities.

        Raises:
            ValueError: the count alone already costs as much.
        """
        if noise_multiplier == 0:
            return 0.0
        if self.count_noise_multiplier <= noise_multiplier:
            raise ValueError(
                f"count_noise_multiplier {self.count_noise_multiplier} must exceed the "
                f"noise_multiplier {noise_multiplier:.4g}; raise it"
            )
        return float((noise_multiplier**-2 - self.count_noise_multiplier**-2) ** -0.5)


Clipping = FlatClipping | PerLayerClipping | AutomaticClipping | AdaptiveClipping
"""How one example's gradient is bounded; ``max_grad_norm`` is the l2 bound on it."""


def check_bound(max_grad_norm: float) -> None:
    """Raise ``ValueError`` for a clipping bound that float32 norms could not keep."""
    if not MIN_GRAD_NORM <= max_grad_norm < math.inf:
        raise ValueError(
            f"max_grad_norm must be at least {MIN_GRAD_NORM} and finite, got {max_grad_norm}"
        )


class NonFiniteGradient(ValueError):
    """A NaN or infinite gradient has no norm to clip; nothing was released."""


@dataclass(frozen=True)
class ClippedSum:
    """Sum over a batch of per-example gradients, each of joint l2 norm ≤ ``l2_sensitivity``.

    Sensitive: only a mechanism may consume it. ``values`` has one tensor a
    parameter; the norm is over all of them together. ``unclipped`` of the
    ``examples`` had a norm below the bound already, ``loss`` is the sum of their losses.
    """

    values: tuple[Tensor, ...] = field(repr=False)
    l2_sensitivity: float
    examples: int = field(default=0, repr=False)
    unclipped: int = field(default=0, repr=False)
    loss: float = field(default=0.0, repr=False)


class PerExampleClipping:
    """Clipped gradient sums of a model, from one forward and one backward pass.

    Used as a context manager, so that the model is an ordinary one afterwards. Before the
    first batch is summed, two of its examples are also back-propagated alone, by plain
    autograd: a model that mixes examples, or whose per-example gradients the engine would
    get wrong, is refused.

    Args:
        model: its parameters that require a gradient are the ones trained.
        loss: the per-example loss; see :data:`PerExampleLoss`.
        clipping: the rule, or the bound of flat clipping.
        microbatch_size: examples back-propagated at once. Bounds the memory and never
            changes the result's distribution. None takes what fits: the whole batch,
            halved as often as a GPU's memory runs out; on CPUs 16.

    Raises:
        ValueError: nothing is trained, or a layer mixes examples (batch norm); the message
            names it.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: PerExampleLoss,
        clipping: Clipping | float,
        microbatch_size: int | None,
    ) -> None:
        if microbatch_size is not None and not 1 <= microbatch_size <= MAX_MICROBATCH:
            raise ValueError(
                f"microbatch_size must lie between 1 and {MAX_MICROBATCH}, got {microbatch_size}"
            )
        self.clipping = FlatClipping(clipping) if isinstance(clipping, float | int) else clipping
        self._model = model
        self._loss = loss
        self.parameters = tuple(p for p in model.parameters() if p.requires_grad)
        if not self.parameters:
            raise ValueError("the model has no parameter that requires a gradient")
        _refuse_mixing_layers(model)
        on_cpu = self.parameters[0].device.type == "cpu"
        self._microbatch_size = microbatch_size or (CPU_MICROBATCH if on_cpu else MAX_MICROBATCH)
        self._one_by_one = False
        self._checked = False

    def __enter__(self) -> PerExampleClipping:
        self._model.train()
        _refuse_hooks(self._model)
        self._layouts: dict[Any, Any] = {}
        self._book = Book(self.parameters)
        self._patches = Patches(self._model, self._book)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._patches.remove()
        self._book.discard()
        self._forget_gradients()

    def clipped_sum(
        self, examples: Batch, max_grad_norm: float | None = None, counted: int | None = None
    ) -> ClippedSum:
        """Σ over the batch of the clipped gradients.

        Args:
            examples: N of them; N may be 0, whose sum is zero.
            max_grad_norm: the bound at this step, if it is not the rule's.
            counted: only so many, the first ones, are summed. The rest run along with them, for
                processes that share a model must run it equally often; None counts all.

        Raises:
            NonFiniteGradient: an example whose loss or gradient is NaN or infinite.
            ValueError: the loss has not one value an example, or the model mixes examples.
        """
        bound = self.clipping.max_grad_norm if max_grad_norm is None else max_grad_norm
        totals = self._zeros()
        count = size(examples)
        counted = count if counted is None else counted
        if count and not self._checked and self._tell_apart(examples):
            self._check(examples)
        # One example at a time is right whatever the model does with several.
        together = self._microbatch_size if self._checked else 1
        unclipped, loss, done = 0, 0.0, 0
        while done < count:
            chunk = part(examples, done, min(together, self._microbatch_size))
            try:
                added = self._add_clipped(chunk, totals, bound, max(0, counted - done))
            except _NothingAdded:
                self._halve()
                continue
            done += size(chunk)
            unclipped += added[0]
            loss += added[1]
        return ClippedSum(totals, bound, counted, unclipped, loss)

    def _zeros(self) -> tuple[Tensor, ...]:
        """What sums begin from: float64, one a parameter."""
        return tuple(torch.zeros_like(p, dtype=torch.float64) for p in self.parameters)

    def _add_clipped(
        self, examples: Batch, totals: tuple[Tensor, ...], bound: float, counted: int
    ) -> tuple[int, float]:
        if self._one_by_one:
            return self._add_one_by_one(part(examples, 0, counted), totals, bound)
        try:
            try:
                loss_N = self._keep_book(examples)
                with torch.no_grad(), self._full_precision():
                    squares_PN = self._finite_squares()
            except torch.OutOfMemoryError as error:
                raise _NothingAdded from error
            with torch.no_grad(), self._full_precision():
                weight_PC, unclipped = _weights(self.clipping, squares_PN[:, :counted], bound)
                weight_PN = torch.zeros_like(squares_PN)
                weight_PN[:, :counted] = weight_PC
                self._add_weighted(weight_PN, totals)
        finally:
            self._book.discard()
        return unclipped, float(loss_N[:counted].sum())

    def _finite_squares(self) -> Tensor:
        squares_PN = self._book.squared_norms()
        _refuse_non_finite(squares_PN)
        return squares_PN

    def _add_weighted(self, weight_PN: Tensor, totals: tuple[Tensor, ...]) -> None:
        self._book.add_weighted(weight_PN, totals)

    def _add_one_by_one(
        self, examples: Batch, totals: tuple[Tensor, ...], bound: float
    ) -> tuple[int, float]:
        unclipped, loss = 0, 0.0
        for example in split(examples, 1):
            loss_1, gradients = self._alone(example)
            squares_P1 = _squares(gradients)
            _refuse_non_finite(squares_P1)
            weight_P1, below = _weights(self.clipping, squares_P1, bound)
            for total, gradient, weight in zip(totals, gradients, weight_P1, strict=True):
                if gradient is not None:
                    total.add_(exact(gradient) * weight)
            unclipped += below
            loss += float(loss_1)
        return unclipped, loss

    def _keep_book(self, examples: Batch) -> Tensor:
        """Per-example losses, detached, and a book full of their gradients."""
        while True:
            self._book.open(size(examples))
            try:
                loss_N = self._losses(examples)
                break
            except UnknownUse as use:
                self._fall_back(use)
        self._refuse_other_layout(examples)
        with self._full_precision():
            loss_N.sum().backward()
        if any(p.grad is not None for p in self.parameters):
            names = [n for n, p in self._model.named_parameters() if p.grad is not None]
            self._forget_gradients()
            raise ValueError(
                f"{', '.join(names)}: used outside of the module that owns it, where no "
                "per-example gradient is kept; call that module, or freeze the parameter"
            )
        return loss_N.detach()

    def _full_precision(self) -> torch.autocast:
        """Norms and sums in float32 at least, whatever the forward pass ran in."""
        return torch.autocast(self.parameters[0].device.type, enabled=False)

    def _losses(self, examples: Batch) -> Tensor:
        before = versions(self._model)
        totals = None if self._checked else sums(self._model)
        loss_N = self._loss(self._model, examples)
        _refuse_written(written(self._model, before))
        if totals is not None:  # writes that leave no version behind are looked for at first alone
            now = sums(self._model)
            # Sharded training may put other tensors in the place of parameters meanwhile.
            _refuse_written([n for n, value in totals.items() if n in now and now[n] != value])
        if loss_N.shape != (size(examples),):
            raise ValueError(
                f"the loss must have one value per example, shape ({size(examples)},), "
                f"got {tuple(loss_N.shape)}"
            )
        return loss_N

    def _alone(self, example: Batch) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Loss and gradients of a batch of one, by plain autograd."""
        loss_1 = self._losses(example)
        with self._full_precision():
            loss_1.sum().backward()
        gradients = tuple(p.grad for p in self.parameters)
        self._forget_gradients()
        return loss_1.detach(), gradients

    def _forget_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def _fall_back(self, use: UnknownUse) -> None:
        self._patches.fall_back(use.module)
        self._checked = False  # of the model as it runs from now on
        warnings.warn(
            f"{type(use.module).__name__} uses its parameters in {use.function}, for which there "
            "is no rule: its per-example gradients come from functorch, which is slower",
            stacklevel=2,
        )

    def _halve(self) -> None:
        if self._microbatch_size == 1:
            raise MemoryError("not enough memory for a single example; shorten the context")
        self._microbatch_size //= 2
        torch.cuda.empty_cache()

    def _refuse_other_layout(self, examples: Batch) -> None:
        """Every use of a parameter has as many rows an example as ever, at this shape of batch."""
        shapes = (
            {"": examples.shape[1:]}
            if isinstance(examples, Tensor)
            else {name: value.shape[1:] for name, value in examples.items()}
        )
        layout = [(index, rows / size(examples)) for index, rows in self._book.notes]
        key = tuple(sorted(shapes.items()))
        if self._layouts.setdefault(key, layout) != layout:
            raise ValueError(
                "the model uses its parameters otherwise for these examples than for those before, "
                "of the same shape: it mixes or routes them by what they hold, as some mixtures of "
                "experts do, and cannot be trained per example"
            )

    def _tell_apart(self, examples: Batch) -> bool:
        """Whether there are two different examples: copies of one agree whatever mixes them."""
        if size(examples) < 2:
            return False
        tensors = [examples] if isinstance(examples, Tensor) else list(examples.values())
        return any(not torch.equal(value[0], value[1]) for value in tensors)

    def _check(self, examples: Batch) -> None:
        """Find layers whose first dimension is not the example, and compare with autograd."""
        kind, half = self.parameters[0].device.type, {torch.bfloat16, torch.float16}
        exactly = not any(p.dtype in half for p in self._model.parameters())
        autocast = torch.is_autocast_enabled(kind) and not exactly
        try:
            with (
                self._shaken(),
                WithoutDropout(),
                torch.autocast(kind, enabled=autocast, dtype=torch.get_autocast_dtype(kind)),
            ):
                shared = self._shared_parameters(examples)
                if not shared:
                    self._compare_with_autograd(cycle(examples, 2))
        finally:
            self._book.discard()
            self._forget_gradients()
        if shared:
            self._one_by_one = True
            warnings.warn(
                f"{', '.join(shared)}: used once for all examples of a batch, so that examples "
                "are back-propagated one by one, which is slow; freeze it to avoid that",
                stacklevel=2,
            )
        self._checked = True

    def _shaken(self) -> AbstractContextManager[None]:
        return shaken(self.parameters)

    def _shared_parameters(self, examples: Batch) -> list[str]:
        """Names of parameters whose uses do not grow with the number of examples."""
        while True:
            try:
                seen = [self._rows_of_uses(cycle(examples, n)) for n in (2, 3)]
                break
            except UnknownUse as use:
                self._fall_back(use)
        two, three = seen
        names = [name for name, p in self._model.named_parameters() if p.requires_grad]
        shared = {i for (i, r2), (j, r3) in zip(two, three, strict=False) if 3 * r2 != 2 * r3}
        if [i for i, _ in two] != [j for j, _ in three]:
            raise ValueError(
                "the model uses other parameters for three examples than for two: it mixes "
                "examples, as some expert routing does, and cannot be trained per example"
            )
        return [names[i] for i in sorted(shared)]

    def _rows_of_uses(self, examples: Batch) -> list[tuple[int, int]]:
        self._book.open(size(examples))
        with torch.no_grad():
            self._losses(examples)
        return self._book.notes

    def _compare_with_autograd(self, examples: Batch) -> None:
        self._keep_book(examples)
        with torch.no_grad(), self._full_precision():
            together_PN = self._book.squared_norms().sqrt()
        self._book.discard()
        alone_PN = torch.stack(
            [_squares(self._alone(one)[1])[:, 0] for one in split(examples, 1)], dim=1
        ).sqrt()
        _refuse_non_finite(alone_PN)
        _refuse_non_finite(together_PN)
        whole_N = alone_PN.square().sum(0).sqrt()
        tolerance = _tolerance(self._book.used(0))
        wrong_P = ((together_PN - alone_PN.to(together_PN)).abs() > tolerance * whole_N).any(1)
        if wrong_P.any():
            names = [name for name, p in self._model.named_parameters() if p.requires_grad]
            named = ", ".join(names[i] for i in wrong_P.nonzero()[:3, 0].tolist())
            raise ValueError(
                f"an example's gradient in a batch differs from its gradient alone (at {named}): "
                "the model or the loss mixes examples, or draws random numbers other than "
                "dropout's, and cannot be trained per example"
            )


class _NothingAdded(Exception):
    """Memory ran out before the sums were touched: fewer examples may be tried.

    Later it would be too late: some parameters' sums would take the examples twice.
    """


def _weights(clipping: Clipping, squares_PN: Tensor, bound: float) -> tuple[Tensor, int]:
    """Factors of shape (parameters, examples), and how many examples are not clipped."""
    keep = bound * (1 - ROUNDING_MARGIN)
    if isinstance(clipping, PerLayerClipping):
        norm_PN = squares_PN.sqrt()
        weight_PN = (keep / math.sqrt(len(squares_PN)) / norm_PN).clamp(max=1.0)
        return weight_PN, int((weight_PN == 1).all(0).sum())
    norm_N = squares_PN.sum(0).sqrt()
    unclipped = int((norm_N <= keep).sum())
    if isinstance(clipping, AutomaticClipping):
        weight_N = keep / (norm_N + clipping.stability)
    else:
        weight_N = (keep / norm_N).clamp(max=1.0)
    return weight_N.expand_as(squares_PN), unclipped


def _squares(gradients: tuple[Tensor | None, ...]) -> Tensor:
    """Squared norms of one example's gradients, shape (parameters, 1)."""
    like = next(exact(g) for g in gradients if g is not None)
    zero = like.new_zeros(())
    return torch.stack([zero if g is None else exact(g).square().sum() for g in gradients])[:, None]


def _refuse_non_finite(squares_PN: Tensor) -> None:
    if not bool(torch.isfinite(squares_PN.sum(0)).all()):
        raise NonFiniteGradient(
            "a per-example gradient is not finite; nothing was released. Lower the learning "
            "rate, or look for NaN in the model or the data"
        )


def _tolerance(parameter: Tensor) -> float:
    """How far two float paths to one norm may differ, relative to the whole norm."""
    kind = parameter.device.type
    if torch.is_autocast_enabled(kind) or parameter.dtype in {torch.bfloat16, torch.float16}:
        return 0.2
    return 1e-2 if kind == "cuda" else 2e-3  # TensorFloat-32 may be on


def _refuse_written(names: list[str]) -> None:
    if names:
        raise ValueError(
            f"{', '.join(names)}: changes when the model runs, and would carry private data past "
            "clipping and noise; keep no statistics in training, or leave them out of the model's "
            "state, and load the model anew"
        )


def _refuse_hooks(model: nn.Module) -> None:
    """Hooks of parameters would see, or use, the gradients of single examples."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "to_local"):
            continue  # sharded training hooks its own
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"{name} has a gradient hook, which would see gradients of single examples; "
                "remove it"
            )


def _refuse_mixing_layers(model: nn.Module) -> None:
    """Refuse what keeps statistics over examples, frozen or not (Opacus's validators know)."""
    from opacus.validators import ModuleValidator  # takes seconds; accounting needs none

    for name, module in model.named_modules():
        if getattr(module, "max_norm", None) is not None:
            raise ValueError(
                f"{name} renormalises the rows that the data look up (max_norm), which shows in "
                "the weights; set max_norm to None"
            )
        if not isinstance(module, nn.modules.batchnorm._NormBase):
            continue
        validator = ModuleValidator.VALIDATORS.get(type(module))
        if validator is None or validator(module):
            raise ValueError(
                f"{name} is a {type(module).__name__}, whose statistics mix the examples of a "
                "batch; replace it by GroupNorm or LayerNorm"
            )
