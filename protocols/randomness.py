"""Cryptographic randomness as an argument.

A `Stream` is the AES-256-CTR keystream under a 256-bit seed and a label. Everything that must be
unpredictable (masks, keys, shares, noise, sampling) takes one; simulated faults and initialisation
take a NumPy or torch generator instead, so that the type checker keeps the two kinds apart.
"""

import math
import operator
import os
import sys
from fractions import Fraction
from typing import Any, NoReturn, TypeAlias

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from protocols.errors import KeystreamReused

if sys.byteorder != "little":
    raise ImportError("protocols keeps ring elements little-endian in memory")

SEED_BYTES = 32

Shape: TypeAlias = int | tuple[int, ...]

# Greatest magnitude that `Stream.standard_normal` gives, 13.27: there its tails end.
NORMAL_CUT = math.sqrt(254 * math.log(2))
# Up to this magnitude, 10.73, the values of `Stream.standard_normal` lie dense: their radii are
# less than 2^-43 apart. Beyond it the gaps grow.
NORMAL_DENSE = math.sqrt(166 * math.log(2))

_STREAM_INFO = b"privlm/protocols/stream/v1\x00"
# 64 KiB of zeros and 64 KiB of output stay in a core's second-level cache.
_ZEROS = memoryview(bytes(1 << 16))
_BLOCK_WORDS = 1 << 13
# Words, results and scratch of one block of normals: 900 KiB, a large second-level cache.
_BLOCK_NORMALS = 1 << 15
# Shorter words are continued; see `Stream.fill_normal`. One pair in 2^19.
_SHORT_WORD = 2.0**44


def hkdf_sha256(secret: bytes, *, salt: bytes, info: bytes, length: int) -> bytes:
    """Derive `length` bytes from `secret` (RFC 5869, extract then expand, with SHA-256)."""
    return HKDF(algorithm=SHA256(), length=length, salt=salt, info=info).derive(secret)


class Keystream:
    """AES in counter mode, as a source of bytes: the deterministic core of `Stream`.

    `key` has 16, 24 or 32 bytes; `counter_block` is the first of the 128-bit big-endian counter
    blocks, incremented modulo 2^128 (NIST SP 800-38A, section 6.5 and appendix B.1).
    """

    def __init__(self, key: bytes, counter_block: bytes) -> None:
        self._encryptor = Cipher(algorithms.AES(key), modes.CTR(counter_block)).encryptor()

    def write_into(self, out: memoryview) -> None:
        """Overwrite `out`, a writable contiguous view of bytes, with the next `len(out)` bytes."""
        update_into, size, block = self._encryptor.update_into, len(out), len(_ZEROS)
        whole = size - size % block
        for start in range(0, whole, block):
            update_into(_ZEROS, out[start : start + block])
        if whole < size:
            update_into(_ZEROS[: size - whole], out[whole:])


