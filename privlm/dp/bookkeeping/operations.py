# ruff: noqa: D102  (forward and backward are documented by their class)
"""The operations that use a trained parameter, each with a backward that keeps the book.

``torch.autograd.Function``s: forward computes what torch computes; backward returns the
gradient of the input, enters the parameter's into the book, and returns None for it, so
that autograd never forms a weight gradient. Arguments after the tensors: the book and
what the operation was called with.

Shape suffixes: L leading rows (a multiple of N examples), R rows of an example, I inputs,
O outputs, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F
from torch.nn.grad import conv1d_input, conv2d_input

from privlm.dp.bookkeeping.book import Book, Lookup, Outer


def exact(value: Tensor) -> Tensor:
    """In float32 at least, and without a graph: as norms and sums are taken."""
    value = value.detach()
    return value.float() if value.dtype in {torch.bfloat16, torch.float16} else value


def run(operation: type[Function], *arguments: Any) -> Tensor:
    """Apply an operation."""
    out: Tensor = operation.apply(*arguments)
    return out


def in_autocast(*values: Tensor) -> tuple[Tensor, ...]:
    """As the matrix product would see them under autocast."""
    kind = values[0].device.type
    if not torch.is_autocast_enabled(kind):
        return values
    dtype = torch.get_autocast_dtype(kind)
    return tuple(v.to(dtype) if v.dtype == torch.float32 else v for v in values)


class Matrix(Function):
    """y = x Wᵀ + b, or with ``in_out`` y = x W + b."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, book: Book, in_out: bool
    ) -> Tensor:
        ctx.book, ctx.in_out, ctx.given = book, in_out, x.dtype
        ctx.weight, ctx.bias = book.index(weight), book.index(bias)
        x, matrix, *offset = in_autocast(x, weight, *(() if bias is None else (bias,)))
        ctx.save_for_backward(x, weight)
        return F.linear(x, matrix.T if in_out else matrix, *offset)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = gradients
        x, weight = ctx.saved_tensors
        book: Book = ctx.book
        grads_NRO = exact(book.by_example(grad).flatten(1, -2))
        if ctx.weight is not None:
            inputs_NRI = exact(book.by_example(x).flatten(1, -2))
            factors = (inputs_NRI, grads_NRO) if ctx.in_out else (grads_NRO, inputs_NRI)
            book.account(ctx.weight).add_outer(Outer(*factors))
        if ctx.bias is not None:
            book.account(ctx.bias).add_samples(grads_NRO.sum(1))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        matrix = weight.to(grad.dtype)
        grad_x = torch.matmul(grad, matrix.T if ctx.in_out else matrix)
        return grad_x.to(ctx.given), None, None, None, None


class Rows(Function):
    """y[r] = W[ids[r]]; one row of ids for all examples becomes one for each of them."""

    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, weight: Tensor, book: Book, padding_idx: int | None
    ) -> Tensor:
        ctx.book, ctx.weight, ctx.padding_idx = book, book.index(weight), padding_idx
        ctx.save_for_backward(ids)
        out = F.embedding(ids, weight)
        if ids.shape[0] == 1 and book.examples > 1:
            return out.expand(book.examples, *out.shape[1:])
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None, None]:
        (grad,) = gradients
        (ids,) = ctx.saved_tensors
        book: Book = ctx.book
        ids = ids.expand(grad.shape[:-1])
        ids_NR = book.by_example(ids).flatten(1)
        values_NRD = exact(book.by_example(grad).reshape(*ids_NR.shape, -1))
        if ctx.padding_idx is not None:
            values_NRD = values_NRD.masked_fill((ids_NR == ctx.padding_idx)[..., None], 0)
        book.account(ctx.weight).lookups.append(Lookup(ids_NR, values_NRD))
        return None, None, None, None


class Scaling(Function):
    """y = x ⊙ w, where w broadcasts over rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, book: Book) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.book, ctx.weight = book, book.index(weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        (grad,) = gradients
        x, weight = ctx.saved_tensors
        enter_elementwise(ctx.book, ctx.weight, exact(grad) * exact(x))
        if not ctx.needs_input_grad[0]:
            return None, None, None
        return (grad * weight).sum_to_size(x.shape).to(x.dtype), None, None


class Shift(Function):
    """y = x + sign · w, where w broadcasts over rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, book: Book, sign: float) -> Tensor:
        ctx.book, ctx.weight, ctx.sign = book, book.index(weight), sign
        ctx.given, ctx.shape = x.dtype, x.shape
        if x.dtype != weight.dtype and torch.is_autocast_enabled(x.device.type):
            weight = weight.to(x.dtype)  # a bias that autocast would have cast with its matrix
        return x + weight if sign == 1 else torch.add(x, weight, alpha=sign)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        (grad,) = gradients
        enter_elementwise(ctx.book, ctx.weight, exact(grad), ctx.sign)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        return grad.sum_to_size(ctx.shape).to(ctx.given), None, None, None


