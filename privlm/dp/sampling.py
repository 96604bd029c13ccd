"""Which examples a step sees, and the amplification that this earns: one object.

Every sampler draws step t from children of the run's sampling stream that are labelled by t (and by
nothing else), so that one stream and step give the same batch again and no state is kept. The draws
come from a cryptographic stream because amplification holds only against an adversary who cannot
predict them. Noise multipliers are relative to the clipping bound of one example.

Shape suffixes: N examples of the data set, G examples of one group or bin.
"""

from __future__ import annotations

import dp_accounting
import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from privlm.dp.accounting import DpEvent
from protocols.randomness import Stream


class PoissonSampler(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="poisson"):
    """Every example joins every batch independently with one probability.

    This is the sampler that the subsampled-Gaussian analyses assume (Abadi et
    al. 2016; Mironov et al. 2019); shuffling and fixed-size batches are not.
    """

    sampling_probability: float

    def __post_init__(self) -> None:
        _check_probability(self.sampling_probability)

    def draw(self, examples: int, step: int, stream: Stream) -> Tensor:
        """Indices of one batch, ascending; int64 of shape (batch,), often of another length.

        Args:
            examples: size of the data set.
            step: number of the step within the run, from 0.
            stream: secret randomness of this run's sampling; the same one at every step.
        """
        joins_N = _of_step(stream, step).bernoulli(self.sampling_probability, examples)
        return torch.from_numpy(joins_N.nonzero()[0])

    def event(self, noise_multiplier: float, steps: int) -> DpEvent:
        """What Gaussian releases from the first ``steps`` batches cost together."""
        return dp_accounting.SelfComposedDpEvent(
            _poisson(self.sampling_probability, noise_multiplier), steps
        )


class TruncatedPoissonSampler(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="truncated-poisson"
):
    """Poisson sampling whose batches never exceed a size: a uniform subset of those that would.

    Shapes can then be fixed. Truncation lets one example push out another, which moves the sum by
    up to twice the bound; the accounting (arXiv 2508.15089) weighs that by its probability, for
    which it needs the number of examples.

    Attributes:
        sampling_probability: of every example, before truncation.
        max_batch_size: the capacity.
        population: public size of the larger of two neighbouring data sets. The guarantee is for
            data sets of ``population`` and of ``population`` - 1 examples; others are refused,
            because the cost is not monotone in the size. For replacing one, the dearer of the two
            sizes is accounted.
    """

    sampling_probability: float
    max_batch_size: int
    population: int

    def __post_init__(self) -> None:
        _check_probability(self.sampling_probability)
        _check_at_least_one(self, "max_batch_size", "population")

    def draw(self, examples: int, step: int, stream: Stream) -> Tensor:
        """As :meth:`PoissonSampler.draw`, at most ``max_batch_size`` indices.

        Raises:
            ValueError: ``examples`` is neither ``population`` nor one less.
        """
        if examples not in (self.population, self.population - 1):
            raise ValueError(
                f"the accounting is for {self.population} examples, or one less, and not for "
                f"{examples}; give the sampler the public population that it draws from"
            )
        coins = _of_step(stream, step)
        joining = coins.bernoulli(self.sampling_probability, examples).nonzero()[0]
        if len(joining) > self.max_batch_size:
            kept = coins.permutation(len(joining))[: self.max_batch_size]
            joining = joining[np.sort(kept)]
        return torch.from_numpy(joining)

    def event(self, noise_multiplier: float, steps: int) -> DpEvent:
        """What Gaussian releases from the first ``steps`` batches cost together."""
        if self.max_batch_size >= self.population:
            once = _poisson(self.sampling_probability, noise_multiplier)
        else:
            once = dp_accounting.TruncatedSubsampledGaussianDpEvent(
                self.population, self.sampling_probability, self.max_batch_size, noise_multiplier
            )
        return dp_accounting.SelfComposedDpEvent(once, steps)


