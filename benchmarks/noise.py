"""What does a parameter's noise cost, on one core? Wanted: 8 ns, drawing, adding and rounding."""

import os
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from _harness import arguments, report, summary, time_runs

from privlm.dp import Banded, Blt, ClippedSum, GaussianMechanism
from privlm.dp.factorization import CorrelatedNoise
from protocols.chacha20 import DeviceStream
from protocols.randomness import Stream

WANTED_NS = 8.0
PARAMETERS = 4_000_000
STEPS = 1000


def main() -> None:
    options = arguments(__doc__)
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    stream = Stream.fresh("benchmark")
    rates: dict[str, dict[str, float]] = {}

    def measure(name: str, action: Callable[[], object], count: int = PARAMETERS) -> None:
        seconds = summary(time_runs(action, options.runs))
        rates[name] = {**seconds, "ns_each": seconds["median_s"] / count * 1e9}

    mechanism = GaussianMechanism(1.0)
    for dtype in (torch.float32, torch.float64):
        clipped = ClippedSum((torch.zeros(PARAMETERS, dtype=dtype),), 1.0)
        name = str(dtype).removeprefix("torch.")
        measure(
            f"release, {name}, in place",
            partial(mechanism.release, clipped, stream, in_place=True),
        )
        measure(f"release, {name}", partial(mechanism.release, clipped, stream))
    normals = np.empty(PARAMETERS)
    measure("normals alone", lambda: stream.fill_normal(normals))
    # What others draw: neither is cryptographic, neither rounds to a grid.
    single, double = torch.zeros(PARAMETERS), torch.zeros(PARAMETERS, dtype=torch.float64)
    measure("torch.normal and add, float32", lambda: single.add_(torch.normal(0, 1, single.shape)))
    measure("torch.normal alone, float64", double.normal_)
    generator = np.random.default_rng(0)
    measure("NumPy's ziggurat alone, float64", lambda: generator.standard_normal(out=normals))

    for strategy in (Banded(1), Banded(2), Banded(8), Banded(32), Blt(2), Blt(4)):
        measure_correlated(strategy, stream.child(str(strategy)), measure)

    device = DeviceStream.of(stream, torch.device("cpu"))
    words = torch.empty(1 << 19, dtype=torch.int64)
    measure("ChaCha20 in tensor operations, a byte", lambda: device.fill(words), words.nbytes)
    values = torch.empty(1 << 18, dtype=torch.float64)
    measure("normals from it", lambda: device.fill_normal(values), len(values))

    lines = [f"{'one core':44}{'ns each':>10}"]
    lines += [f"{name:44}{rate['ns_each']:>10.2f}" for name, rate in rates.items()]
    worst = max(rates[f"release, {name}, in place"]["ns_each"] for name in ("float32", "float64"))
    reached = worst <= WANTED_NS
    lines.append(
        f"wanted {WANTED_NS} ns for a release in place: {'reached' if reached else 'MISSED'}"
    )
    results = {"wanted_ns": WANTED_NS, "reached": reached, "parameters": PARAMETERS, "rates": rates}
    report("noise", options, ["numpy", "torch", "cryptography"], results, "\n".join(lines))


def measure_correlated(
    strategy: Banded | Blt, stream: Stream, measure: Callable[[str, Callable[[], object]], None]
) -> None:
    """One step of correlated noise, in the midst of a run, when all its memory is in use."""
    clipped = ClippedSum((torch.zeros(PARAMETERS),), 1.0)
    noise = CorrelatedNoise(strategy, 1.0, STEPS)
    for step in range(strategy.buffers_for(STEPS)):
        noise.release(clipped, step, stream, in_place=True)
    measure(
        f"correlated, {strategy}, float32",
        lambda: noise.release(clipped, noise.next_step, stream, in_place=True),
    )


if __name__ == "__main__":
    main()
