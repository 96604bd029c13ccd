"""Arithmetic over Z_2^32, Z_2^64 and the prime field Z_p with p = 2^61 - 1.

Elements of Z_2^k are torch int32 or int64 tensors that wrap around; elements of Z_p are NumPy
uint64 arrays below p. `Ring` is what they have in common, so that additive sharing, masks and
fixed-point numbers work over any of them. Bytes are little-endian, one fixed width per element.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from protocols.errors import MalformedMessage, NonCanonicalElement
from protocols.randomness import Shape, Stream

A = TypeVar("A")
FieldArray = NDArray[np.uint64]

# Elements handled at a time by the passes over long vectors: 128 KiB of Z_2^64 stays in cache, and
# is below the size from which torch wakes its threads, whose spinning costs more than it gains.
BLOCK = 1 << 14


class Ring(ABC, Generic[A]):
    """The integers modulo `modulus`, `element_bytes` bytes each; `A` is the array that holds them.

    Methods whose name ends in an underscore overwrite their first argument.
    """

    name: str
    modulus: int
    element_bytes: int

    def __repr__(self) -> str:
        return self.name

    @property
    def largest_integer(self) -> int:
        """The largest m for which -m … m are distinct elements."""
        return (self.modulus - 1) // 2

    @abstractmethod
    def zeros(self, shape: Shape) -> A:
        """Return the zero vector."""

    @abstractmethod
    def empty(self, shape: Shape) -> A:
        """Allocate a vector to be overwritten."""

    @abstractmethod
    def random(self, shape: Shape, stream: Stream) -> A:
        """Draw uniform elements."""

    @abstractmethod
    def check(self, x: A) -> tuple[int, ...]:
        """Return the shape of `x`; raise ValueError unless it holds elements of this ring."""

    @abstractmethod
    def add(self, x: A, y: A) -> A:
        """Return x + y."""

    @abstractmethod
    def sub(self, x: A, y: A) -> A:
        """Return x - y."""

    def neg(self, x: A) -> A:
        """Return -x."""
        return self.sub(self.zeros(self.check(x)), x)

    @abstractmethod
    def mul(self, x: A, y: A) -> A:
        """Return the elementwise product."""

    @abstractmethod
    def sum(self, x: A) -> A:
        """Sum over the first dimension: (n, ...) -> (...)."""

    @abstractmethod
    def add_(self, x: A, y: A) -> None:
        """Add y to x in place."""

    @abstractmethod
    def sub_(self, x: A, y: A) -> None:
        """Subtract y from x in place."""

    @abstractmethod
    def copy_(self, x: A, y: A) -> None:
        """Overwrite x with y."""

    @abstractmethod
    def set_integers_(self, x: A, integers: torch.Tensor) -> None:
        """Overwrite x with integers, which may be whole floats, below 2^62 in magnitude."""

    @abstractmethod
    def equal(self, x: A, y: A) -> bool:
        """Tell whether x and y have one shape and the same elements."""

    @abstractmethod
    def from_integers(self, integers: torch.Tensor) -> A:
        """Reduce torch int64 integers modulo `modulus`; may share their memory."""

    @abstractmethod
    def to_integers(self, x: A) -> torch.Tensor:
        """Return the representatives nearest zero as torch int64; may share memory with x.

        They lie in [-m, m] with m = `largest_integer` (and -2^(k-1) in Z_2^k).
        """

    @abstractmethod
    def to_bytes(self, x: A) -> bytes:
        """Encode as little-endian bytes, `element_bytes` per element."""

    @abstractmethod
    def from_bytes(self, data: bytes, shape: Shape) -> A:
        """Decode the bytes of exactly `shape` elements.

        Raises:
            MalformedMessage: the number of bytes does not match.
            NonCanonicalElement: an encoded integer is not below the modulus.

        """

    @abstractmethod
    def _flat(self, x: A) -> A:
        """View contiguous x as one dimension."""

    @abstractmethod
    def _slice(self, x_N: A, start: int, stop: int) -> A:
        """View a range of a vector."""

    def blocks(self, x: A, size: int = BLOCK) -> Iterator[A]:
        """Yield flat views of contiguous `x`, at most `size` elements each, in memory order."""
        count = math.prod(self.check(x))
        x_N = self._flat(x)
        for start in range(0, count, size):
            yield self._slice(x_N, start, min(start + size, count))

    def add_mask_(self, x: A, stream: Stream) -> None:
        """Add `random(shape of x, stream)` to contiguous x in place, in constant memory."""
        for block in self.blocks(x):
            self.add_(block, self.random(self.check(block), stream))

    def sub_mask_(self, x: A, stream: Stream) -> None:
        """Subtract what `add_mask_` adds."""
        for block in self.blocks(x):
            self.sub_(block, self.random(self.check(block), stream))

    def _check_length(self, data: bytes, shape: Shape) -> None:
        expected = math.prod(shape if isinstance(shape, tuple) else (shape,)) * self.element_bytes
        if len(data) != expected:
            raise MalformedMessage(f"expected {expected} bytes of {self}, got {len(data)}")


class PowerOfTwoRing(Ring[torch.Tensor]):
    """Z_2^k for k = 32 or 64 as torch integers in two's complement."""

    def __init__(self, bits: int) -> None:
        if bits not in (32, 64):
            raise ValueError(f"the ring has 32 or 64 bits, not {bits}")
        self.name = f"Z_2^{bits}"
        self.bits = bits
        self.modulus = 1 << bits
        self.element_bytes = bits // 8
        self.dtype = torch.int32 if bits == 32 else torch.int64

    def zeros(self, shape: Shape) -> torch.Tensor:
        """Return the zero vector."""
        return torch.zeros(shape, dtype=self.dtype)

    def empty(self, shape: Shape) -> torch.Tensor:
        """Allocate a vector to be overwritten."""
        return torch.empty(shape, dtype=self.dtype)

    def random(self, shape: Shape, stream: Stream) -> torch.Tensor:
        """Draw uniform elements."""
        return stream.ring_elements(self.bits, shape)

    def check(self, x: torch.Tensor) -> tuple[int, ...]:
        """Return the shape of `x`; raise ValueError unless it holds elements of this ring."""
        if x.dtype != self.dtype:
            raise ValueError(f"elements of {self} are {self.dtype}, not {x.dtype}")
        return tuple(x.shape)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return x + y."""
        return x + y

    def sub(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return x - y."""
        return x - y

    def mul(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the elementwise product."""
        return x * y

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the first dimension."""
        return x.sum(dim=0, dtype=self.dtype)

    def add_(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add y to x in place."""
        x.add_(y)

    def sub_(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Subtract y from x in place."""
        x.sub_(y)

    def copy_(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Overwrite x with y."""
        x.copy_(y)

    def set_integers_(self, x: torch.Tensor, integers: torch.Tensor) -> None:
        """Overwrite x with integers modulo 2^k."""
        x.copy_(integers if integers.dtype == self.dtype else integers.to(torch.int64))

    def equal(self, x: torch.Tensor, y: torch.Tensor) -> bool:
        """Tell whether x and y have one shape and the same elements."""
        return torch.equal(x, y)

    def from_integers(self, integers: torch.Tensor) -> torch.Tensor:
        """Reduce torch int64 integers modulo 2^k."""
        return integers.to(self.dtype)

    def to_integers(self, x: torch.Tensor) -> torch.Tensor:
        """Return the representatives in [-2^(k-1), 2^(k-1)) as torch int64."""
        return x.to(torch.int64)

    def to_bytes(self, x: torch.Tensor) -> bytes:
        """Encode as little-endian bytes."""
        self.check(x)
        return x.contiguous().numpy().tobytes()

    def from_bytes(self, data: bytes, shape: Shape) -> torch.Tensor:
        """Decode the bytes of exactly `shape` elements; all such bytes are canonical."""
        self._check_length(data, shape)
        integers = np.frombuffer(data, np.int32 if self.bits == 32 else np.int64)
        return torch.from_numpy(integers.copy()).reshape(shape)

    def _flat(self, x: torch.Tensor) -> torch.Tensor:
        if not x.is_contiguous():
            raise ValueError("in-place passes need a contiguous tensor")
        return x.view(-1)

    def _slice(self, x_N: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        return x_N[start:stop]


_P = np.uint64((1 << 61) - 1)
_LOW_29, _LOW_32 = np.uint64((1 << 29) - 1), np.uint64((1 << 32) - 1)
_3, _29, _32, _61 = (np.uint64(bits) for bits in (3, 29, 32, 61))


class MersenneField(Ring[FieldArray]):
    """The field Z_p with p = 2^61 - 1 as NumPy uint64 below p.

    Since 2^61 ≡ 1, reduction is a shift and an addition; products go through 32-bit halves.
    """

    name = "Z_(2^61-1)"
    modulus = (1 << 61) - 1
    element_bytes = 8

    def zeros(self, shape: Shape) -> FieldArray:
        """Return the zero vector."""
        return np.zeros(shape, np.uint64)

    def empty(self, shape: Shape) -> FieldArray:
        """Allocate a vector to be overwritten."""
        return np.empty(shape, np.uint64)

    def random(self, shape: Shape, stream: Stream) -> FieldArray:
        """Draw uniform elements."""
        return stream.field_elements(self.modulus, shape)

    def check(self, x: FieldArray) -> tuple[int, ...]:
        """Return the shape of `x`; raise ValueError unless it is uint64 (the range is trusted)."""
        if x.dtype != np.uint64:
            raise ValueError(f"elements of {self} are uint64, not {x.dtype}")
        return x.shape

    def add(self, x: FieldArray, y: FieldArray) -> FieldArray:
        """Return x + y."""
        return _below_p(np.asarray(x) + y)

    def sub(self, x: FieldArray, y: FieldArray) -> FieldArray:
        """Return x - y."""
        return _below_p(np.asarray(x) + (_P - np.asarray(y)))

    def mul(self, x: FieldArray, y: FieldArray) -> FieldArray:
        """Return the elementwise product.

        With x = 2^32 x₁ + x₀ and x₁ < 2^29: x₁y₁·2^64 ≡ 8x₁y₁ < 2^61; the middle term
        m = x₁y₀ + x₀y₁ < 2^62 gives m·2^32 ≡ ⌊m/2^29⌋ + (m mod 2^29)·2^32; x₀y₀ < 2^64. The four
        reduced parts sum to less than 2^63.
        """
        x, y = np.asarray(x), np.asarray(y)
        x1, x0, y1, y0 = x >> _32, x & _LOW_32, y >> _32, y & _LOW_32
        middle, low = x1 * y0 + x0 * y1, x0 * y0
        total = ((x1 * y1) << _3) + (middle >> _29) + ((middle & _LOW_29) << _32)
        total += (low & _P) + (low >> _61)
        return _below_p((total & _P) + (total >> _61))

    def power(self, x: FieldArray, exponent: int) -> FieldArray:
        """Return x to the power of `exponent` >= 0, elementwise, by square and multiply."""
        if exponent < 0:
            raise ValueError(f"exponent must not be negative, got {exponent}")
        result = np.ones_like(x)
        for digit in f"{exponent:b}":
            result = self.mul(result, result)
            if digit == "1":
                result = self.mul(result, x)
        return result

    def inverse(self, x: FieldArray) -> FieldArray:
        """Return 1/x = x^(p-2) elementwise (Fermat); raise ZeroDivisionError if any x is 0."""
        if (np.asarray(x) == 0).any():
            raise ZeroDivisionError("zero has no inverse")
        return self.power(x, self.modulus - 2)

    def sum(self, x: FieldArray) -> FieldArray:
        """Sum over the first dimension, of up to 2^31 elements; 32-bit halves cannot overflow."""
        low = np.asarray((x & _LOW_32).sum(axis=0, dtype=np.uint64))
        high = np.asarray((x >> _32).sum(axis=0, dtype=np.uint64))
        low = _below_p((low & _P) + (low >> _61))
        return self.add(low, self.mul(high, np.uint64(1 << 32) * np.ones_like(high)))

    def add_(self, x: FieldArray, y: FieldArray) -> None:
        """Add y to x in place."""
        x += y
        np.minimum(x, x - _P, out=x)

    def sub_(self, x: FieldArray, y: FieldArray) -> None:
        """Subtract y from x in place."""
        x += _P - y
        np.minimum(x, x - _P, out=x)

    def copy_(self, x: FieldArray, y: FieldArray) -> None:
        """Overwrite x with y."""
        x[...] = y

    def set_integers_(self, x: FieldArray, integers: torch.Tensor) -> None:
        """Overwrite x with integers modulo p."""
        x[...] = self.from_integers(integers.to(torch.int64))

    def equal(self, x: FieldArray, y: FieldArray) -> bool:
        """Tell whether x and y have one shape and the same elements."""
        return np.array_equal(x, y)

    def from_integers(self, integers: torch.Tensor) -> FieldArray:
        """Reduce torch int64 integers modulo p."""
        residues: NDArray[np.int64] = np.remainder(integers.numpy(), self.modulus)
        return residues.view(np.uint64)

    def to_integers(self, x: FieldArray) -> torch.Tensor:
        """Return the representatives in [-(p-1)/2, (p-1)/2] as torch int64."""
        integers = x.astype(np.int64)
        integers -= (integers > self.largest_integer) * np.int64(self.modulus)
        return torch.from_numpy(integers)

    def to_bytes(self, x: FieldArray) -> bytes:
        """Encode as little-endian bytes."""
        self.check(x)
        return x.tobytes()

    def from_bytes(self, data: bytes, shape: Shape) -> FieldArray:
        """Decode the bytes of exactly `shape` elements, refusing integers of p or more."""
        self._check_length(data, shape)
        elements = np.frombuffer(data, np.uint64).reshape(shape)
        if (elements >= _P).any():
            raise NonCanonicalElement(f"an encoded integer is not below {self.modulus}")
        return elements.copy()

    def _flat(self, x: FieldArray) -> FieldArray:
        if not x.flags.c_contiguous:
            raise ValueError("in-place passes need a contiguous array")
        return x.reshape(-1)

    def _slice(self, x_N: FieldArray, start: int, stop: int) -> FieldArray:
        return x_N[start:stop]


def _below_p(x: FieldArray) -> FieldArray:
    """Reduce 0 <= x < 2p: x - p wraps to something huge exactly where x < p already."""
    x = np.asarray(x)
    with np.errstate(over="ignore"):
        return np.asarray(np.minimum(x, x - _P))


Z_2_32 = PowerOfTwoRing(32)
Z_2_64 = PowerOfTwoRing(64)
FIELD_61 = MersenneField()