class FixedSizeSampler(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="fixed-size"):
    """A uniform subset of one size at every step, independent of the other steps.

    Its amplification (Wang, Balle and Kasiviswanathan 2019, theorem 27) is known for replacing one
    example, with the number of examples public, and by Rényi DP; not for adding or removing one.
    """

    batch_size: int
    population: int

    def __post_init__(self) -> None:
        _check_at_least_one(self, "batch_size", "population")
        if self.batch_size > self.population:
            raise ValueError(
                f"batch_size {self.batch_size} exceeds the population {self.population}; lower it"
            )

    def draw(self, examples: int, step: int, stream: Stream) -> Tensor:
        """As :meth:`PoissonSampler.draw`, always ``batch_size`` indices.

        Raises:
            ValueError: ``examples`` is not the population.
        """
        if examples != self.population:
            raise ValueError(
                f"the accounting is for {self.population} examples and not for {examples}; give "
                "the sampler the public population that it draws from"
            )
        drawn = _of_step(stream, step).permutation(examples)[: self.batch_size]
        return torch.from_numpy(np.sort(drawn))

    def event(self, noise_multiplier: float, steps: int) -> DpEvent:
        """What Gaussian releases from the first ``steps`` batches cost together."""
        once = dp_accounting.GaussianDpEvent(noise_multiplier)
        if self.batch_size < self.population:
            once = dp_accounting.SampledWithoutReplacementDpEvent(
                self.population, self.batch_size, once
            )
        return dp_accounting.SelfComposedDpEvent(once, steps)


class CyclicPoissonSampler(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="cyclic-poisson"
):
    """Poisson sampling of one group at a time, the groups taking turns.

    Every example is in one of ``cycle`` groups for the whole run, by a secret uniform choice of its
    own, and step t samples group t mod ``cycle``. An example is thus drawn at most every ``cycle``
    steps, which is what banded noise needs (Choquette-Choo et al. 2023, arXiv 2306.08153). The
    accounting takes the group of an example for known, and composes its ⌈steps / cycle⌉ rounds.
    """

    sampling_probability: float
    cycle: int

    def __post_init__(self) -> None:
        _check_probability(self.sampling_probability)
        _check_at_least_one(self, "cycle")

    def draw(self, examples: int, step: int, stream: Stream) -> Tensor:
        """As :meth:`PoissonSampler.draw`; a changed stream in mid-run would change the groups."""
        group_G = _turn(examples, step, self.cycle, stream)
        joins_G = _of_step(stream, step).bernoulli(self.sampling_probability, len(group_G))
        return torch.from_numpy(group_G[joins_G])

    def event(self, noise_multiplier: float, steps: int) -> DpEvent:
        """What Gaussian releases from the first ``steps`` batches cost together."""
        return dp_accounting.SelfComposedDpEvent(
            _poisson(self.sampling_probability, noise_multiplier), rounds(steps, self.cycle)
        )


class BallsInBinsSampler(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="balls-in-bins"
):
    """Every example is in one of ``cycle`` bins, by a secret uniform choice of its own, for good.

    Step t takes bin t mod ``cycle`` whole, so that an epoch of ``cycle`` steps sees every example
    once (Chua et al. 2024). It is accounted *without* amplification: an example takes part every
    ``cycle`` steps, at steps that the adversary is taken to know.
    """

    cycle: int

    def __post_init__(self) -> None:
        _check_at_least_one(self, "cycle")

    def draw(self, examples: int, step: int, stream: Stream) -> Tensor:
        """As :meth:`PoissonSampler.draw`; a changed stream in mid-run would change the bins."""
        return torch.from_numpy(_turn(examples, step, self.cycle, stream))

    def event(self, noise_multiplier: float, steps: int) -> DpEvent:
        """What Gaussian releases from the first ``steps`` batches cost together."""
        return dp_accounting.SelfComposedDpEvent(
            dp_accounting.GaussianDpEvent(noise_multiplier), rounds(steps, self.cycle)
        )


Sampler = (
    PoissonSampler
    | TruncatedPoissonSampler
    | FixedSizeSampler
    | CyclicPoissonSampler
    | BallsInBinsSampler
)


def rounds(steps: int, cycle: int) -> int:
    """How often one example takes part in ``steps`` steps, at most, if it waits ``cycle`` steps."""
    return -(-steps // cycle)


def _poisson(sampling_probability: float, noise_multiplier: float) -> DpEvent:
    release = dp_accounting.GaussianDpEvent(noise_multiplier)
    if sampling_probability == 1:
        return release
    return dp_accounting.PoissonSampledDpEvent(sampling_probability, release)


def _of_step(stream: Stream, step: int) -> Stream:
    return stream.child(f"step {step}")


def _turn(examples: int, step: int, cycle: int, stream: Stream) -> NDArray[np.int64]:
    """The examples whose turn it is, ascending."""
    group_N = stream.child("assignment").integers(cycle, examples)
    return np.flatnonzero(group_N == step % cycle).astype(np.int64, copy=False)


def _check_probability(sampling_probability: float) -> None:
    if not 0 < sampling_probability <= 1:
        raise ValueError(f"sampling_probability must lie in (0, 1], got {sampling_probability}")


def _check_at_least_one(sampler: msgspec.Struct, *names: str) -> None:
    for name in names:
        if getattr(sampler, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(sampler, name)}")
