"""Secret sharing: additive over any ring, Shamir's over the prime field.

Additive shares hide the secret from all but the full set of parties and carry no redundancy: a
changed share changes the secret unnoticed. Shamir's scheme opens with any `threshold` of the
parties and checks whatever shares come on top.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from protocols.errors import (
    DuplicateShare,
    InconsistentShares,
    MissingShares,
    NonCanonicalElement,
)
from protocols.randomness import SEED_BYTES, Stream
from protocols.ring import FIELD_61, FieldArray, Ring

A = TypeVar("A")

_SHARE_LABEL = "privlm/additive-share/v1"
LIMB_BYTES = 7


@dataclass(frozen=True, eq=False, kw_only=True)
class AdditiveShare(ABC, Generic[A]):
    """Share `index` of `parties`, of a secret of `shape` over `ring`."""

    ring: Ring[A]
    index: int
    parties: int
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.parties:
            raise ValueError(f"share index must lie in [0, {self.parties}), got {self.index}")

    @abstractmethod
    def add_to_(self, total: A) -> None:
        """Add the share to contiguous `total` in place, in constant memory."""


@dataclass(frozen=True, eq=False, kw_only=True)
class SeedShare(AdditiveShare[A]):
    """A share that is the keystream under a 32-byte seed, expanded when it is needed."""

    seed: bytes = field(repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.seed) != SEED_BYTES:
            raise ValueError(f"a seed has {SEED_BYTES} bytes, not {len(self.seed)}")

    def add_to_(self, total: A) -> None:
        """Add the share to contiguous `total` in place, in constant memory."""
        self.ring.add_mask_(total, Stream(self.seed, _SHARE_LABEL))


@dataclass(frozen=True, eq=False, kw_only=True)
class VectorShare(AdditiveShare[A]):
    """A share in full."""

    elements: A = field(repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ring.check(self.elements) != self.shape:
            raise ValueError(
                f"elements have shape {self.ring.check(self.elements)}, not {self.shape}"
            )

    def add_to_(self, total: A) -> None:
        """Add the share to contiguous `total` in place, in constant memory."""
        blocks = zip(self.ring.blocks(total), self.ring.blocks(self.elements), strict=True)
        for total_B, elements_B in blocks:
            self.ring.add_(total_B, elements_B)


def _require_apart(out: object, shares: Iterable[AdditiveShare[A]]) -> None:
    """Raise ValueError if clearing `out` would clear a share before it was added."""
    for share in shares:
        if isinstance(share, VectorShare) and np.may_share_memory(
            np.asarray(out), np.asarray(share.elements)
        ):
            raise ValueError(f"out is the memory of share {share.index}, which is still needed")


def share_additive(
    secret: A, ring: Ring[A], parties: int, stream: Stream, *, out: A | None = None
) -> list[AdditiveShare[A]]:
    """Split `secret` into `parties` shares whose sum it is; any fewer are uniform.

    [x]_i = PRG(seed_i) for i < parties - 1, and [x]_last = x - Σ PRG(seed_i): only the last share
    is as long as the secret.

    Args:
        secret: elements of `ring`, contiguous, any shape; left as it is.
        ring: its ring.
        parties: number of shares, at least 2.
        stream: from which the seeds are drawn.
        out: elements of the same shape to hold the last share; fresh ones if None. `secret`
            itself may be given where it is no longer needed.

    Raises:
        ValueError: fewer than two parties, or a wrong shape.

    """
    if parties < 2:
        raise ValueError(f"sharing among {parties} parties would hide nothing")
    shape = ring.check(secret)
    last = ring.empty(shape) if out is None else out
    if ring.check(last) != shape:
        raise ValueError(f"out has shape {ring.check(last)}, the secret {shape}")
    seeds = [stream.bytes(SEED_BYTES) for _ in range(parties - 1)]
    masks = [Stream(seed, _SHARE_LABEL) for seed in seeds]
    # Block by block, so that the secret is read and the share written once, whatever `parties` is.
    for secret_B, last_B in zip(ring.blocks(secret), ring.blocks(last), strict=True):
        ring.copy_(last_B, secret_B)
        for mask in masks:
            ring.sub_mask_(last_B, mask)
    shares: list[AdditiveShare[A]] = [
        SeedShare(ring=ring, index=index, parties=parties, shape=shape, seed=seed)
        for index, seed in enumerate(seeds)
    ]
    shares.append(
        VectorShare(ring=ring, index=parties - 1, parties=parties, shape=shape, elements=last)
    )
    return shares


class ShareSum(Generic[A]):
    """One server's running sum of the shares that clients gave it, in the memory of one vector.

    Args:
        first: the first share to sum, which fixes ring, index, number of parties and shape.
        out: elements of the same shape to overwrite with the sum; fresh ones if None.

    Raises:
        ValueError: `out` has another shape, or is the memory of the share.

    """

    def __init__(self, first: AdditiveShare[A], *, out: A | None = None) -> None:
        self._like = first
        self.count = 0
        self._total = first.ring.empty(first.shape) if out is None else out
        if first.ring.check(self._total) != first.shape:
            raise ValueError(f"out has shape {first.ring.check(self._total)}, not {first.shape}")
        _require_apart(self._total, [first])
        _clear_(first.ring, self._total)
        self.add(first)

    def add(self, share: AdditiveShare[A]) -> None:
        """Add one client's share.

        Raises:
            InconsistentShares: it belongs to another server or to another kind of secret.

        """
        _require_alike([self._like, share])
        if share.index != self._like.index:
            raise InconsistentShares(
                f"server {self._like.index} got a share meant for server {share.index}"
            )
        share.add_to_(self._total)
        self.count += 1

    def share(self) -> VectorShare[A]:
        """Return this server's share of the sum; it shares memory with the running sum."""
        like = self._like
        return VectorShare(
            ring=like.ring,
            index=like.index,
            parties=like.parties,
            shape=like.shape,
            elements=self._total,
        )


