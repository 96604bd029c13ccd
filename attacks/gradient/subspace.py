"""Does this vector lie in the row space of a gradient? A test whose level comes from the data.

Shape suffixes: O outputs, D width, R rank, N vectors under test.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from scipy.stats import beta
from scipy.stats import f as fisher
from torch import Tensor

# Clients compute in float32; their rounding is there in whatever type the gradient is held.
EPS = torch.finfo(torch.float32).eps
# Of each vector that lies in the space: rejected by the test.
REJECTED = 1e-9
# Of all the vectors that an attack tries: accepted although they point anywhere.
FALSE_ALARMS = 1e-2


@dataclass(frozen=True, eq=False)
class RowSpan:
    """The row space of G = Δᵀ X + E, where X are a layer's inputs and E is rounding.

    A true row x = Σ c_j v_j (v_j the right singular vectors, s_j their strengths) leaves the space
    that was found by about Σ c_j E'u_j / s_j, first-order perturbation; with entries of E of
    standard deviation σ its squared distance over σ² Σ c_j² / s_j² is chi-squared with D - R
    degrees of freedom, and with σ² itself measured on (O - R)(D - R) of them, Fisher's F. So each
    vector has a tolerance of its own, and none is set by hand.

    Attributes:
        basis_RD: orthonormal, float64.
        strength_R: singular values above the noise.
        noise_std: σ.
        noise_entries: degrees of freedom behind it.
    """

    basis_RD: Tensor = field(repr=False)
    strength_R: Tensor = field(repr=False)
    noise_std: float
    noise_entries: int

    @classmethod
    def of(cls, gradient_OD: Tensor, resolution: float = 0.0) -> RowSpan:
        """The directions that stand above rounding.

        Float rounding of a sum of products is taken as ``2 EPS`` of an entry (1 to 1.6 measured),
        rounding to a step as uniform. Random entries with standard deviations σ_ij have no singular
        value above max_i |σ_i·| + max_j |σ_·j| but for fluctuations of order n^(-2/3), relative
        (Bandeira and van Handel 2016, Tracy and Widom 1996). What is left below that edge is the
        noise as it is, and σ is measured on it.

        Args:
            gradient_OD: of the value projection, or of query, key and value in one.
            resolution: the step to which entries are rounded, 0 for plain floats.
        """
        gradient = gradient_OD.double()
        outputs, width = gradient.shape
        _, strength, basis = torch.linalg.svd(gradient, full_matrices=False)
        floating = 2 * EPS * (gradient.norm(dim=1).max() + gradient.norm(dim=0).max())
        stepping = resolution / math.sqrt(12) * (math.sqrt(outputs) + math.sqrt(width))
        edge = (floating + stepping) * (1 + 2 * len(strength) ** (-2 / 3))
        rank = int((strength > edge).sum())
        entries = (outputs - rank) * (width - rank)
        noise_std = math.sqrt(float(strength[rank:].square().sum()) / max(entries, 1))
        return cls(basis[:rank], strength[:rank], noise_std, entries)

    @property
    def rank(self) -> int:
        """R: how many distinct, independent inputs the layer had."""
        return len(self.strength_R)

    @property
    def width(self) -> int:
        """D."""
        return self.basis_RD.shape[1]

    def excess(self, rows_ND: Tensor) -> Tensor:
        """Squared distance from the space over what is tolerated, (...,) for rows (..., D).

        At most 1 where the row lies in it.
        """
        rows = rows_ND.double()
        inside_NR = rows @ self.basis_RD.T
        distance_N = (rows - inside_NR @ self.basis_RD).square().sum(-1)
        spread_N = (self.noise_std * inside_NR / self.strength_R).square().sum(-1)
        # A recomputed row has rounding of its own: √D EPS of an entry, as sums of D products have.
        spread_N += EPS**2 * rows.square().sum(-1)
        return distance_N / (self._quantile() * spread_N)

    def contains(self, rows_ND: Tensor) -> Tensor:
        """bool, shape (...,) for rows (..., D): true where the row lies in the space."""
        return self.excess(rows_ND) <= 1

    def tells(self, candidates: int) -> bool:
        """Whether ``candidates`` vectors that point anywhere would hardly ever pass.

        The squared distance of a random unit vector is Beta((D - R)/2, R/2); its spread is
        σ²/D Σ 1/s_j². A space of rank 0 or D tells nothing.
        """
        if not 0 < self.rank < self.width:
            return False
        spread = float((self.noise_std / self.strength_R).square().sum()) / self.width + EPS**2
        chance = beta.cdf(self._quantile() * spread, (self.width - self.rank) / 2, self.rank / 2)
        return bool(chance * candidates < FALSE_ALARMS)

    def _quantile(self) -> float:
        free = self.width - self.rank
        return free * float(fisher.isf(REJECTED, free, self.noise_entries))
