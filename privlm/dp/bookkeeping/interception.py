"""Which call uses a trained parameter, and what takes its place.

:class:`Interception` is a torch function mode: while a module that owns trained
parameters runs, every torch function that gets one of them comes by here. Known ones
become a :mod:`~privlm.dp.bookkeeping.operations`; what is not known is refused, so
that no use of a parameter goes uncounted.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from privlm.dp.bookkeeping import operations
from privlm.dp.bookkeeping.book import Book
from privlm.dp.bookkeeping.operations import run

Arguments = tuple[Any, ...]
Keywords = Mapping[str, Any]


class UnknownUse(Exception):
    """A trained parameter is used by an operation without a rule for per-example gradients."""

    def __init__(self, module: nn.Module, function: str) -> None:
        super().__init__(f"{type(module).__name__} uses a parameter in {function}")
        self.module = module
        self.function = function


class Interception(TorchFunctionMode):
    """Replace the uses of trained parameters while modules run.

    Attributes:
        resting: while true, nothing is replaced.
    """

    def __init__(self, book: Book) -> None:
        super().__init__()
        self._book = book
        self._module: nn.Module | None = None
        self.resting = False

    @contextlib.contextmanager
    def during(self, module: nn.Module) -> Iterator[None]:
        """While ``module`` runs; within one that runs it, an unknown use is still its own."""
        before, self._module = self._module, module
        try:
            with self if before is None else contextlib.nullcontext():
                yield
        finally:
            self._module = before

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Arguments = (),
        kwargs: Keywords | None = None,
    ) -> Any:
        """Called by torch for every one of its functions."""
        kwargs = kwargs or {}
        used = [v for v in _flat((*args, *kwargs.values())) if self._book.knows(v)]
        if not used or self.resting:
            return func(*args, **kwargs)
        rule = _RULES.get(func)
        out = NotImplemented if rule is None else rule(self._book, *args, **kwargs)
        if out is NotImplemented:
            out = func(*args, **kwargs)
            if _differentiable(out) or (isinstance(out, Tensor) and not torch.is_grad_enabled()):
                assert self._module is not None  # or this mode would not be on
                raise UnknownUse(self._module, getattr(func, "__name__", str(func)))
            return out
        for parameter in used:
            self._book.note(parameter, out.shape[0])
        return out


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from value
        else:
            yield value


def _differentiable(out: Any) -> bool:
    if isinstance(out, Tensor):
        return out.requires_grad
    return isinstance(out, list | tuple) and any(_differentiable(inner) for inner in out)


def _linear(book: Book, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if book.knows(input):
        return NotImplemented
    return run(operations.Matrix, input, weight, bias, book, False)


def _addmm(
    book: Book, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Any:
    if book.knows(mat1) or beta != 1 or alpha != 1 or input.dim() != 1:
        return NotImplemented
    return run(operations.Matrix, mat1, mat2, input, book, True)


def _matmul(book: Book, input: Tensor, other: Tensor) -> Any:
    if book.knows(input) or other.dim() != 2 or input.dim() < 2:
        return NotImplemented
    return run(operations.Matrix, input, other, None, book, True)


def _embedding(
    book: Book,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if max_norm is not None or scale_grad_by_freq or sparse:
        return NotImplemented
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    return run(operations.Rows, input, weight, book, padding_idx)


def _layer_norm(
    book: Book,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    if weight is None:
        return NotImplemented
    return run(operations.LayerNorm, input, weight, bias, book, list(normalized_shape), eps)


def _rms_norm(
    book: Book,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    if weight is None or len(normalized_shape) != 1:
        return NotImplemented
    return run(
        operations.RmsNorm,
        input,
        weight,
        book,
        torch.finfo(input.dtype).eps if eps is None else eps,
    )


def _convolution(
    book: Book,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    if groups != 1 or input.dim() != weight.dim():
        return NotImplemented
    if padding == "same":  # stride is one: torch refuses any other
        steps = (dilation,) * len(weight.shape[2:]) if isinstance(dilation, int) else dilation
        spans = [d * (k - 1) for d, k in zip(steps, weight.shape[2:], strict=True)]
        input = F.pad(input, [n for s in reversed(spans) for n in (s // 2, s - s // 2)])
    if isinstance(padding, str):
        padding = 0
    if book.knows(weight):
        out = run(operations.Convolution, input, weight, book, (stride, padding, dilation))
    else:
        convolve = F.conv1d if input.dim() == 3 else F.conv2d
        out = convolve(input, weight, None, stride, padding, dilation)
    if bias is None:
        return out
    shaped = bias.view(-1, *(1,) * (weight.dim() - 2))
    if not book.knows(bias):
        return out + shaped
    return run(operations.ChannelBias, out, bias, book)


def _multiply(book: Book, input: Any, other: Any) -> Any:
    x, weight = (other, input) if book.knows(input) else (input, other)
    if not isinstance(x, Tensor) or book.knows(x):
        return NotImplemented
    return run(operations.Scaling, x, weight, book)


def _add(book: Book, input: Any, other: Any, *, alpha: float = 1) -> Any:
    if alpha != 1:
        return NotImplemented
    x, weight = (other, input) if book.knows(input) else (input, other)
    if not isinstance(x, Tensor) or book.knows(x):
        return NotImplemented
    return run(operations.Shift, x, weight, book, 1.0)


def _subtract(book: Book, input: Any, other: Any, *, alpha: float = 1) -> Any:
    if alpha != 1 or book.knows(input) or not isinstance(input, Tensor):
        return NotImplemented
    return run(operations.Shift, input, other, book, -1.0)


def _expand(book: Book, input: Tensor, *size: Any) -> Any:
    shape = tuple(size[0]) if len(size) == 1 and isinstance(size[0], Sequence) else size
    known = (1,) * (len(shape) - input.dim()) + input.shape
    shape = tuple(k if s == -1 else int(s) for s, k in zip(shape, known, strict=True))
    if shape[0] != book.examples or (known[0] != 1 and len(shape) == input.dim()):
        return NotImplemented
    return run(operations.Spread, input, book, shape)


_RULES: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.mm: _matmul,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    F.conv1d: _convolution,
    F.conv2d: _convolution,
    torch.mul: _multiply,
    Tensor.mul: _multiply,
    Tensor.__mul__: _multiply,
    Tensor.__rmul__: _multiply,
    operator.mul: _multiply,
    torch.add: _add,
    Tensor.add: _add,
    Tensor.__add__: _add,
    Tensor.__radd__: _add,
    torch.sub: _subtract,
    Tensor.sub: _subtract,
    Tensor.__sub__: _subtract,
    Tensor.expand: _expand,
    torch.broadcast_to: _expand,
}
