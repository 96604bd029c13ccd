"""Which examples a step sees, and the amplification that this earns: one object."""

from __future__ import annotations

import dp_accounting
import msgspec
import torch
from torch import Tensor

from privlm.dp.accounting import DpEvent
from protocols.randomness import Stream


class PoissonSampler(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="poisson"):
    """Every example joins every batch independently with one probability.

    This is the sampler that the subsampled-Gaussian analyses assume (Abadi et
    al. 2016; Mironov et al. 2019); shuffling and fixed-size batches are not.
    The draw comes from a cryptographic stream because amplification holds only
    against an adversary who cannot predict it.
    """

    sampling_probability: float

    def __post_init__(self) -> None:
        if not 0 < self.sampling_probability <= 1:
            raise ValueError(
                f"sampling_probability must lie in (0, 1], got {self.sampling_probability}"
            )

    def draw(self, examples: int, stream: Stream) -> Tensor:
        """Indices of one batch, ascending; int64 of shape (batch,), often of another length.

        Args:
            examples: size of the data set.
            stream: secret randomness of this run's sampling.
        """
        joins_N = stream.bernoulli(self.sampling_probability, examples)
        return torch.from_numpy(joins_N.nonzero()[0])

    def amplify(self, release: DpEvent) -> DpEvent:
        """The event of ``release`` computed on one batch of this sampler."""
        if self.sampling_probability == 1:
            return release
        return dp_accounting.PoissonSampledDpEvent(self.sampling_probability, release)
