"""How fast does a Stream give keystream, on one core? Wanted: 6 GB/s in 64 KiB chunks."""

import os

import numpy as np
from _harness import arguments, report, summary, time_runs

from protocols.randomness import Stream
from protocols.ring import FIELD_61

WANTED_GB_PER_S = 6.0
KIB = 1 << 10
MIB = 1 << 20


def main() -> None:
    options = arguments(__doc__)
    core = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    stream = Stream.fresh("benchmark")
    buffer = np.empty(256 * MIB, np.uint8)
    chunk = buffer[: 64 * KIB]

    def in_chunks() -> None:
        for _ in range(len(buffer) // len(chunk)):
            stream.fill(chunk)

    rates: dict[str, dict[str, float]] = {}
    for name, action, count in (
        ("fill, 64 KiB at a time", in_chunks, len(buffer)),
        ("fill, 256 MiB at once", lambda: stream.fill(buffer), len(buffer)),
    ):
        seconds = summary(time_runs(action, options.runs))
        rates[name] = {**seconds, "gb_per_s": count / seconds["median_s"] / 1e9}
    n = 1_000_000
    for name, action in (
        ("integers below 1000", lambda: stream.integers(1000, n)),
        ("elements of the 61-bit field", lambda: stream.field_elements(FIELD_61.modulus, n)),
        ("coins of probability 0.01", lambda: stream.bernoulli(0.01, n)),
        ("standard normals", lambda: stream.standard_normal(n)),
        ("permutation", lambda: stream.permutation(n)),
    ):
        seconds = summary(time_runs(action, options.runs))
        rates[name] = {**seconds, "ns_each": seconds["median_s"] / n * 1e9}
    lines = [f"{'one core':32}{'rate':>14}"]
    for name, rate in rates.items():
        figure = (
            f"{rate['gb_per_s']:.2f} GB/s"
            if "gb_per_s" in rate
            else f"{rate['ns_each']:.1f} ns each"
        )
        lines.append(f"{name:32}{figure:>14}")
    reached = rates["fill, 64 KiB at a time"]["gb_per_s"] >= WANTED_GB_PER_S
    lines.append(
        f"wanted {WANTED_GB_PER_S} GB/s in 64 KiB chunks: {'reached' if reached else 'MISSED'}"
    )
    results = {"wanted_gb_per_s": WANTED_GB_PER_S, "reached": reached, "rates": rates}
    report("keystream", options, ["numpy", "torch", "cryptography"], results, "\n".join(lines))


if __name__ == "__main__":
    main()