def open_additive(shares: Sequence[AdditiveShare[A]], *, out: A | None = None) -> A:
    """Return the secret that the shares of all parties add up to.

    Args:
        shares: one of every party, in any order.
        out: elements of the same shape to overwrite with the secret; fresh ones if None.

    Raises:
        ValueError: `out` has another shape, or is the memory of a share.
        InconsistentShares: the shares differ in ring, shape or number of parties.
        DuplicateShare: two shares of one party.
        MissingShares: not every party's share is there.

    """
    if not shares:
        raise MissingShares("no shares to open")
    _require_alike(shares)
    _require_distinct([share.index for share in shares])
    missing = sorted(set(range(shares[0].parties)) - {share.index for share in shares})
    if missing:
        raise MissingShares(f"shares of parties {missing} are missing")
    ring, shape = shares[0].ring, shares[0].shape
    total = ring.empty(shape) if out is None else out
    if ring.check(total) != shape:
        raise ValueError(f"out has shape {ring.check(total)}, the secret {shape}")
    _require_apart(total, shares)
    _clear_(ring, total)
    for share in shares:
        share.add_to_(total)
    return total


def _clear_(ring: Ring[A], x: A) -> None:
    for block in ring.blocks(x):
        ring.sub_(block, block)


def _require_alike(shares: Sequence[AdditiveShare[A]]) -> None:
    kinds = {(share.ring.name, share.parties, share.shape) for share in shares}
    if len(kinds) > 1:
        raise InconsistentShares(f"shares of different secrets: {sorted(kinds)}")


def _require_distinct(indices: Sequence[int]) -> None:
    repeated = sorted(index for index, count in Counter(indices).items() if count > 1)
    if repeated:
        raise DuplicateShare(f"more than one share of parties {repeated}")


