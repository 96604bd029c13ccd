"""The best Toeplitz matrices for correlated noise: numbers only, no tensors and no privacy.

C is lower triangular Toeplitz with first column c, B = A C⁻¹ with first column b, A the lower
triangle of ones; as power series c · b = 1 + x + x² + …. The noise on the last prefix sum has ‖b‖
deviations, and one participation moves C x by ‖c‖: what is minimised is their product, with ‖c‖
replaced by the sensitivity where examples participate more than once. D exponentials.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.signal import fftconvolve, lfilter

Array = NDArray[np.float64]

_SHORT = 128
"""Coefficients up to which the direct recursion beats Fourier transforms."""


def square_root(count: int) -> Array:
    """First column of the square root of A: 1, 1/2, 3/8, 5/16, … (Fichtenberger et al. 2022)."""
    k = np.arange(1, count)
    return np.concatenate([[1.0], ((2 * k - 1) / (2 * k)).cumprod()])


def geometric(base_D: Array, weight_D: Array, count: int) -> Array:
    """Σ_d weight_d base_d^j for j = 0 … count - 1."""
    total, powers = np.zeros(count), np.arange(count)
    for base, weight in zip(base_D, weight_D, strict=True):
        total += weight * base**powers
    return total


@lru_cache(maxsize=64)
def banded_optimum(bands: int, steps: int) -> Array:
    """The c of ``bands`` <= ``steps`` coefficients and norm 1 that minimises ‖c‖ · ‖b‖.

    The search starts from the square root, which it is for bands = steps, and runs over the ratios
    of neighbours, which it keeps in (0, 1): c stays positive and decreasing.
    """
    start = square_root(bands)
    ones = np.ones(steps)

    def column(x: Array) -> tuple[Array, Array]:
        ratios = 1 / (1 + np.exp(-x))
        return ratios, np.concatenate([[1.0], ratios.cumprod()])

    def objective(x: Array) -> tuple[float, Array]:
        """The logarithm and its gradient, by ∂b = -b ∂c / c."""
        ratios, c = column(x)
        b, b_over_c = _divided(ones, c)
        squares_c, squares_b = float(c @ c), float(b @ b)
        by_c = c / squares_c - _correlated(b, b_over_c, bands) / squares_b
        by_ratio = (by_c * c)[:0:-1].cumsum()[::-1]
        return 0.5 * float(np.log(squares_c * squares_b)), (1 - ratios) * by_ratio

    c = start
    if bands > 1:
        ratios = start[1:] / start[:-1]
        c = column(_minimum(objective, np.log(ratios / (1 - ratios)), True, None))[1]
    c = c / np.linalg.norm(c)
    c.setflags(write=False)
    return c


@lru_cache(maxsize=64)
def blt_optimum(buffers: int, steps: int, min_separation: int) -> tuple[Array, Array]:
    """θ and ω, each (D,), that minimise ‖b‖ · sensitivity; 0 < θ < 1, 0 < ω and Σ ω < 1.

    Participations lie ``min_separation`` <= ``steps`` apart. The last of them counts as if it had a
    full period before it; that is for the search alone.
    """

    def parameters(x: Array) -> tuple[Array, Array]:
        weights_D = np.exp(x[buffers:])
        return 1 / (1 + np.exp(-x[:buffers])), weights_D / (1 + weights_D.sum())

    def objective(x: Array) -> float:
        """The logarithm, in closed form: b_j = β + Σ_d γ_d λ_d^j with λ and α of C⁻¹."""
        theta_D, omega_D = parameters(x)
        lambda_D, alpha_D = blt_inverse(theta_D, omega_D)
        gamma_D = alpha_D / (1 - lambda_D)
        beta = 1 - gamma_D.sum()
        squares_b = (
            steps * beta**2
            + 2 * beta * (gamma_D @ _sums(lambda_D, steps))
            + gamma_D @ _sums(np.outer(lambda_D, lambda_D), steps) @ gamma_D
        )
        squares_c = _squared_sensitivity(theta_D, omega_D, steps, min_separation)
        return 0.5 * float(np.log(squares_c * squares_b))

    # j^(-1/2) / √π, which the optimum resembles, as a mixture of exponentials e^(-s j).
    rates_D = np.geomspace(1.0, 0.3 / steps, buffers) if buffers > 1 else np.array([steps**-0.5])
    weights_D = np.sqrt(rates_D)
    start = np.concatenate([-np.log(np.expm1(rates_D)), np.log(weights_D / weights_D.sum())])
    bounds = [(-20.0, 20.0)] * buffers + [(-30.0, 5.0)] * buffers
    theta_D, omega_D = parameters(_minimum(objective, start.clip(-20, 20), "3-point", bounds))
    theta_D.setflags(write=False)
    omega_D.setflags(write=False)
    return theta_D, omega_D


def blt_inverse(theta_D: Array, omega_D: Array) -> tuple[Array, Array]:
    """λ and α of C⁻¹, whose coefficients are 1 and then -Σ_d α_d λ_d^(j-1).

    C⁻¹ z has the state s ← (diag θ - 1 ωᵀ) s + z, similar to the symmetric diag θ - √ω √ωᵀ.
    """
    root_D = np.sqrt(omega_D)
    lambda_D, vectors_DD = np.linalg.eigh(np.diag(theta_D) - np.outer(root_D, root_D))
    return lambda_D, (root_D @ vectors_DD) ** 2


def _squared_sensitivity(theta_D: Array, omega_D: Array, steps: int, min_separation: int) -> float:
    """‖Σ_i column i · min_separation of C‖², over whole periods: Q of them, R steps in each."""
    if min_separation == steps:
        pairs_DD = _sums(np.outer(theta_D, theta_D), steps - 1)
        return float(1 + omega_D @ pairs_DD @ omega_D)
    periods_Q = np.arange(-(-steps // min_separation))
    period_D = theta_D**min_separation
    # Of column sums: step r > 0 of period q has Σ_d ω_d θ_d^(r-1) (1 + … + θ_d^(q R)).
    heard_DQ = (1 - period_D[:, None] ** (periods_Q + 1)) / (1 - period_D[:, None])
    pairs_DD = _sums(np.outer(theta_D, theta_D), min_separation - 1) * (heard_DQ @ heard_DQ.T)
    first_Q = 1 + (omega_D * theta_D ** (min_separation - 1)) @ (
        heard_DQ - period_D[:, None] ** periods_Q
    )
    return float(first_Q @ first_Q + omega_D @ pairs_DD @ omega_D)


def _sums(base: Array, count: int) -> Array:
    """Σ base^j for j = 0 … count - 1, elementwise, for bases below 1."""
    return np.asarray((1 - base**count) / (1 - base))


def _divided(ones: Array, c: Array) -> tuple[Array, Array]:
    """1 / c and 1 / c², times 1 + x + x² + …, as series of len(ones) terms."""
    if len(c) <= _SHORT:
        b = lfilter([1.0], c, ones)
        return b, lfilter([1.0], c, b)
    inverse = np.array([1 / c[0]])
    while len(inverse) < len(ones):  # Newton: twice as many terms are right each time
        count = min(2 * len(inverse), len(ones))
        rest = -fftconvolve(c[:count], inverse)[:count]
        rest[0] += 2
        inverse = fftconvolve(inverse, rest)[:count]
    b = inverse.cumsum()
    return b, fftconvolve(inverse, b)[: len(ones)]


def _correlated(b: Array, g: Array, count: int) -> Array:
    """Σ_t b_t g_{t-k} for k = 0 … count - 1."""
    if count <= _SHORT:
        return np.array([b[k:] @ g[: len(g) - k] for k in range(count)])
    return np.asarray(fftconvolve(b, g[::-1])[len(g) - 1 : len(g) - 1 + count])


def _minimum(objective: Any, start: Array, jac: Any, bounds: Any) -> Array:
    """Where L-BFGS-B ends, deterministic on one machine."""
    settings: Any = {"maxiter": 500, "maxfun": 20_000, "ftol": 1e-10, "gtol": 1e-8}
    search: Any = minimize  # its stubs know none of these unions
    found = search(objective, start, jac=jac, bounds=bounds, method="L-BFGS-B", options=settings)
    return np.asarray(found.x)
