"""What one backward pass says of each parameter's per-example gradients.

Shape suffixes: N examples, R rows of an example (tokens, patches), I and O the rows
and columns of a matrix, P entries of a parameter, K looked-up rows, D their width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

FLOPS_PER_BYTE = 8.0
FLOPS_PER_FRESH_BYTE = 40.0
FRESH_BYTES = 32 << 20
"""Operations in the time that it takes to move one byte, or to touch it for the first time: from
``FRESH_BYTES`` on, a C library's allocator takes every tensor fresh from the operating system.
Measured on CPUs; a GPU does more operations in the time of a byte and keeps its memory."""

MAX_SCRATCH_BYTES = 64 << 20
"""What norms of booked matrices may take while they are computed."""


@dataclass
class Outer:
    """A gradient Σ_r left[n, r]ᵀ right[n, r], not multiplied out."""

    left_NRI: Tensor
    right_NRO: Tensor


@dataclass
class Lookup:
    """A gradient that adds ``values[n, r]`` to row ``ids[n, r]``."""

    ids_NR: Tensor
    values_NRD: Tensor


@dataclass
class Account:
    """One parameter's per-example gradients: the sum of all entries.

    Attributes:
        shape: of the parameter.
        samples_NP: gradients multiplied out, flattened; None if there are none.
        outers: matrix gradients still to be multiplied out.
        lookups: gradients of rows.
    """

    shape: torch.Size
    samples_NP: Tensor | None = field(default=None, repr=False)
    outers: list[Outer] = field(default_factory=list, repr=False)
    lookups: list[Lookup] = field(default_factory=list, repr=False)

    @property
    def empty(self) -> bool:
        """Whether the parameter played no part."""
        return self.samples_NP is None and not self.outers and not self.lookups

    def add_samples(self, samples_NP: Tensor) -> None:
        """Enter gradients that are multiplied out; the tensor is ours from here on."""
        if self.samples_NP is None:
            self.samples_NP = samples_NP
        else:
            self.samples_NP += samples_NP

    def add_outer(self, entry: Outer) -> None:
        """Enter a matrix's gradient, multiplied out where that is cheaper."""
        if not self.outers and _worth_multiplying_out(entry):
            self.add_samples(_multiplied(entry).flatten(1))
        else:
            self.outers.append(entry)

    def close(self) -> None:
        """Bring all entries into the fewest forms; before norms and sums."""
        if len(self.outers) > 1:  # uses of one matrix are more rows of one use
            self.outers = [
                Outer(
                    torch.cat([entry.left_NRI for entry in self.outers], dim=1),
                    torch.cat([entry.right_NRO for entry in self.outers], dim=1),
                )
            ]
        if len(self.lookups) > 1:
            self.lookups = [
                Lookup(
                    torch.cat([entry.ids_NR for entry in self.lookups], dim=1),
                    torch.cat([entry.values_NRD for entry in self.lookups], dim=1),
                )
            ]
        if self.samples_NP is None:
            return
        samples_NIO = self.samples_NP.view(len(self.samples_NP), *self.shape)
        for outer in self.outers:
            samples_NIO += _multiplied(outer)
        for lookup in self.lookups:
            example_NR = torch.arange(len(samples_NIO), device=lookup.ids_NR.device)[:, None]
            samples_NIO.index_put_(
                (example_NR.expand_as(lookup.ids_NR), lookup.ids_NR),
                lookup.values_NRD.to(samples_NIO.dtype),
                accumulate=True,
            )
        self.outers, self.lookups = [], []

    def squared_norms(self) -> Tensor:
        """‖g‖² of every example, shape (N,), never less than it is; after :meth:`close`.

        Gradients that are multiplied out have the norm that they have. Where a norm comes from
        inner products, its rounding errors are proportional not to it but to M², with M the sum
        of the norms of the summands, which may cancel each other: a bound on them is added.
        """
        if self.samples_NP is not None:
            return _squares(self.samples_NP)
        parts = [_of_outer(outer) for outer in self.outers]
        parts += [_of_lookup(lookup) for lookup in self.lookups]
        assert parts  # only accounts with entries are asked
        square_N, length_N = (torch.stack(p).sum(0) for p in zip(*parts, strict=True))
        if self.outers and self.lookups:
            square_N = square_N + 2 * _inner_products(self.outers[0], self.lookups[0])
        terms = sum(outer.left_NRI.shape[2] + outer.right_NRO.shape[2] for outer in self.outers)
        return square_N + _rounding(terms, square_N.dtype) * length_N.square()

    def add_weighted(self, weight_N: Tensor, total: Tensor) -> None:
        """``total`` += Σ_n weight[n] · g[n]; after :meth:`close`."""
        if self.samples_NP is not None:
            total.view(-1).add_(weight_N.to(self.samples_NP.dtype) @ self.samples_NP)
        for outer in self.outers:
            left, right = outer.left_NRI, outer.right_NRO
            weight = weight_N.to(left.dtype)[:, None, None]
            if left.shape[2] <= right.shape[2]:  # scale the smaller factor
                left = left * weight
            else:
                right = right * weight
            total.add_(left.flatten(0, 1).T @ right.flatten(0, 1))
        for lookup in self.lookups:
            values = lookup.values_NRD * weight_N.to(lookup.values_NRD.dtype)[:, None, None]
            total.index_add_(0, lookup.ids_NR.flatten(), values.flatten(0, 1).to(total.dtype))


