"""Made-up audits for the tests of the report."""

import io
import math
from dataclasses import replace

import msgspec
import numpy as np
import torch
from rich.console import Console

from attacks.report import (
    findings_of,
    print_findings,
)
from attacks.scoring import Curve, Measurement
from attacks.statistics import Estimate, Interval, RocBand
from attacks.suite import ProtectionResult, SuiteConfig, SuiteResult
from attacks.targets import DpSgd, NoProtection
from attacks.threat import Claim, Control, Cost, Finding, Moment, Scores, Status, Utility

NAMES = {"findings.json", "report.html", "records.csv", "records.key"}
HOSTILE = "<script>alert('x')</script>"
IDS = tuple(f"Ann's diary & more#{n}" for n in range(60)) + tuple(
    f"planted-token-{n}" for n in range(40)
)
MEMBER_N = np.arange(100) % 2 == 0
CANARY_N = np.arange(100) >= 60


def estimate(value, low, high, confidence=0.95, n=100):
    return Estimate(value, Interval(low, high, confidence), n, "made up")


def membership(attack, population, bound, area, status, reason, *, tpr=None):
    further = {"AUC": estimate(area, area - 0.03, min(1.0, area + 0.03))}
    if tpr is not None:
        further["TPR at 0.01 FPR"] = estimate(tpr, tpr / 2, min(1.0, tpr * 2))
    return Finding(
        attack=attack,
        population=population,
        metric="lower bound on ε at δ = 1e-05",
        estimate=estimate(bound, bound, math.inf, 0.993),
        n=1000,
        lower_bound=bound,
        ceiling=5.0217,
        controls=(
            Control("AUC of a blind baseline", 0.49, 0.46, 0.52),
            Control("AUC under permuted labels", 0.5, 0.47, 0.53, 0.005),
        ),
        status=status,
        reason=reason,
        further=further,
    )


def secrets_finding(share, status, reason):
    return Finding(
        attack="exposure",
        population="secrets",
        metric="share of secrets ranked first of 256",
        estimate=estimate(share, max(0.0, share - 0.1), min(1.0, share + 0.1), 0.993, 48),
        n=48,
        lower_bound=max(0.0, share - 0.1),
        ceiling=0.9,
        controls=(
            Control("exposure of secrets not planted, bits", 1.5, 1.0, 2.0),
            Control("exposure under the public model, bits", 1.4, 0.9, 2.0),
        ),
        status=status,
        reason=reason,
        further={"exposure, bits": estimate(8.0 * share, 0.0, 8.0)},
    )


def gradients_finding(bound, status, reason):
    return replace(
        membership("white-box", "gradients", bound, 0.6, status, reason, tpr=0.05),
        controls=(Control("the same attack where the noise is left out, ε", 4.85, 4.85, math.inf),),
        broken_bound=4.85,
    )


def engine_finding(ratio, status, reason):
    return Finding(
        attack="laws of noise and batches",
        population="engine",
        metric="variance of the noise over the claimed",
        estimate=estimate(ratio, 0.9 * ratio, 1.1 * ratio, 0.99996, 9017),
        n=189_600,
        controls=(),
        status=status,
        reason=reason,
        further={"joins of canaries": estimate(1.01, 0.98, 1.04, 0.99996)},
    )


def watched(result):
    """The same, with the engines of what claims ε watched; the last lacks noise in a tensor."""

    def with_engine(row, ratio, status):
        found = (
            gradients_finding(row.claim.epsilon / 4, Status.WITHIN_CLAIM, "it stays"),
            engine_finding(ratio, status, "noise in embed.weight" if ratio < 1 else "as claimed"),
        )
        curve_points = ((1e-5, 2e-5), (0.01, 0.0234), (1.0, 1.0))
        return replace(
            row,
            claim=replace(row.claim, trade_off=curve_points),
            findings=(*row.findings, *found),
            curves=(*row.curves, curve("white-box", "gradients", 0.8)),
        )

    plain, eight, one = result.results
    return replace(
        result,
        results=(
            plain,
            with_engine(eight, 1.0, Status.NOT_APPLICABLE),
            with_engine(one, 0.123, Status.LEAK),
        ),
    )


def curve(attack, population, power):
    fpr = np.geomspace(0.01, 0.99, 100)
    tpr = fpr**power
    columns = (fpr, tpr, tpr * 0.7, np.minimum(1.0, tpr * 1.3))
    band = RocBand(*(tuple(c.tolist()) for c in columns), 0.95, "pointwise", "made up")
    return Curve(attack, population, band)


