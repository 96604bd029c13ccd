"""A suite: several protections of one experiment, attacked alike, in one result.

The suite's file is YAML (see ``attacks/suites/default.yaml``). Nothing about an
attack is chosen after a model has been seen.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import torch

from attacks.catalogue import ATTACKS
from attacks.scoring import Curve, Measurement, attacks_on, measure
from attacks.statistics import Estimate, ratio_estimate
from attacks.targets import (
    ClearSum,
    ClearUpdate,
    DpSgd,
    NoisedSplit,
    NoProtection,
    PlainSplit,
    Protection,
    Scene,
    SecretShared,
    Setup,
    Watch,
    decode_config,
    fresh_stream,
    load_config,
    prepare,
)
from attacks.threat import (
    Attack,
    Claim,
    Cost,
    Finding,
    Moment,
    Population,
    Scores,
    Status,
    Utility,
    promised,
)

SCHEMA_VERSION = 2
_PACKAGES = ("privlm", "torch", "numpy", "scipy", "opacus", "dp-accounting", "tokenizers")


class SuiteConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An audit: what is protected and how, and how it is measured.

    ``seed`` drives initialisation, the public split and label permutations. The
    coins that decide membership, and all noise, are fresh secrets on every run.
    """

    protections: Annotated[
        tuple[
            NoProtection | DpSgd | ClearUpdate | ClearSum | SecretShared | PlainSplit | NoisedSplit,
            ...,
        ],
        msgspec.Meta(min_length=1),
    ]
    setup: Setup = Setup()
    measurement: Measurement = Measurement()
    seed: Annotated[int, msgspec.Meta(ge=0)] = 0

    def __post_init__(self) -> None:
        _refuse_repeated([protection.name for protection in self.protections])


def _refuse_repeated(names: list[str], of: str = "protections") -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{of}: the name {name!r} stands twice")


@dataclass(frozen=True)
class ProtectionResult:
    """One row of the table.

    Attributes:
        moment: when it protects.
        name: of the protection.
        claim: what it promises.
        findings: one an attack and population; what is held against the claim holds together.
        curves: for drawing.
        utility: what the protected system is still good for.
        cost: in time and traffic.
        details: of what ran.
        scores: of every candidate record, for the owner of the records.
    """

    moment: Moment
    name: str
    claim: Claim
    findings: tuple[Finding, ...]
    curves: tuple[Curve, ...] = field(repr=False)
    utility: Utility
    cost: Cost
    details: dict[str, float | int | str]
    scores: tuple[Scores, ...] = field(repr=False)

    @property
    def exceeds_claim(self) -> bool:
        """Something was promised and a measurement contradicts it."""
        return self.claim.promises and self.status is Status.LEAK

    @property
    def status(self) -> Status:
        """The verdict over all findings.

        A leak anywhere is a leak. That nothing leaks has to hold for every figure that was held
        against it, while ε is bounded by whatever could bound it; a claim that nothing was held
        against is not evaluable.
        """
        statuses = {finding.status for finding in self.findings} - {Status.NOT_APPLICABLE}
        if Status.LEAK in statuses:
            return Status.LEAK
        if self.claim.nothing_leaks:
            return Status.NO_EVIDENCE if statuses == {Status.NO_EVIDENCE} else Status.NOT_EVALUABLE
        if Status.WITHIN_CLAIM in statuses:
            return Status.WITHIN_CLAIM
        if statuses or self.claim.promises:
            return Status.NOT_EVALUABLE
        return Status.NOT_APPLICABLE


@dataclass(frozen=True)
class SuiteResult:
    """Everything an audit found, with what it takes to repeat it."""

    config: SuiteConfig
    results: tuple[ProtectionResult, ...]
    base_utility: Estimate
    counts: dict[str, int]
    provenance: dict[str, Any]
    record_ids: tuple[str, ...] = field(repr=False)
    member_N: Any = field(repr=False)
    canary_N: Any = field(repr=False)

    @property
    def exceeds_claim(self) -> bool:
        """Some protection leaks more than it promises."""
        return any(result.exceeds_claim for result in self.results)

    @property
    def has_untested_claim(self) -> bool:
        """Something is claimed that no attack here could have contradicted."""
        return any(
            result.claim.promises and result.status is Status.NOT_EVALUABLE
            for result in self.results
        )


def default_suite() -> str:
    """The text of the suite that runs when none is named."""
    return resources.files("attacks").joinpath("suites/default.yaml").read_text("utf-8")


def load_suite(path: Path | None) -> SuiteConfig:
    """The suite in a YAML file, or the default one.

    Raises:
        ConfigError: names the file and the key.
    """
    if path is None:
        return decode_config(default_suite(), SuiteConfig, where="the default suite")
    return load_config(path, SuiteConfig)