class Book:
    """The accounts of a model's trained parameters, during one backward pass.

    Args:
        parameters: those that are trained, each once.
    """

    def __init__(self, parameters: tuple[nn.Parameter, ...]) -> None:
        self.parameters = parameters
        self.examples = 0
        self._accounts: list[Account] = []
        self._index: dict[int, tuple[int, Tensor]] = {}
        self.notes: list[tuple[int, int]] = []
        for index, parameter in enumerate(parameters):
            self.alias(parameter, index)

    def alias(self, tensor: Tensor, index: int) -> None:
        """Recognise ``tensor`` as the parameter of that index."""
        if id(tensor) not in self._index:
            self._index[id(tensor)] = (index, tensor)  # kept, so that its id stays its own

    def used(self, index: int) -> Tensor:
        """The tensor that stood last for the parameter of that index: itself, or its alias."""
        return [tensor for known, tensor in self._index.values() if known == index][-1]

    def knows(self, value: object) -> bool:
        """Whether ``value`` is a trained parameter."""
        return id(value) in self._index

    def open(self, examples: int) -> None:
        """Begin a backward pass over so many examples."""
        self.examples, self.notes = examples, []
        self._accounts = [Account(p.shape) for p in self.parameters]

    @property
    def is_open(self) -> bool:
        """Whether entries are taken."""
        return self.examples > 0

    def note(self, parameter: Tensor, rows: int) -> None:
        """A use of ``parameter`` whose result has so many leading rows."""
        self.notes.append((self._index[id(parameter)][0], rows))

    def discard(self) -> None:
        """Forget all entries."""
        self.examples = 0
        self._accounts = []

    def index(self, value: Tensor | None) -> int | None:
        """Of a trained parameter; None for any other tensor.

        Operations ask in forward: what they saved may come back as another object.
        """
        return self._index[id(value)][0] if id(value) in self._index else None

    def account(self, index: int) -> Account:
        """Where the entries of that parameter go."""
        return self._accounts[index]

    def by_example(self, rows: Tensor) -> Tensor:
        """(L, ...) with L = examples · k leading rows, as (examples, k, ...).

        Raises:
            ValueError: the rows cannot be shared out evenly.
        """
        if rows.shape[0] % self.examples:
            raise ValueError(
                f"a layer got {rows.shape[0]} rows from {self.examples} examples: it mixes them, "
                "or has another first dimension than the example; freeze its parameters"
            )
        return rows.reshape(self.examples, -1, *rows.shape[1:])

    def squared_norms(self) -> Tensor:
        """Squared norms, shape (parameters, examples), float32 or float64."""
        norms: list[Tensor | None] = []
        for account in self._accounts:
            account.close()
            norms.append(None if account.empty else account.squared_norms())
        like = next((n for n in norms if n is not None), None)
        if like is None:
            return torch.zeros(len(norms), self.examples)
        return torch.stack([torch.zeros_like(like) if n is None else n.to(like) for n in norms])

    def add_weighted(self, weight: Tensor, totals: tuple[Tensor, ...]) -> None:
        """Add the weighted sum of the per-example gradients to ``totals``.

        Args:
            weight: (parameters, examples).
            totals: one a parameter, of its shape.
        """
        for index, (weight_N, total) in enumerate(zip(weight, totals, strict=True)):
            self.add_weighted_of(index, weight_N, total)

    def add_weighted_of(self, index: int, weight_N: Tensor, total: Tensor) -> None:
        """:meth:`add_weighted` for one parameter."""
        if not self._accounts[index].empty:
            self._accounts[index].add_weighted(weight_N, total)


@dataclass(frozen=True)
class _Rows:
    """Looked-up rows with all contributions of an example to a row added up."""

    example_K: Tensor
    sums_KD: Tensor


def _worth_multiplying_out(entry: Outer) -> bool:
    """Whether I·O numbers an example are cheaper than a Gram matrix of its R rows.

    A Gram matrix costs 2·R²·(I + O) operations. Multiplied out, an example takes no more
    operations than its plain gradient, but moves its I·O numbers twice more, through pages
    that are fresh where the whole is large; and they may take at most half again the memory of
    the factors.
    """
    R, I = entry.left_NRI.shape[1:]  # noqa: E741
    O = entry.right_NRO.shape[2]  # noqa: E741
    bytes_each = I * O * entry.left_NRI.element_size()
    moved = 2 * bytes_each * FLOPS_PER_BYTE
    if entry.left_NRI.device.type == "cpu" and bytes_each * len(entry.left_NRI) > FRESH_BYTES:
        moved += bytes_each * FLOPS_PER_FRESH_BYTE
    return moved < 2 * R**2 * (I + O) and I * O <= 1.5 * R * (I + O)