@dataclass(frozen=True, eq=False, kw_only=True)
class ShamirShare:
    """Party `index`'s point on the polynomials of M secrets: values_M = f_M(index), index >= 1."""

    index: int
    threshold: int
    values: FieldArray = field(repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.index < FIELD_61.modulus:
            raise ValueError(f"share index must lie in [1, p), got {self.index}")
        if self.threshold < 2:
            raise ValueError(f"threshold must be at least 2, got {self.threshold}")
        if len(FIELD_61.check(self.values)) != 1:
            raise ValueError("values must have one dimension")
        if (self.values >= np.uint64(FIELD_61.modulus)).any():
            raise ValueError("values must be field elements below 2^61 - 1")


def share_shamir(
    secrets: FieldArray, threshold: int, parties: int, stream: Stream
) -> list[ShamirShare]:
    """Share M secrets so that any `threshold` parties open them and fewer learn nothing.

    f(z) = s + a₁z + … + a_{t-1}z^{t-1} over Z_(2^61-1) with uniform coefficients; party i holds
    f(i) (Shamir 1979).

    Args:
        secrets: field elements, (M,).
        threshold: t, from 2 to `parties`.
        parties: number of shares; their indices are 1 … parties.
        stream: of the coefficients.

    Raises:
        ValueError: an argument is out of range.

    """
    if not 2 <= threshold <= parties:
        raise ValueError(f"threshold must lie in [2, {parties}], got {threshold}")
    if len(FIELD_61.check(secrets)) != 1 or (secrets >= np.uint64(FIELD_61.modulus)).any():
        raise ValueError("secrets must be a vector of field elements below 2^61 - 1")
    coefficients_KM = FIELD_61.random((threshold - 1, len(secrets)), stream)
    points_P1 = np.arange(1, parties + 1, dtype=np.uint64)[:, None]
    values_PM = FIELD_61.zeros((parties, len(secrets)))
    for coefficient_M in coefficients_KM[::-1]:  # Horner's rule
        values_PM = FIELD_61.mul(FIELD_61.add(values_PM, coefficient_M), points_P1)
    values_PM = FIELD_61.add(values_PM, secrets)
    return [
        ShamirShare(index=index, threshold=threshold, values=values_M)
        for index, values_M in enumerate(values_PM, start=1)
    ]


def open_shamir(shares: Sequence[ShamirShare]) -> FieldArray:
    """Return the M secrets, having checked that all the shares lie on polynomials of degree t-1.

    With exactly `threshold` shares there is nothing to check against: any values open to something.

    Raises:
        MissingShares: fewer shares than the threshold.
        DuplicateShare: two shares of one party.
        InconsistentShares: thresholds or lengths differ, or a share beyond the threshold does not
            lie on the polynomials through the first ones.

    """
    kinds = {(share.threshold, len(share.values)) for share in shares}
    if len(kinds) > 1:
        raise InconsistentShares("shares of different secrets: thresholds or lengths differ")
    _require_distinct([share.index for share in shares])
    threshold = shares[0].threshold if shares else 2
    if len(shares) < threshold:
        raise MissingShares(f"{len(shares)} shares, {threshold} are needed")
    points = np.array([share.index for share in shares], np.uint64)
    values_SM = np.stack([share.values for share in shares])
    targets = np.concatenate([np.zeros(1, np.uint64), points[threshold:]])
    weights_TK = _lagrange_weights(points[:threshold], targets)
    predicted = [
        FIELD_61.sum(FIELD_61.mul(weights_K[:, None], values_SM[:threshold]))
        for weights_K in weights_TK
    ]
    for share, expected_M in zip(shares[threshold:], predicted[1:], strict=True):
        if not np.array_equal(share.values, expected_M):
            raise InconsistentShares(
                f"share {share.index} contradicts the first {threshold}; one of them is wrong"
            )
    return predicted[0]


def _lagrange_weights(points_K: FieldArray, targets_T: FieldArray) -> FieldArray:
    """Return w_TK with f(target) = Σ_k w f(point_k) for every f of degree below K.

    w_k(z) = Π_{j≠k} (z - x_j) / (x_k - x_j).
    """
    denominators_K = np.ones_like(points_K)
    weights_TK = np.ones((len(targets_T), len(points_K)), np.uint64)
    for j, point in enumerate(points_K):
        others = np.arange(len(points_K)) != j
        denominators_K[others] = FIELD_61.mul(
            denominators_K[others], FIELD_61.sub(points_K[others], point)
        )
        differences_T1 = FIELD_61.sub(targets_T, point)[:, None]
        weights_TK[:, others] = FIELD_61.mul(weights_TK[:, others], differences_T1)
    return FIELD_61.mul(weights_TK, FIELD_61.inverse(denominators_K))


def share_bytes(secret: bytes, threshold: int, parties: int, stream: Stream) -> list[ShamirShare]:
    """Share a byte string, such as a 32-byte seed, with `share_shamir`, 7 bytes a field element."""
    return share_shamir(_bytes_to_limbs(secret), threshold, parties, stream)


def open_bytes(shares: Sequence[ShamirShare], length: int) -> bytes:
    """Return the byte string of `length` bytes that `share_bytes` shared.

    Raises:
        NonCanonicalElement: the shares open to something that is no byte string of this length.
        MissingShares, DuplicateShare, InconsistentShares: as `open_shamir`.

    """
    limbs = open_shamir(shares)
    data = limbs.view(np.uint8).reshape(-1, 8)
    opened = data[:, :LIMB_BYTES].tobytes()
    if len(limbs) != -(-length // LIMB_BYTES) or data[:, LIMB_BYTES].any() or any(opened[length:]):
        raise NonCanonicalElement(f"the shares open to no string of {length} bytes")
    return opened[:length]


def _bytes_to_limbs(data: bytes) -> FieldArray:
    padded = data + bytes(-len(data) % LIMB_BYTES)
    limbs = np.zeros((len(padded) // LIMB_BYTES, 8), np.uint8)
    limbs[:, :LIMB_BYTES] = np.frombuffer(padded, np.uint8).reshape(-1, LIMB_BYTES)
    return limbs.reshape(-1).view(np.uint64)