def protection(name, claim, status, reason, bound, area, utility, share, *, seed):
    rng = np.random.default_rng(seed)
    return ProtectionResult(
        moment=Moment.TRAINING,
        name=name,
        claim=claim,
        findings=(
            membership("loss", "text", bound / 2, area, status, reason, tpr=2 * area - 0.99),
            membership("loss", "canaries", bound, area, status, reason),
            secrets_finding(share, status, reason),
        ),
        curves=(curve("loss", "text", 2 - 2 * area), curve("loss", "canaries", 2 - 2 * area)),
        utility=Utility(
            estimate(utility, utility - 0.2, utility + 0.2, n=9), "bits per byte", 2.55
        ),
        cost=Cost(74.4, None, "run"),
        details={"steps": 560, "noise_multiplier": 1.288},
        scores=(Scores("loss", torch.from_numpy(rng.normal(size=100))),),
    )


def dp_claim(epsilon):
    return Claim(
        adversary="whoever holds the released model",
        assumption="Poisson-sampled batches",
        guarantee=f"({epsilon}, 1e-05)-DP for adding or removing one record",
        epsilon=epsilon,
        delta=1e-5,
    )


def made_up_result():
    nothing = Claim("whoever holds the released model", "none", "nothing is claimed")
    rows = (
        ("no protection", nothing, Status.LEAK, "membership shows", 4.9355, 0.99, 2.77, 1.0),
        (
            "DP-SGD at ε = 8",
            dp_claim(8.0),
            Status.NOT_EVALUABLE,
            "even a perfect attack reaches only 5.02 ≤ ε = 8",
            0.7,
            0.6,
            3.06,
            0.0,
        ),
        ("DP-SGD at ε = 1", dp_claim(1.0), Status.WITHIN_CLAIM, "it stays", 0.0, 0.51, 3.9, 0.0),
    )
    privacy = {"target_epsilon": 8.0, "delta": 1e-5}
    config = SuiteConfig(
        protections=(
            NoProtection(),
            msgspec.convert({"type": "dp-sgd", "name": "8", "privacy": privacy}, DpSgd),
        ),
        measurement=Measurement(),
        seed=7,
    )
    return SuiteResult(
        config=config,
        results=tuple(protection(*row, seed=n) for n, row in enumerate(rows)),
        base_utility=estimate(2.55, 2.49, 2.72, n=9),
        counts={
            "text records": 60,
            "text records trained on": 30,
            "canaries": 40,
            "canaries trained on": 20,
            "test documents": 9,
        },
        provenance={
            "started": "2026-11-22T16:52:08+00:00",
            "seconds": 191.5,
            "versions": {"python": "3.11.7", "privlm": "0.1.0"},
            "hardware": {"processor": "x86_64", "cores": 2},
        },
        record_ids=IDS,
        member_N=MEMBER_N,
        canary_N=CANARY_N,
    )


def recovered(population, attack, metric, ends, status, reason, **more):
    """A share with its interval; `more` goes to the finding."""
    low, value, high = ends
    return Finding(
        attack=attack,
        population=population,
        metric=metric,
        estimate=estimate(value, low, high, 0.999, 5120),
        n=more.pop("n", 5120),
        controls=more.pop("controls", ()),
        status=status,
        reason=reason,
        **more,
    )


def texts(in_order, as_set, exactly, status, reason):
    return recovered(
        "texts",
        "gradient span",
        "tokens recovered in order",
        in_order,
        status,
        reason,
        chance=0.0021,
        further={
            "tokens recovered as a set": estimate(as_set, max(0.0, as_set - 0.01), as_set + 0.008),
            "texts recovered exactly": estimate(exactly, max(0.0, exactly - 0.1), exactly + 0.1),
        },
    )


def uploads(ends, status, reason):
    return recovered(
        "uploads",
        "matching",
        "uploads matched to one of 64 updates",
        ends,
        status,
        reason,
        n=5000,
        chance=1 / 64,
        controls=(Control("the same attack where masks repeat", 0.98, 0.97, 0.99),),
    )


def prompts(attack, ends, status, reason):
    guessed = Control("the most frequent public token everywhere", 0.0712, 0.0712, 0.0712)
    return recovered(
        "prompts",
        attack,
        "tokens recovered in order",
        ends,
        status,
        reason,
        chance=0.0903,
        controls=(guessed,),
    )


def requests(bound, area, status, reason):
    return Finding(
        attack="distinguish",
        population="requests",
        metric="lower bound on ε at δ = 1e-05",
        estimate=estimate(bound, bound, math.inf, 0.999),
        n=1000,
        lower_bound=bound,
        ceiling=4.9934,
        controls=(Control("AUC under permuted labels", 0.5, 0.47, 0.53, 0.005),),
        status=status,
        reason=reason,
        further={
            "AUC": estimate(area, area - 0.03, min(1.0, area + 0.03)),
            "TPR at 0.01 FPR": estimate(0.052, 0.031, 0.081),
        },
    )


