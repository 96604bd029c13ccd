"""Differentially private training: plan, sample, clip, noise, account, record.

One module per noun of the theory. The sensitivity travels with the value
(:class:`~privlm.dp.clipping.ClippedSum`), the event with the release
(:class:`~privlm.dp.noise.Release`), and the sampler with its accounting
(:class:`~privlm.dp.sampling.PoissonSampler`).
"""

from privlm.dp.accounting import Epsilon, calibrate_noise_multiplier, epsilon_of
from privlm.dp.clipping import ClippedSum, NonFiniteGradient, PerExampleClipping
from privlm.dp.ledger import Ledger, LedgerError
from privlm.dp.noise import GaussianMechanism, Release
from privlm.dp.plan import Guarantee, Plan
from privlm.dp.sampling import PoissonSampler

__all__ = [
    "ClippedSum",
    "Epsilon",
    "GaussianMechanism",
    "Guarantee",
    "Ledger",
    "LedgerError",
    "NonFiniteGradient",
    "PerExampleClipping",
    "Plan",
    "PoissonSampler",
    "Release",
    "calibrate_noise_multiplier",
    "epsilon_of",
]
