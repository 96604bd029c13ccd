"""Differentially private training: plan, sample, clip, noise, account, record.

One module per noun of the theory. The sensitivity travels with the value
(:class:`~privlm.dp.clipping.ClippedSum`), the event with the release
(:class:`~privlm.dp.noise.Release`), and the sampler with its accounting
(:mod:`privlm.dp.sampling`).
"""

from privlm.dp.accounting import Epsilon, epsilon_of
from privlm.dp.calibration import calibrate_noise_multiplier, most_steps
from privlm.dp.clipping import (
    AdaptiveClipping,
    AutomaticClipping,
    ClippedSum,
    FlatClipping,
    NonFiniteGradient,
    PerExampleClipping,
    PerLayerClipping,
)
from privlm.dp.factorization import Banded, Blt
from privlm.dp.history import LedgerError
from privlm.dp.ledger import Budget, BudgetExceeded, Ledger, read_ledger
from privlm.dp.noise import GaussianMechanism, Release
from privlm.dp.plan import Guarantee, Plan
from privlm.dp.private import PrivateOptimizer, PrivateTraining, make_private
from privlm.dp.sampling import (
    BallsInBinsSampler,
    CyclicPoissonSampler,
    FixedSizeSampler,
    PoissonSampler,
    TruncatedPoissonSampler,
)
from privlm.dp.selection import Search, epsilon_of_search
from privlm.dp.spending import UnearnedAmplification
from privlm.dp.trade_off import trade_off
from privlm.dp.turns import NO_LEDGER, OutOfTurn
from privlm.dp.users import (
    Contributions,
    ExampleLevelSampling,
    UserLevelSampling,
    bound_contributions,
)

__all__ = [
    "NO_LEDGER",
    "AdaptiveClipping",
    "AutomaticClipping",
    "BallsInBinsSampler",
    "Banded",
    "Blt",
    "Budget",
    "BudgetExceeded",
    "ClippedSum",
    "Contributions",
    "CyclicPoissonSampler",
    "Epsilon",
    "ExampleLevelSampling",
    "FixedSizeSampler",
    "FlatClipping",
    "GaussianMechanism",
    "Guarantee",
    "Ledger",
    "LedgerError",
    "NonFiniteGradient",
    "OutOfTurn",
    "PerExampleClipping",
    "PerLayerClipping",
    "Plan",
    "PoissonSampler",
    "PrivateOptimizer",
    "PrivateTraining",
    "Release",
    "Search",
    "TruncatedPoissonSampler",
    "UnearnedAmplification",
    "UserLevelSampling",
    "bound_contributions",
    "calibrate_noise_multiplier",
    "epsilon_of",
    "epsilon_of_search",
    "make_private",
    "most_steps",
    "read_ledger",
    "trade_off",
]