class Spread(Function):
    """y = w, expanded over examples and rows."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, book: Book, shape: tuple[int, ...]) -> Tensor:
        ctx.book, ctx.weight = book, book.index(weight)
        return weight.expand(shape).clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        (grad,) = gradients
        enter_elementwise(ctx.book, ctx.weight, exact(grad))
        return None, None, None


class LayerNorm(Function):
    """y = x̂ ⊙ w + b with x̂ = (x − mean) / std over the last dimensions."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        book: Book,
        shape: list[int],
        eps: float,
    ) -> Tensor:
        if x.dtype in {torch.bfloat16, torch.float16}:
            x = x.to(weight.dtype)
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.weight, ctx.bias = book.index(weight), book.index(bias)
        ctx.book, ctx.shape = book, shape
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = gradients
        x, mean, rstd, weight, bias = ctx.saved_tensors
        book: Book = ctx.book
        if ctx.weight is not None:
            normed = exact(x).sub(mean).mul_(rstd)
            enter_elementwise(book, ctx.weight, normed.mul_(grad))
        if ctx.bias is not None:
            enter_elementwise(book, ctx.bias, exact(grad))
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.aten.native_layer_norm_backward(
                grad, x, ctx.shape, mean, rstd, weight, bias, [True, False, False]
            )[0]
        return grad_x, None, None, None, None, None


class RmsNorm(Function):
    """y = x̂ ⊙ w with x̂ = x / √(mean x² + eps) over the last dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, book: Book, eps: float) -> Tensor:
        rstd = exact(x).square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, rstd, weight)
        ctx.book, ctx.weight = book, book.index(weight)
        return (exact(x) * rstd).mul_(weight).to(torch.promote_types(x.dtype, weight.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        (grad,) = gradients
        x, rstd, weight = ctx.saved_tensors
        grad = exact(grad)
        normed = exact(x) * rstd
        enter_elementwise(ctx.book, ctx.weight, normed * grad)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        grad = grad * weight
        along = (grad * normed).mean(-1, keepdim=True)
        return grad.sub_(normed.mul_(along)).mul_(rstd).to(x.dtype), None, None, None


class Convolution(Function):
    """y = x ∗ W over one or two dimensions, without bias; ``settings``: stride, padding, dilation.

    As a matrix product of the patches, which are unfolded in backward.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, book: Book, settings: tuple[Any, Any, Any]
    ) -> Tensor:
        given = x.dtype
        x, cast = in_autocast(x, weight)
        ctx.save_for_backward(x, weight)
        ctx.book, ctx.weight = book, book.index(weight)
        ctx.settings, ctx.given = settings, given
        convolve = F.conv1d if x.dim() == 3 else F.conv2d
        return convolve(x, cast, None, *settings)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        (grad,) = gradients
        x, weight = ctx.saved_tensors
        book: Book = ctx.book
        stride, padding, dilation = ctx.settings
        patches_LPR = _patches(exact(x), weight.shape[2:], stride, padding, dilation)
        patches_NRP = book.by_example(patches_LPR.mT).flatten(1, 2)
        grads_NRO = book.by_example(exact(grad).flatten(2).mT).flatten(1, 2)
        account = book.account(ctx.weight)
        O, P = weight.shape[0], weight[0].numel()  # noqa: E741
        account.add_samples(torch.bmm(grads_NRO.mT, patches_NRP).view(book.examples, O * P))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        cast = weight.to(grad.dtype)
        along: Any = conv1d_input if x.dim() == 3 else conv2d_input
        grad_x: Tensor = along(x.shape, cast, grad, *ctx.settings)
        return grad_x.to(ctx.given), None, None, None


class ChannelBias(Function):
    """y[l, o, ...] = x[l, o, ...] + b[o]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, book: Book) -> Tensor:
        ctx.book, ctx.bias = book, book.index(bias)
        return x + bias.to(x.dtype).view(-1, *(1,) * (x.dim() - 2))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = gradients
        book: Book = ctx.book
        sums_LO = exact(grad).flatten(2).sum(2)
        book.account(ctx.bias).add_samples(book.by_example(sums_LO).sum(1))
        return grad, None, None


def enter_elementwise(book: Book, index: int, grads: Tensor, sign: float = 1.0) -> None:
    """Enter a gradient of which every element belongs to one element of the parameter.

    Args:
        book: where to.
        index: of the parameter, which broadcasts to the shape of ``grads``.
        grads: (L, ...).
        sign: to multiply with.

    Raises:
        ValueError: the first dimension, where examples are told apart, is the parameter's.
    """
    account = book.account(index)
    if grads.dim() == 0 or (len(account.shape) == grads.dim() and account.shape[0] != 1):
        raise ValueError("a parameter spans the dimension of the examples; freeze it")
    by_example = book.by_example(grads)  # (N, k, ...): one dimension more than grads
    aligned = (1,) * (by_example.dim() - len(account.shape)) + account.shape
    summed = tuple(
        d for d in range(1, by_example.dim()) if aligned[d] == 1 and by_example.shape[d] != 1
    )
    sums = by_example.sum(summed) if summed else by_example.clone()
    sums = sums.reshape(book.examples, account.shape.numel())
    account.add_samples(sums if sign == 1 else sums.mul_(sign))


def _patches(x: Tensor, kernel: torch.Size, stride: Any, padding: Any, dilation: Any) -> Tensor:
    """(L, C · kernel, positions)."""
    if x.dim() == 3:  # one dimension is two, the first of them of size one
        x, kernel = x[:, :, None], torch.Size((1, *kernel))
        stride, padding, dilation = (
            (1, *_tuple(stride)),
            (0, *_tuple(padding)),
            (1, *_tuple(dilation)),
        )
    return F.unfold(x, tuple(kernel), dilation, padding, stride)


def _tuple(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)