def run_suite(
    config: SuiteConfig,
    *,
    ledger_dir: Path,
    watch: Watch,
    protections: Sequence[Protection] = (),
    attacks: Sequence[Attack[Any]] = (),
) -> SuiteResult:
    """Run every protection, attack each alike, and judge.

    Args:
        config: declared beforehand.
        ledger_dir: where every protection's releases are recorded.
        watch: where progress is shown.
        protections: of one's own, after those of ``config``.
        attacks: of one's own, after those of ``config.measurement``.

    Raises:
        ConfigError, DataError, ValueError: before anything is trained where the
            configuration cannot work; the message says what to change.
    """
    started = datetime.datetime.now(datetime.UTC)
    rng = np.random.default_rng(config.seed)
    every = (*config.protections, *protections)
    _refuse_repeated([protection.name for protection in every])
    chosen = (*(ATTACKS[name] for name in config.measurement.attacks), *attacks)
    _refuse_repeated([attack.name for attack in chosen], "attacks")
    _refuse_unseen(every, chosen)
    scene = prepare(
        config.setup,
        every,
        seed=config.seed,
        stream=fresh_stream("audit"),
        ledger_dir=ledger_dir,
        watch=watch,
    )
    counts: dict[str, int] = {}
    results = with_positive_control(
        tuple(_audit(scene, protection, chosen, config, rng, counts) for protection in every)
    )
    truth = None if scene.training is None else scene.training.truth
    return SuiteResult(
        config=config,
        results=results,
        base_utility=ratio_estimate(scene.base_utility.bits_D, scene.base_utility.bytes_D),
        counts={
            **_training_counts(scene),
            **counts,
            "duplicate records dropped": len(scene.corpus.blocks.duplicates),
            "test documents": len(scene.base_utility.bits_D),
        },
        provenance={
            "started": started.isoformat(timespec="seconds"),
            "seconds": (datetime.datetime.now(datetime.UTC) - started).total_seconds(),
            "versions": {"python": platform.python_version()}
            | {name: importlib.metadata.version(name) for name in _PACKAGES},
            "hardware": {
                "processor": platform.processor() or platform.machine(),
                "system": f"{platform.system()} {platform.release()}",
                "cores": os.cpu_count(),
                "torch threads": torch.get_num_threads(),
            },
        },
        record_ids=() if scene.training is None else scene.training.candidates.record_ids,
        member_N=np.zeros(0, bool) if truth is None else truth.member_N,
        canary_N=np.zeros(0, bool) if truth is None else truth.canary_N,
    )


def _refuse_unseen(protections: Sequence[Protection], attacks: Sequence[Attack[Any]]) -> None:
    seen = {attack.sees for attack in attacks}
    for protection in protections:
        for view in protection.shows:
            if view not in seen:
                raise ValueError(
                    f"measurement.attacks: none of them sees a {view.__name__}, which "
                    f"{protection.name!r} shows; name one that does"
                )


def _audit(
    scene: Scene,
    protection: Protection,
    attacks: tuple[Attack[Any], ...],
    config: SuiteConfig,
    rng: np.random.Generator,
    counts: dict[str, int],
) -> ProtectionResult:
    target = protection.run(scene)
    steps = attacks_on(target, attacks)
    with scene.watch(f"attacks on {protection.name}", steps) as after_attack:
        measured = measure(target, attacks, config.measurement, rng, after_attack)
    for finding in measured.findings:
        if protection.moment is not Moment.TRAINING or finding.population == "gradients":
            what = _COUNTED.get(finding.population, finding.population)
            counts[what] = max(finding.n, counts.get(what, 0))
    return ProtectionResult(
        moment=protection.moment,
        name=protection.name,
        claim=target.claim,
        findings=measured.findings,
        curves=measured.curves,
        utility=target.utility,
        cost=target.cost,
        details=target.details,
        scores=measured.scores,
    )


_COUNTED = {
    "gradients": "gradient canaries",
    "texts": "tokens of client texts",
    "uploads": "uploads in the matching game",
    "prompts": "tokens of prompts",
    "requests": "requests told apart",
    "canary rows": "requests of canary rows",
}


def _training_counts(scene: Scene) -> dict[str, int]:
    if scene.training is None:
        return {}
    truth = scene.training.truth
    return {
        "text records": int((~truth.canary_N).sum()),
        "text records trained on": int(truth.member_N[~truth.canary_N].sum()),
        "canaries": int(truth.canary_N.sum()),
        "canaries trained on": int(truth.member_N[truth.canary_N].sum()),
        "secrets": len(truth.secret_member_K),
        "secrets trained on": int(truth.secret_member_K.sum()),
    }


def with_positive_control(
    results: tuple[ProtectionResult, ...],
) -> tuple[ProtectionResult, ...]:
    """Call "within claim" only what the same attack contradicts where nothing protects.

    An attack that shows less than the claimed ε on the unprotected model could
    not have contradicted the claim; that it did not is no finding.
    """
    unprotected = {
        (finding.attack, finding.population, finding.metric): finding.lower_bound
        for result in results
        if not result.claim.promises
        for finding in result.findings
        if finding.lower_bound is not None
    }
    return tuple(
        dataclasses.replace(
            result,
            findings=tuple(
                _controlled(finding, result.claim.epsilon, unprotected)
                for finding in result.findings
            ),
        )
        for result in results
    )


def _controlled(
    finding: Finding,
    epsilon: float | None,
    unprotected: dict[tuple[str, Population, str], float],
) -> Finding:
    if finding.status is not Status.WITHIN_CLAIM or epsilon is None:
        return finding
    shown = finding.broken_bound
    if shown is None:
        shown = unprotected.get((finding.attack, finding.population, finding.metric))
    if shown is None:
        reason = (
            "nothing unprotected shows what this attack can do at this δ; add the baseline of this "
            "moment, and set measurement.delta to the claim's"
        )
    elif shown <= epsilon:
        reason = (
            f"the same attack shows only ε ≥ {shown:.2f} where nothing protects, "
            f"no more than the claimed {promised(epsilon)}"
        )
    else:
        return dataclasses.replace(
            finding,
            reason=f"{finding.reason}; where nothing protects the same attack shows {shown:.2f}",
        )
    return dataclasses.replace(finding, status=Status.NOT_EVALUABLE, reason=reason)
