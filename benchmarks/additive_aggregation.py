"""What does aggregation by additive sharing cost beside aggregation in clear?

One round of 10 clients with a million parameters each and two servers, over Z_2^64 and Z_2^32, in
one process: seconds of each party, bytes on the wire. Both protocols run in turn in every run. In
clear the collector sends the sum back to every client; in the other it keeps it, and clients leave
after one message.
"""

import argparse
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

import torch
from _harness import arguments, report, summary

from protocols.aggregation import Cohort, additive, clear
from protocols.fixed_point import FixedPoint
from protocols.party import Party
from protocols.randomness import Stream
from protocols.ring import Z_2_32, Z_2_64, Ring

ROLES = {
    "additive": ("a client", "the seed server", "the other server", "the collector"),
    "clear": ("a client", "the collector"),
}


def cohort_of(ring: Ring[Any], clients: int, parameters: int) -> Cohort[Any]:
    return Cohort(
        session=Stream.fresh("session").bytes(16),
        clients=tuple(f"client {c}" for c in range(clients)),
        servers=("the seed server", "the other server"),
        collector="the collector",
        length=parameters,
        encoding=FixedPoint(clip=1.0, bits=16, clients=clients, ring=ring),
        min_clients=2,
    )


def parties_of(protocol: Any, cohort: Cohort[Any], updates_KP: torch.Tensor) -> list[Any]:
    stream = Stream.fresh("benchmark")
    parties: list[Any] = [
        protocol.Client(name, cohort, update_P, stream)
        for name, update_P in zip(cohort.clients, updates_KP, strict=True)
    ]
    if protocol is additive:
        parties += [additive.Server(name, cohort, stream) for name in cohort.servers]
    return [*parties, protocol.Collector(cohort.collector, cohort, stream)]


def play(parties: Sequence[Party]) -> tuple[dict[str, float], Counter[str], Counter[str]]:
    """Deliver every message; return seconds, bytes sent and bytes received by party."""
    by_name = {party.name: party for party in parties}
    seconds = dict.fromkeys(by_name, 0.0)
    sent: Counter[str] = Counter()
    received: Counter[str] = Counter()
    in_flight: deque[tuple[str, str, bytes]] = deque()

    def step(name: str, action: Any, *words: Any) -> None:
        start = time.perf_counter()
        outgoing = action(*words)
        seconds[name] += time.perf_counter() - start
        in_flight.extend((name, item.recipient, item.data) for item in outgoing)
        sent[name] += sum(len(item.data) for item in outgoing)

    for party in parties:
        step(party.name, party.start)
    while in_flight:
        sender, recipient, data = in_flight.popleft()
        received[recipient] += len(data)
        step(recipient, by_name[recipient].receive, sender, data)
    return seconds, sent, received


def measure(ring: Ring[Any], clients: int, parameters: int, runs: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    updates_KP = torch.randn((clients, parameters), generator=generator).mul_(0.1)
    cohort = cohort_of(ring, clients, parameters)
    protocols = {"additive": additive, "clear": clear}
    timed: dict[str, dict[str, list[float]]] = {
        name: {role: [] for role in (*ROLES[name], "in all")} for name in protocols
    }
    wire: dict[str, Any] = {}
    for run in range(runs + 1):
        for name, protocol in protocols.items():
            parties = parties_of(protocol, cohort, updates_KP)
            seconds, sent, received = play(parties)
            error = (parties[-1].result.sum_P - updates_KP.double().clamp(-1, 1).sum(0)).abs().max()
            assert error <= clients * cohort.encoding.max_rounding_error
            if run == 0:  # warms up
                wire[name] = {
                    "client_sends": sent["client 0"],
                    "client_receives": received["client 0"],
                    "all_send": sent.total(),
                    "client_sends_per_parameter": sent["client 0"] / parameters,
                    "all_send_per_parameter_and_client": sent.total() / parameters / clients,
                }
                continue
            everybody = sum(seconds[client] for client in cohort.clients)
            timed[name]["a client"].append(everybody / clients)
            for role in ROLES[name][1:]:
                timed[name][role].append(seconds[role])
            timed[name]["in all"].append(sum(seconds.values()))
    return {
        name: {
            "seconds": {role: summary(values) for role, values in timed[name].items()},
            "bytes": wire[name],
        }
        for name in protocols
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parameters", type=int, default=1_000_000)
    parser.add_argument("--clients", type=int, default=10)
    options = arguments(__doc__, parser)
    rings: dict[str, Ring[Any]] = {"Z_2^64": Z_2_64, "Z_2^32": Z_2_32}
    results = {
        name: measure(ring, options.clients, options.parameters, options.runs)
        for name, ring in rings.items()
    }
    columns = [(ring, protocol) for ring in results for protocol in ROLES]
    lines = [f"{'':36}" + "".join(f"{f'{p} {r}':>18}" for r, p in columns)]
    for role in (*ROLES["additive"], "in all"):
        cells = [results[ring][protocol]["seconds"].get(role) for ring, protocol in columns]
        lines.append(
            f"{role + ', ms':36}"
            + "".join(
                f"{1e3 * cell['median_s']:>18.1f}" if cell else f"{'–':>18}" for cell in cells
            )
        )
    for label, key in (
        ("a client sends, bytes/parameter", "client_sends_per_parameter"),
        ("all send, bytes/parameter and client", "all_send_per_parameter_and_client"),
    ):
        cells = [results[ring][protocol]["bytes"][key] for ring, protocol in columns]
        lines.append(f"{label:36}" + "".join(f"{cell:>18.2f}" for cell in cells))
    content = {
        "parameters": options.parameters,
        "clients": options.clients,
        "servers": 2,
        "torch_threads": torch.get_num_threads(),
        "rings": results,
    }
    packages = ["numpy", "torch", "cryptography", "msgspec"]
    report("additive-aggregation", options, packages, content, "\n".join(lines))


if __name__ == "__main__":
    main()