class SingleUse:
    """What keeps a source of keystream from being repeated: by a copy, a pickle or a fork."""

    __slots__ = ("_label", "_process")

    def __init__(self, label: str) -> None:
        if not label:
            raise ValueError("a stream needs a label that says what it is for")
        self._label = label
        self._process = os.getpid()

    @property
    def label(self) -> str:
        """What the stream is for."""
        return self._label

    def _require_own_process(self) -> None:
        if os.getpid() != self._process:
            raise KeystreamReused(
                f"stream {self._label!r} was made in another process: a fork would repeat its "
                "keystream; draw a seed for each process before forking, and pass it"
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(label={self._label!r})"

    def __copy__(self) -> NoReturn:
        raise KeystreamReused(f"a copy of stream {self._label!r} would repeat its keystream")

    def __deepcopy__(self, memo: object) -> NoReturn:
        self.__copy__()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        self.__copy__()

    def __getstate__(self) -> NoReturn:
        self.__copy__()


class Stream(SingleUse):
    r"""A reproducible, unpredictable sequence: AES-256-CTR keyed by HKDF-SHA256(seed, label).

    key ‖ first counter block ‖ secret of the children (32, 16 and 32 bytes)
        = HKDF-SHA256(seed, salt = "", info = "privlm/protocols/stream/v1\0" ‖ label).

    Streams under different labels, and the children of a stream, are independent as long as
    HMAC-SHA256 is a pseudorandom function. Neither seed nor label has a default: one seed under one
    label is one keystream, and using that twice reveals the difference of what it hides. For the
    same reason a stream can be neither copied nor pickled, and in a forked process it neither gives
    bytes nor derives children: both processes would derive the same ones.

    A stream may give 2^68 bytes: from 2^64 blocks on, AES-CTR is distinguishable from random, for
    its blocks never repeat. The bound is not checked; at 10 GB/s it is 900 years away. Reading
    takes constant memory beyond the output; `bytes` and `permutation` hold a few copies of theirs.
    A stream belongs to one thread: two threads reading
    one stream would make its output depend on their timing. Give each thread a child of its own.

    Args:
        seed: 32 uniform bytes.
        label: what the stream is for; not empty.

    Raises:
        ValueError: the seed does not have 32 bytes, or the label is empty.

    """

    __slots__ = ("_child_secret", "_keystream")

    def __init__(self, seed: bytes, label: str) -> None:
        if not isinstance(seed, bytes) or len(seed) != SEED_BYTES:
            raise ValueError(f"a stream needs a seed of exactly {SEED_BYTES} bytes")
        super().__init__(label)
        derived = hkdf_sha256(seed, salt=b"", info=_STREAM_INFO + label.encode(), length=80)
        self._keystream = Keystream(derived[:32], derived[32:48])
        self._child_secret = derived[48:]

    @classmethod
    def fresh(cls, label: str) -> "Stream":
        """Make a stream that nobody can reproduce: its seed comes from the operating system."""
        return cls(os.urandom(SEED_BYTES), label)

    def child(self, label: str) -> "Stream":
        """Derive the stream for `label`.

        It depends on this stream's seed and label and on `label` alone, never on how much has been
        read, and is independent of this stream and of every other child. Deriving one label twice
        gives one keystream twice.

        Raises:
            KeystreamReused: this process is a fork of the one that made the stream.

        """
        self._require_own_process()
        return Stream(self._child_secret, label)

    def fill(self, array: NDArray[np.integer] | torch.Tensor) -> None:
        """Overwrite `array`, in place and in memory order, with the next uniform bytes.

        Args:
            array: contiguous, writable integers of any shape, in host memory.

        Raises:
            ValueError: the array is anything else.
            KeystreamReused: this process is a fork of the one that made the stream.

        """
        array = _writable(array, "iu")
        if array.size:
            self._write_into(array.reshape(-1).view(np.uint8).data)

    def integers(self, bound: int, shape: Shape) -> NDArray[np.int64]:
        """Draw uniform integers from 0 to `bound` - 1, for 1 <= `bound` <= 2^63, without bias.

        64-bit words from the largest multiple of `bound` on are rejected.
        """
        bound = operator.index(bound)  # NumPy's integers would overflow below
        if not 1 <= bound <= 1 << 63:
            raise ValueError(f"bound must lie in [1, 2^63], got {bound}")
        return self._below(bound, shape).view(np.int64)

    def ring_elements(self, bits: int, shape: Shape) -> torch.Tensor:
        """Draw uniform elements of Z_2^`bits`, 32 or 64, as torch int32 or int64."""
        if bits not in (32, 64):
            raise ValueError(f"ring elements have 32 or 64 bits, not {bits}")
        elements = torch.empty(shape, dtype=torch.int32 if bits == 32 else torch.int64)
        self.fill(elements)
        return elements

    def field_elements(self, modulus: int, shape: Shape) -> NDArray[np.uint64]:
        """Draw uniform elements of Z_p, for a prime 2 <= p < 2^64, without bias (by rejection)."""
        modulus = operator.index(modulus)
        if not 2 <= modulus < 1 << 64:
            raise ValueError(f"modulus must lie in [2, 2^64), got {modulus}")
        return self._below(modulus, shape)

    def bernoulli(self, probability: float, shape: Shape) -> NDArray[np.bool_]:
        """Draw independent coins that are true with exactly the probability given.

        A 64-bit word is compared with the first 64 binary digits of `probability`; a tie is settled
        by the digits that follow, so no rounding is left.
        """
        if not 0.0 <= probability <= 1.0:
            raise ValueError(f"probability must lie in [0, 1], got {probability}")
        out = np.empty(shape, np.bool_)
        if probability == 1.0:
            out[...] = True
            return out
        scaled = Fraction(probability) * (1 << 64)
        threshold = math.floor(scaled)
        following_digits = float(scaled - threshold)
        flat = out.reshape(-1)
        for start in range(0, flat.size, _BLOCK_WORDS):
            coins = flat[start : start + _BLOCK_WORDS]
            words = self._words(coins.size)
            np.less(words, np.uint64(threshold), out=coins)
            ties = words == np.uint64(threshold)
            if following_digits and ties.any():
                coins[ties] = self.bernoulli(following_digits, int(ties.sum()))
        return out

    def permutation(self, length: int) -> NDArray[np.int64]:
        """Draw a uniform permutation of 0 … `length` - 1.

        The order of `length` independent 64-bit keys; if any two agree, all are drawn anew. Given
        that the keys differ, every order of them is equally likely, so there is no bias at all.
        """
        if not 0 <= length < 1 << 31:
            raise ValueError(f"length must lie in [0, 2^31), got {length}")
        while True:
            keys = self._words(length)
            order = np.argsort(keys)
            ordered = keys[order]
            if not (ordered[1:] == ordered[:-1]).any():
                return order

    def standard_normal(self, shape: Shape) -> NDArray[np.float64]:
        """Draw independent standard normals; see `fill_normal`."""
        out = np.empty(shape, np.float64)
        self.fill_normal(out)
        return out

    def fill_normal(self, array: NDArray[np.float64] | torch.Tensor) -> None:
        r"""Overwrite `array`, in place, with independent standard normals (Box and Muller 1958).

        z₀ = r cos θ, z₁ = r sin θ with r = √(−2 ln u) and θ = 2πv. With i and j uniform 64-bit
        words read as signed integers, u = |i| 2^-63 in [0, 1] and v = j 2^-64 in [−½, ½). Where
        |i| < 2^44 another signed word k continues it: u = |i + k 2^-64| 2^-63, at least 2^-127. So
        u has a relative precision of 2^-44 or better down to 2^-83, and the radii from 0.001 to
        `NORMAL_DENSE` = √(166 ln 2) = 10.73 lie less than 2^-43 apart. They end at `NORMAL_CUT` =
        √(254 ln 2) = 13.27, beyond which a normal lies with probability below 10^-39.

        The values are a grid of float64s, not reals, and their last bits depend on the machine's
        libm: where floating-point noise could give away the value beneath it (Mironov 2012), round
        the sum to a coarser grid, or use a discrete sampler. How a draw is cut changes it: two
        draws of n values are not one of 2n.

        Args:
            array: contiguous, writable float64 of any shape, in host memory.

        Raises:
            ValueError: the array is anything else.
            KeystreamReused: this process is a fork of the one that made the stream.

        """
        flat = _writable(array, "f", 8).reshape(-1)
        pairs = (min(flat.size, _BLOCK_NORMALS) + 1) // 2
        words, scratch_3P = np.empty(2 * pairs, np.int64), np.empty((3, pairs))
        for start in range(0, flat.size, _BLOCK_NORMALS):
            block = flat[start : start + _BLOCK_NORMALS]
            pairs = (block.size + 1) // 2
            radius_P, tan_P, square_P = scratch_3P[:, :pairs]
            self.fill(words[: 2 * pairs])
            self._uniforms_into(radius_P, words[:pairs])
            np.log(radius_P, out=radius_P)
            radius_P *= -2.0
            np.sqrt(radius_P, out=radius_P)
            # NumPy's tangent is vectorised, its sine and cosine are not: with t = tan θ/2,
            # cos θ = (1 − t²)/(1 + t²) and sin θ = 2t/(1 + t²).
            np.copyto(tan_P, words[pairs : 2 * pairs])
            tan_P *= math.pi * 2.0**-64
            np.tan(tan_P, out=tan_P)
            np.multiply(tan_P, tan_P, out=square_P)
            cosines_P, sines = block[:pairs], block[pairs:]
            np.subtract(1.0, square_P, out=cosines_P)
            square_P += 1.0
            radius_P /= square_P
            cosines_P *= radius_P
            tan_P += tan_P
            np.multiply(radius_P[: sines.size], tan_P[: sines.size], out=sines)

    def _uniforms_into(self, out_P: NDArray[np.float64], words_P: NDArray[np.int64]) -> None:
        """Uniforms in [2^-127, 1] of full relative precision; see `fill_normal`."""
        np.copyto(out_P, words_P)
        np.abs(out_P, out=out_P)
        if out_P.min() < _SHORT_WORD:
            # Such words are exact as float64s. The cell of i is [i − ½, i + ½), so that 0, which
            # has no second sign, keeps half the probability of 1 and of all others.
            short = np.flatnonzero(out_P < _SHORT_WORD)
            following = np.empty(short.size, np.int64)
            self.fill(following)
            continued = np.abs(words_P[short] + following * 2.0**-64)
            out_P[short] = np.maximum(continued, 2.0**-64)
        out_P *= 2.0**-63

    def _write_into(self, out: memoryview) -> None:
        self._require_own_process()
        self._keystream.write_into(out)

    def _words(self, count: int) -> NDArray[np.uint64]:
        words = np.empty(count, np.uint64)
        self.fill(words)
        return words

    def _below(self, bound: int, shape: Shape) -> NDArray[np.uint64]:
        """Uniform words below `bound`: the words of the keystream below k·bound, modulo bound."""
        out = np.empty(shape, np.uint64)
        flat = out.reshape(-1)
        largest_accepted = np.uint64((1 << 64) // bound * bound - 1)
        power_of_two = bound & (bound - 1) == 0
        filled = 0
        while filled < flat.size:
            words = flat[filled : filled + _BLOCK_WORDS]
            self.fill(words)
            if power_of_two:
                words &= np.uint64(bound - 1)
                filled += words.size
            else:
                accepted = words[words <= largest_accepted]
                np.remainder(accepted, np.uint64(bound), out=flat[filled : filled + accepted.size])
                filled += accepted.size
        return out

    # Last, because inside the class body the name shadows the type from here on.
    def bytes(self, count: int) -> bytes:
        """Read the next `count` bytes."""
        if count < 0:
            raise ValueError(f"count must not be negative, got {count}")
        out = bytearray(count)
        self._write_into(memoryview(out))
        return bytes(out)


def _writable(
    array: NDArray[Any] | torch.Tensor, kinds: str, item_bytes: int | None = None
) -> NDArray[Any]:
    """The NumPy view of `array`, if a stream can fill it in place."""
    if isinstance(array, torch.Tensor):
        if array.device.type != "cpu":
            raise ValueError(f"a stream fills host memory, not {array.device}")
        array = array.detach().numpy()
    array = np.asarray(array)  # a subclass, such as np.matrix, may not flatten
    if array.dtype.kind not in kinds or array.dtype.itemsize != (item_bytes or array.itemsize):
        what = "bytes: fill integers" if "i" in kinds else "normals: fill float64"
        raise ValueError(f"an array of {array.dtype} cannot hold {what}")
    if not (array.flags.c_contiguous and array.flags.writeable):
        raise ValueError("a stream fills contiguous, writable memory only")
    return array