def other(moment, name, claim, findings, utility, cost, **details):
    return ProtectionResult(
        moment=moment,
        name=name,
        claim=claim,
        findings=findings,
        curves=(),
        utility=utility,
        cost=cost,
        details=details,
        scores=(),
    )


def nothing_but(what, adversary):
    return Claim(
        adversary=adversary,
        assumption="at least two honest clients in every sum" if "sum" in what else "no collusion",
        guarantee=f"nothing but {what}, whatever the adversary computes",
        nothing_leaks=True,
        short=f"nothing but {what}",
    )


def aggregations():
    server = "the server and all but two clients"
    error = Utility(estimate(3.04e-9, 2.91e-9, 3.18e-9, n=64), "relative error of the sum", 0.0)
    found = "texts are recovered, and nothing was claimed"
    return (
        other(
            Moment.AGGREGATION,
            "plain sums",
            Claim(server, "none", "nothing is claimed"),
            (
                texts((0.9704, 0.9821, 0.9909), 0.9912, 0.8438, Status.LEAK, found),
                uploads((0.9704, 0.9842, 0.9931), Status.LEAK, found),
            ),
            replace(error, estimate=estimate(0.0, 0.0, 0.0, n=64)),
            Cost(0.00123, 2_460_000.0, "client and round"),
        ),
        other(
            Moment.AGGREGATION,
            "masked sums",
            nothing_but("the sum", server),
            (
                texts((0.0, 0.0012, 0.0031), 0.0402, 0.0, Status.NO_EVIDENCE, "at chance"),
                uploads((0.0102, 0.0161, 0.0234), Status.NO_EVIDENCE, "at chance"),
            ),
            error,
            Cost(0.01234, 4_912_345.0, "client and round"),
            clients=8,
            threshold=5,
        ),
    )


def inferences():
    server = "the server that computes the middle layers"
    unit = "bits per byte"
    return (
        other(
            Moment.INFERENCE,
            "split without noise",
            Claim(server, "none", "nothing is claimed"),
            (
                prompts("nearest neighbour", (0.9953, 0.9981, 0.9995), Status.LEAK, "read"),
                prompts("nearest neighbour with prior", (0.9961, 0.999, 1), Status.LEAK, "read"),
            ),
            Utility(estimate(2.39, 2.27, 2.53, n=23), unit, 2.39),
            Cost(0.0021, 8_300.0, "token"),
        ),
        other(
            Moment.INFERENCE,
            "noised split at ε = 2",
            replace(dp_claim(2.0), adversary=server),
            (
                prompts(
                    "nearest neighbour", (0.081, 0.0902, 0.1011), Status.NOT_APPLICABLE, "near"
                ),
                prompts(
                    "nearest neighbour with prior",
                    (0.102, 0.1113, 0.1232),
                    Status.NOT_APPLICABLE,
                    "near",
                ),
                requests(1.2345, 0.71, Status.WITHIN_CLAIM, "it stays"),
            ),
            Utility(estimate(4.71, 4.5, 4.93, n=23), unit, 2.39),
            Cost(0.0022, 8_300.0, "token"),
        ),
        other(
            Moment.INFERENCE,
            "three servers",
            nothing_but("the number of tokens", "any one of three servers"),
            (
                prompts(
                    "nearest neighbour",
                    (0.002, 0.0041, 0.0074),
                    Status.NOT_EVALUABLE,
                    "only 600 tokens were attacked; at least 5,000 are needed",
                ),
            ),
            Utility(estimate(2.4, 2.28, 2.54, n=23), unit, 2.39),
            Cost(1.2345, 1_234_567_890.0, "token"),
        ),
    )


def three_moments():
    """All moments, and not in the order in which a report shows them."""
    result = made_up_result()
    counts = {"client texts": 64, "uploads in the matching game": 5000, "prompts": 160}
    return replace(
        result,
        results=(*inferences(), *result.results, *aggregations()),
        counts=result.counts | counts,
    )


def without_training():
    """What a suite of aggregations and inferences leaves: no record has a score."""
    nobody = np.zeros(0, bool)
    return replace(
        three_moments(),
        results=(*inferences(), *aggregations()),
        counts={"client texts": 64},
        record_ids=(),
        member_N=nobody,
        canary_N=nobody,
    )


def renamed(result, name):
    first, *others = result.results
    return replace(result, results=(replace(first, name=name), *others))


def printed(result, width=80, encoding="utf-8"):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    print_findings(findings_of(result), Console(file=stream, width=width))
    stream.flush()
    return raw.getvalue().decode(encoding)


def quiet():
    return Console(file=io.StringIO(), width=100)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}
