"""Privacy of a user, all of whose examples count as one record.

Two ways of training under it (Charles et al. 2024, arXiv 2407.07737), both after bounding how many
examples a user contributes: *ELS* samples examples and clips each of them; *ULS* samples users and
clips what a user's examples say together.

Shape suffixes: N examples, U users, k examples a user at most, B users of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import torch
from dp_accounting import SelfComposedDpEvent, dp_event
from scipy.stats import binom
from torch import Tensor

from privlm.dp.accounting import DpEvent
from protocols.randomness import Stream


class ExampleLevelSampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="els"):
    """Examples are sampled and clipped, of each user at most ``examples_per_user``.

    A user moves a step's sum by as many bounds as he has examples in the batch, Binomial(k, q) of
    them: the mixture-of-Gaussians mechanism (Choquette-Choo et al. 2023, arXiv 2310.15526).
    """

    examples_per_user: int

    def __post_init__(self) -> None:
        _check_contribution(self.examples_per_user)

    def event(self, sampling_probability: float, noise_multiplier: float, steps: int) -> DpEvent:
        """What Gaussian releases from ``steps`` Poisson batches of examples cost a user."""
        counts = range(self.examples_per_user + 1)
        probabilities = np.asarray(binom.pmf(counts, self.examples_per_user, sampling_probability))
        once = dp_event.MixtureOfGaussiansDpEvent(
            noise_multiplier,
            tuple(float(count) for count in counts),
            tuple(float(p) for p in probabilities / probabilities.sum()),
        )
        return SelfComposedDpEvent(once, steps)


class UserLevelSampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="uls"):
    """Users are sampled; each one's gradient over up to ``examples_per_user`` examples is clipped.

    The sampler then draws users, its population is a number of users, and the accounting is the
    sampler's own with a user for an example.
    """

    examples_per_user: int

    def __post_init__(self) -> None:
        _check_contribution(self.examples_per_user)


Users = ExampleLevelSampling | UserLevelSampling


@dataclass(frozen=True)
class Contributions:
    """What each user contributes to a run; the other examples are never touched.

    Attributes:
        users: distinct, in the order of their first example; what ULS samples from.
        index_Uk: int64, examples of each user ascending; 0 where the mask is false.
        mask_Uk: bool, which entries stand for an example.
    """

    users: tuple[str, ...] = field(repr=False)
    index_Uk: Tensor = field(repr=False)
    mask_Uk: Tensor = field(repr=False)

    @property
    def examples(self) -> Tensor:
        """Indices of the examples that take part, ascending; what ELS samples from."""
        return self.index_Uk[self.mask_Uk].sort().values

    def of(self, batch_B: Tensor) -> tuple[Tensor, Tensor]:
        """The examples of a batch of users: (index_Bk, mask_Bk)."""
        return self.index_Uk[batch_B], self.mask_Uk[batch_B]


def bound_contributions(
    users: Sequence[str], examples_per_user: int, stream: Stream
) -> Contributions:
    """Choose at most ``examples_per_user`` examples of each user, uniformly and in secret.

    One choice serves the whole run: choosing anew at every step would let a user contribute more.

    Args:
        users: whose each of N examples is.
        examples_per_user: k, the bound.
        stream: secret randomness of the choice.

    Raises:
        ValueError: no examples, or a bound below 1.
    """
    _check_contribution(examples_per_user)
    if not users:
        raise ValueError("there are no examples whose users could be bounded")
    names = tuple(dict.fromkeys(users))
    number_of = {name: number for number, name in enumerate(names)}
    user_N = np.array([number_of[name] for name in users])
    by_user_N = np.lexsort((stream.permutation(len(users)), user_N))
    first_U = np.searchsorted(user_N[by_user_N], np.arange(len(names)))
    rank_N = np.arange(len(users)) - first_U[user_N[by_user_N]]
    kept = np.sort(by_user_N[rank_N < examples_per_user])
    kept = kept[np.argsort(user_N[kept], kind="stable")]
    kept_U = np.bincount(user_N[kept], minlength=len(names))
    mask_Uk = np.arange(kept_U.max()) < kept_U[:, None]
    index_Uk = np.zeros(mask_Uk.shape, np.int64)
    index_Uk[mask_Uk] = kept
    return Contributions(names, torch.from_numpy(index_Uk), torch.from_numpy(mask_Uk))


def _check_contribution(examples_per_user: int) -> None:
    if examples_per_user < 1:
        raise ValueError(f"examples_per_user must be at least 1, got {examples_per_user}")
