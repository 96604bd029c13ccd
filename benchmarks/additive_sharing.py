"""How long does one update of 10 million float32 parameters take through two servers?

Encode, share with all but one share a seed, sum at each server, open and decode; in buffers that
exist already, as in every round but the first. Wanted: 0.5 s in all.
"""

import argparse
import time
from typing import Any

import torch
from _harness import PeakMemory, arguments, report, summary

from protocols.fixed_point import FixedPoint
from protocols.randomness import Stream
from protocols.ring import FIELD_61, Z_2_32, Z_2_64, Ring
from protocols.sharing import SeedShare, ShareSum, VectorShare, open_additive, share_additive

WANTED_S = 0.5
PHASES = ("encode", "share", "sum at the seed server", "sum at the other", "open", "decode")


def measure(ring: Ring[Any], parameters: int, runs: int, at_random: bool) -> dict[str, Any]:
    fixed = FixedPoint(clip=1.0, bits=16, clients=1000, ring=ring)
    stream = Stream.fresh("benchmark")
    x = torch.randn(parameters, generator=torch.Generator().manual_seed(1)).mul_(0.1)
    encoded, seed_sum, vector_sum = (ring.zeros(parameters) for _ in range(3))
    decoded = torch.zeros(parameters)
    seconds: dict[str, list[float]] = {phase: [] for phase in (*PHASES, "in all")}
    wire: dict[str, int] = {}

    def one_round() -> list[float]:
        marks = [time.perf_counter()]
        fixed.encode(x, stream=stream if at_random else None, out=encoded)
        marks.append(time.perf_counter())
        seed_share, vector_share = share_additive(encoded, ring, 2, stream, out=encoded)
        marks.append(time.perf_counter())
        first = ShareSum(seed_share, out=seed_sum)
        marks.append(time.perf_counter())
        second = ShareSum(vector_share, out=vector_sum)
        marks.append(time.perf_counter())
        total = open_additive([first.share(), second.share()], out=encoded)
        marks.append(time.perf_counter())
        fixed.decode(total, 1, out=decoded)
        marks.append(time.perf_counter())
        assert isinstance(seed_share, SeedShare)
        assert isinstance(vector_share, VectorShare)
        wire["to the seed server"] = len(seed_share.seed)
        wire["to the other"] = parameters * ring.element_bytes
        return marks

    one_round()
    error = (decoded - x.clamp(-1, 1)).abs().max().item()
    assert error <= 2 * fixed.max_rounding_error + 1e-7, error
    for _ in range(runs):
        marks = one_round()
        for phase, start, end in zip(PHASES, marks, marks[1:], strict=False):
            seconds[phase].append(end - start)
        seconds["in all"].append(marks[-1] - marks[0])
    with PeakMemory() as memory:
        one_round()
    return {
        "phases": {phase: summary(values) for phase, values in seconds.items()},
        "bytes_on_wire": wire,
        "bytes_on_wire_per_parameter": sum(wire.values()) / parameters,
        "peak_extra_memory_bytes": memory.extra_bytes,
        "buffers_bytes": 3 * parameters * ring.element_bytes + 4 * parameters,
        "largest_error_in_steps": error / fixed.step,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parameters", type=int, default=10_000_000)
    options = arguments(__doc__, parser)
    cases = {
        "Z_2^64": (Z_2_64, False),
        "Z_2^32": (Z_2_32, False),
        "Z_2^64 at random": (Z_2_64, True),
        "Z_(2^61-1)": (FIELD_61, False),
    }
    results = {
        name: measure(ring, options.parameters, options.runs, at_random)
        for name, (ring, at_random) in cases.items()
    }
    lines = [f"{'milliseconds':28}" + "".join(f"{name:>18}" for name in results)]
    for phase in (*PHASES, "in all"):
        figures = (1e3 * r["phases"][phase]["median_s"] for r in results.values())
        lines.append(f"{phase:28}" + "".join(f"{figure:>18.1f}" for figure in figures))
    for label, key, unit in (
        ("bytes/parameter on wire", "bytes_on_wire_per_parameter", 1),
        ("peak extra memory, MB", "peak_extra_memory_bytes", 1e6),
    ):
        lines.append(f"{label:28}" + "".join(f"{r[key] / unit:>18.2f}" for r in results.values()))
    wanted = {name: results[name]["phases"]["in all"]["median_s"] for name in ("Z_2^64", "Z_2^32")}
    reached = max(wanted.values()) < WANTED_S
    lines.append(
        f"wanted {WANTED_S} s in all over Z_2^64 and Z_2^32: {'reached' if reached else 'MISSED'}"
    )
    content = {
        "parameters": options.parameters,
        "torch_threads": torch.get_num_threads(),
        "wanted_s": WANTED_S,
        "reached": reached,
        "rings": results,
    }
    report(
        "additive-sharing", options, ["numpy", "torch", "cryptography"], content, "\n".join(lines)
    )


if __name__ == "__main__":
    main()
