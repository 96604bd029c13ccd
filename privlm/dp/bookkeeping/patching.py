"""A model whose modules keep a book while they run, and are ordinary again afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.func import functional_call, vjp, vmap

from privlm.dp.bookkeeping.book import Book
from privlm.dp.bookkeeping.interception import Interception
from privlm.dp.bookkeeping.operations import exact, run

Forward = Callable[..., Any]


@dataclass(frozen=True)
class _Patch:
    """What a module's own ``forward`` attribute was; None if it had only its class's."""

    module: nn.Module
    before: Forward | None


class Patches:
    """Makes every module that owns trained parameters of ``model`` keep ``book``.

    Parameters are recognised by module and name whenever a module runs, so that those
    that sharded training puts in their place for the time being are recognised too.
    """

    def __init__(self, model: nn.Module, book: Book) -> None:
        self._book = book
        self._patched: dict[nn.Module, _Patch] = {}
        self._owned: dict[nn.Module, dict[str, int]] = {}
        self._whole: set[nn.Module] = set()
        self._interception = Interception(book)
        index = {id(p): i for i, p in enumerate(book.parameters)}
        for module in model.modules():
            owned = {
                name: index[id(p)]
                for name, p in module.named_parameters(recurse=False)
                if p is not None and id(p) in index
            }
            if owned:
                self._patch(module, owned)

    def remove(self) -> None:
        """Make all modules ordinary again."""
        for patch in self._patched.values():
            if patch.before is None:
                del patch.module.forward
            else:
                patch.module.forward = patch.before
        self._patched.clear()

    def fall_back(self, module: nn.Module) -> None:
        """From now on, treat ``module`` and what is in it as one function (functorch).

        Raises:
            ValueError: it has been tried, or cannot be: the module drops out at random.
        """
        kind = type(module).__name__
        if module in self._whole:
            raise ValueError(f"functorch knows no per-example gradients of {kind} either")
        if any(isinstance(m, nn.Dropout) and m.p > 0 for m in module.modules()):
            raise ValueError(f"{kind} has no rule for per-example gradients and drops out")
        self._whole.add(module)

    def _patch(self, module: nn.Module, owned: dict[str, int]) -> None:
        self._owned[module] = owned
        before = module.__dict__.get("forward")
        original: Forward = module.forward
        book = self._book

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not book.is_open or self._interception.resting:
                return original(*args, **kwargs)
            self._recognise(module)
            if module in self._whole:
                for inner in module.modules():
                    self._recognise(inner)
                return self._run_whole(module, args, kwargs)
            with self._interception.during(module):
                return original(*args, **kwargs)

        self._patched[module] = _Patch(module, before)
        module.forward = forward

    def _recognise(self, module: nn.Module) -> None:
        for name, index in self._owned.get(module, {}).items():
            self._book.alias(getattr(module, name), index)

    def _run_whole(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        trained = {n: p for n, p in module.named_parameters() if self._book.knows(p)}
        tensors = [a for a in args if isinstance(a, Tensor)]
        named = [name for name, value in kwargs.items() if isinstance(value, Tensor)]
        if named:
            raise ValueError(
                f"{type(module).__name__} has no rule for per-example gradients and takes "
                f"{', '.join(named)} by name, which may hold examples; pass it by position"
            )

        def call(parameters: dict[str, Tensor], *values: Tensor) -> Tensor:
            rest = iter(values)
            given = tuple(next(rest) if isinstance(a, Tensor) else a for a in args)
            before, self._interception.resting = self._interception.resting, True
            try:
                out = functional_call(module, parameters, given, kwargs)
            finally:
                self._interception.resting = before
            if not isinstance(out, Tensor):
                raise ValueError(  # noqa: TRY004  (the model is at fault, not a caller)
                    f"{type(module).__name__} returns more than one tensor"
                )
            return out

        return run(_Whole, call, self._book, trained, *tensors, *trained.values())


class _Whole(Function):
    """A module as a function of its parameters and inputs, whose vjp is taken per example."""

    @staticmethod
    def forward(
        ctx: Any, call: Forward, book: Book, trained: dict[str, Tensor], *tensors: Tensor
    ) -> Tensor:
        inputs = tensors[: len(tensors) - len(trained)]
        ctx.save_for_backward(*inputs)
        ctx.call, ctx.book, ctx.trained = call, book, trained
        ctx.indices = {name: book.index(p) for name, p in trained.items()}
        out: Tensor = call(trained, *inputs)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = gradients
        inputs, book, trained = ctx.saved_tensors, ctx.book, ctx.trained
        wanted = [i for i, x in enumerate(inputs) if x.is_floating_point()]

        def one(grad: Tensor, *values: Tensor) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
            def of_floats(parameters: dict[str, Tensor], *floats: Tensor) -> Tensor:
                filled = list(values)
                for i, value in zip(wanted, floats, strict=True):
                    filled[i] = value
                out: Tensor = ctx.call(parameters, *filled)
                return out

            pull: Forward = vjp(of_floats, trained, *(values[i] for i in wanted))[1]
            of_parameters, *of_inputs = pull(grad)
            return of_parameters, tuple(of_inputs)

        with torch.enable_grad():
            of_parameters, of_inputs = vmap(one)(
                book.by_example(grad), *(book.by_example(x) for x in inputs)
            )
        for name, index in ctx.indices.items():
            book.account(index).add_samples(exact(of_parameters[name]).flatten(1))
        out: list[Tensor | None] = [None] * len(inputs)
        for i, value in zip(wanted, of_inputs, strict=True):
            out[i] = value.flatten(0, 1)
        return None, None, None, *out, *(None for _ in trained)