def _multiplied(entry: Outer) -> Tensor:
    return torch.bmm(entry.left_NRI.mT, entry.right_NRO)


def _squares(rows_NP: Tensor) -> Tensor:
    norms_N: Tensor = torch.linalg.vector_norm(rows_NP, dim=1)
    return norms_N.square()


def _rounding(terms: int, dtype: torch.dtype) -> float:
    """Bound on the error of an inner product of so many terms, relative to its factors' norms.

    Errors of n roundings add up like a random walk, to √n units, with all but negligible
    probability (Higham and Mary 2019); four times that, and as much for sums over rows.
    """
    return (4 * math.sqrt(terms) + 64) * torch.finfo(dtype).eps


def _of_outer(entry: Outer) -> tuple[Tensor, Tensor]:
    """‖Σ_r left_rᵀ right_r‖² but for rounding, and Σ_r ‖left_r‖ ‖right_r‖; shapes (N,).

    The square is Σ_rs ⟨left_r, left_s⟩ ⟨right_r, right_s⟩, or that of the product, whichever
    takes less.
    """
    N, R, I = entry.left_NRI.shape  # noqa: E741
    O = entry.right_NRO.shape[2]  # noqa: E741
    gram = R * (I + O) < I * O
    each = (2 * R * R if gram else I * O) * entry.left_NRI.element_size()
    chunk = max(1, MAX_SCRATCH_BYTES // each)
    squares, lengths = [], []
    for start in range(0, N, chunk):
        left, right = entry.left_NRI[start : start + chunk], entry.right_NRO[start : start + chunk]
        if gram:
            product, other = torch.bmm(left, left.mT), torch.bmm(right, right.mT)
            diagonal = product.diagonal(dim1=1, dim2=2) * other.diagonal(dim1=1, dim2=2)
            lengths.append(diagonal.sqrt().sum(1))
            squares.append(product.mul_(other).flatten(1).sum(1))
        else:
            norms = torch.linalg.vector_norm(left, dim=2) * torch.linalg.vector_norm(right, dim=2)
            lengths.append(norms.sum(1))
            squares.append(_squares(_multiplied(Outer(left, right)).flatten(1)))
    return torch.cat(squares), torch.cat(lengths)


def _of_lookup(entry: Lookup) -> tuple[Tensor, Tensor]:
    """As :func:`_of_outer`: the squared norm, and the sum of the norms of the values."""
    rows = _grouped(entry)
    square_N = torch.zeros(
        len(entry.ids_NR), dtype=rows.sums_KD.dtype, device=rows.sums_KD.device
    ).index_add_(0, rows.example_K, rows.sums_KD.square().sum(1))
    length_N: Tensor = torch.linalg.vector_norm(entry.values_NRD, dim=2).sum(1)
    return square_N, length_N


def _grouped(entry: Lookup) -> _Rows:
    N = len(entry.ids_NR)
    width = entry.values_NRD.shape[2]
    height = int(entry.ids_NR.max()) + 1 if entry.ids_NR.numel() else 1
    example_NR = torch.arange(N, device=entry.ids_NR.device)[:, None]
    keys, place = torch.unique(example_NR * height + entry.ids_NR, return_inverse=True)
    sums_KD = torch.zeros(
        len(keys), width, dtype=entry.values_NRD.dtype, device=entry.values_NRD.device
    ).index_add_(0, place.flatten(), entry.values_NRD.flatten(0, 1))
    return _Rows(keys // height, sums_KD)


def _inner_products(outer: Outer, lookup: Lookup) -> Tensor:
    """⟨Σ_s left_sᵀ right_s, Σ_t e(id_t) value_tᵀ⟩ = Σ_ts left_s[id_t] ⟨right_s, value_t⟩."""
    N, R = outer.left_NRI.shape[:2]
    T = lookup.ids_NR.shape[1]
    chunk = max(1, MAX_SCRATCH_BYTES // (2 * R * T * outer.left_NRI.element_size()))
    products = []
    for start in range(0, N, chunk):
        part = slice(start, start + chunk)
        left_NRI, ids_NT = outer.left_NRI[part], lookup.ids_NR[part]
        at_ids_NRT = left_NRI.gather(2, ids_NT[:, None, :].expand(-1, R, -1))
        values_NTD = lookup.values_NRD[part].to(outer.right_NRO.dtype)
        at_ids_NRT *= torch.bmm(outer.right_NRO[part], values_NTD.mT)
        products.append(at_ids_NRT.flatten(1).sum(1))
    return torch.cat(products)
