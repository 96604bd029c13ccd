"""Records that are gradients: an audit's means to see what a release says of one record.

Whoever sees every noised gradient and knows every record but one is the adversary that DP-SGD's
analysis assumes. The records that tell that adversary most have gradients that no other record
shares: one coordinate each, as long as the clipping bound allows ("Dirac canaries", Nasr et al.
2023; Steinke, Nasr & Jagielski 2023, section 6).

Shape suffixes: M coordinates, C canaries, J included canaries, W witnesses, S steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from privlm.dp.clipping import ClippedSum
from privlm.dp.noise import Release

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Coordinates:
    """Single entries of several tensors, no two alike.

    Attributes:
        tensor_M: which tensor, ascending.
        index_M: which of its entries, counted flat.
    """

    tensor_M: Ints = field(repr=False)
    index_M: Ints = field(repr=False)

    def __len__(self) -> int:
        return len(self.tensor_M)

    def select(self, chosen: Bools | slice) -> Coordinates:
        """Some of them, in their order."""
        return Coordinates(self.tensor_M[chosen], self.index_M[chosen])

    def read(self, tensors: Sequence[Tensor]) -> Floats:
        """Their values, float64 of shape (M,); O(M) whatever the size of the tensors."""
        values_M = np.empty(len(self))
        for tensor, here in self._by_tensor():
            index = torch.from_numpy(self.index_M[here]).to(tensors[tensor].device)
            values_M[here] = tensors[tensor].detach().reshape(-1)[index].double().cpu().numpy()
        return values_M

    def add(self, tensors: Sequence[Tensor], amount: float) -> None:
        """Raise each of them by ``amount``, in place; the tensors are contiguous."""
        for tensor, here in self._by_tensor():
            index = torch.from_numpy(self.index_M[here]).to(tensors[tensor].device)
            tensors[tensor].view(-1)[index] += amount

    def _by_tensor(self) -> list[tuple[int, slice]]:
        tensors, starts = np.unique(self.tensor_M, return_index=True)
        ends = [*starts[1:].tolist(), len(self)][: len(starts)]
        return [
            (tensor, slice(start, end))
            for tensor, start, end in zip(tensors.tolist(), starts.tolist(), ends, strict=True)
        ]


def spread(sizes: Sequence[int], count: int, rng: np.random.Generator) -> Coordinates:
    """``count`` coordinates over tensors of ``sizes`` entries, as evenly as these allow.

    Every tensor gets as many as every other, whatever its size, but for those that have fewer
    entries and give them all: an engine that treats one tensor amiss is noticed as surely in a
    layer norm as in an embedding. Within a tensor they are drawn uniformly. The places are no
    secret.

    Raises:
        ValueError: there are fewer entries.
    """
    if count > sum(sizes):
        raise ValueError(
            f"{count:,} coordinates are wanted and there are {sum(sizes):,} parameters; "
            "ask for fewer gradient canaries"
        )
    shares = _even_shares(sizes, count)
    tensors, indices = [], []
    for tensor, (size, share) in enumerate(zip(sizes, shares, strict=True)):
        tensors.append(np.full(share, tensor))
        indices.append(rng.choice(size, share, replace=False))
    return Coordinates(
        np.concatenate(tensors).astype(np.int64), np.concatenate(indices).astype(np.int64)
    )


def _even_shares(sizes: Sequence[int], count: int) -> list[int]:
    """The smaller tensors first: each takes its part of what is left, or all it has."""
    shares = [0] * len(sizes)
    order = sorted(range(len(sizes)), key=lambda tensor: sizes[tensor])
    for done, tensor in enumerate(order):
        shares[tensor] = min(sizes[tensor], count // (len(sizes) - done))
        count -= shares[tensor]
    return shares


@dataclass(frozen=True, eq=False)
class Observed:
    """What a run did at the watched coordinates: private data, and of an audit's canaries alone.

    Sums are those before division by the expected batch size.

    Attributes:
        released_SC: the release, at every canary's coordinate.
        exact_SC: the clipped sum that was noised, there.
        background_SC: what the data records alone add there.
        noise_SW: the release less the clipped sum, at coordinates that no canary raises.
        joins_SJ: which of the included canaries each step's batch held.
    """

    released_SC: Floats = field(repr=False)
    exact_SC: Floats = field(repr=False)
    background_SC: Floats = field(repr=False)
    noise_SW: Floats = field(repr=False)
    joins_SJ: Bools = field(repr=False)


class GradientCanaries:
    """More records of a training, each with a gradient that is ``norm`` at one coordinate.

    The run's own sampler draws them like data records, behind which they are numbered; their
    clipped gradients join the clipped sum before it is noised. Ledger, mechanism and normaliser do
    not know of them. A canary's gradient keeps the clipping bound and so is covered by the claim
    like any record's. Each step costs O(canaries + witnesses).

    Args:
        canaries: a coordinate each.
        witnesses: coordinates that are only watched.
        included_C: which canaries are in the data; coins that the audit tossed.
        norm: the plan's max_grad_norm.

    Raises:
        ValueError: not one coin a canary, or a coordinate that is both.
    """

    def __init__(
        self, canaries: Coordinates, witnesses: Coordinates, included_C: Bools, norm: float
    ) -> None:
        if included_C.shape != (len(canaries),):
            raise ValueError(f"{len(canaries)} canaries, but coins of shape {included_C.shape}")
        both = {*_places(canaries)} & {*_places(witnesses)}
        if both:
            raise ValueError(f"{len(both)} coordinates are canaries' and witnesses' at once")
        self.canaries, self.witnesses = canaries, witnesses
        self._included = canaries.select(included_C)
        self._norm = norm
        self._steps: list[tuple[Floats, Floats, Floats, Floats, Bools]] = []
        self._summed: tuple[Floats, Floats, Floats, Bools] | None = None

    @classmethod
    def spread(
        cls,
        parameters: Sequence[Tensor],
        included_C: Bools,
        witnesses: int,
        norm: float,
        rng: np.random.Generator,
    ) -> GradientCanaries:
        """Canaries and witnesses at random coordinates of all ``parameters``; see :func:`spread`.

        Raises:
            ValueError: there are fewer parameters.
        """
        wanted = len(included_C) + witnesses
        every = spread([p.numel() for p in parameters], wanted, rng)
        # Dealt out tensor by tensor, so that each has its part of both.
        rank_M = (np.arange(wanted) * len(included_C)) // wanted
        is_canary_M = np.diff(rank_M, append=len(included_C)) > 0
        return cls(every.select(is_canary_M), every.select(~is_canary_M), included_C, norm)

    @property
    def records(self) -> int:
        """How many of them are in the data."""
        return len(self._included)

    def hide(self, clipped: ClippedSum, joined: Tensor) -> None:
        """Add the clipped gradients of the canaries that this batch holds, in place.

        Args:
            clipped: of the batch's data records.
            joined: which of the included canaries it holds besides, int64.
        """
        values = clipped.values
        background_C = self.canaries.read(values)
        joins_J = np.zeros(self.records, bool)
        joins_J[joined.cpu().numpy()] = True
        self._included.select(joins_J).add(values, self._norm)
        exact_C, exact_W = self.canaries.read(values), self.witnesses.read(values)
        self._summed = background_C, exact_C, exact_W, joins_J

    def observe(self, release: Release) -> None:
        """Keep what the release of the last clipped sum shows at the watched coordinates."""
        assert self._summed is not None  # the engine hides canaries before it releases
        background_C, exact_C, exact_W, joins_J = self._summed
        self._summed = None
        released_C = self.canaries.read(release.values)
        noise_W = self.witnesses.read(release.values) - exact_W
        self._steps.append((released_C, exact_C, background_C, noise_W, joins_J))

    def observed(self) -> Observed:
        """All steps so far.

        Raises:
            ValueError: there was none.
        """
        if not self._steps:
            raise ValueError("no step was taken, so nothing was observed")
        return Observed(*(np.stack(part) for part in zip(*self._steps, strict=True)))


def _places(coordinates: Coordinates) -> list[tuple[int, int]]:
    return list(zip(coordinates.tensor_M.tolist(), coordinates.index_M.tolist(), strict=True))
