"""How long does every statistic of an attack take on 100,000 scores? Wanted: 1 s all together."""

import argparse
from collections.abc import Callable
from itertools import cycle

import numpy as np
from _harness import arguments, report, summary, time_runs

from attacks import statistics

WANTED_S = 1.0
DELTA = 1e-6
PERMUTATIONS = 1000

Question = Callable[[np.ndarray, np.ndarray, np.random.Generator], object]

QUESTIONS: dict[str, Question] = {
    "ROC curve": lambda s, m, _: statistics.roc_curve(s, m),
    "AUC with interval": lambda s, m, _: statistics.auc(s, m),
    "AUC, distribution-free": lambda s, m, _: statistics.auc_distribution_free(s, m),
    "TPR at FPR 10%, 1% and 0.1%": lambda s, m, _: [
        statistics.tpr_at_fpr(s, m, fpr) for fpr in (0.1, 0.01, 0.001)
    ],
    "pointwise band, 100 points": lambda s, m, _: statistics.pointwise_band(s, m),
    "simultaneous band, 100 points": lambda s, m, _: statistics.simultaneous_band(s, m),
    "one-run epsilon, delta 1e-6": lambda s, m, _: statistics.one_run_audit(s, m, DELTA),
    f"{PERMUTATIONS} permutations, AUC": lambda s, m, rng: statistics.permutation_control(
        s, m, statistics.Auc(), PERMUTATIONS, rng
    ),
    f"{PERMUTATIONS} permutations, TPR at 1%": lambda s, m, rng: statistics.permutation_control(
        s, m, statistics.TprAtFpr(0.01), PERMUTATIONS, rng
    ),
    "exposure from a sample": lambda s, _m, _r: statistics.exposure_by_sample(3.0, s, 10**9),
    "mean with interval": lambda s, _m, _r: statistics.mean_estimate(s),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--records", type=int, default=100_000)
    options = arguments(__doc__, parser)
    rng = np.random.default_rng(1)
    samples = []  # a fresh one for every run, so that no bound is remembered from the last
    for _ in range(options.runs + 1):
        member = rng.random(options.records) < 0.5
        samples.append((rng.normal(size=options.records) + member, member))
    rates = {}
    for name, question in QUESTIONS.items():
        turn = cycle(samples)
        rates[name] = summary(
            time_runs(lambda ask=question, turn=turn: ask(*next(turn), rng), options.runs)
        )
    total = sum(seconds["median_s"] for seconds in rates.values())
    lines = [f"{name:32}{1e3 * seconds['median_s']:10.1f} ms" for name, seconds in rates.items()]
    lines.append(f"{'all together':32}{1e3 * total:10.1f} ms")
    lines.append(f"wanted {WANTED_S} s: {'reached' if total <= WANTED_S else 'MISSED'}")
    results = {"records": options.records, "total_median_s": total, "seconds": rates}
    report("statistics", options, ["numpy", "scipy"], results, "\n".join(lines))


if __name__ == "__main__":
    main()
