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
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import torch

from attacks.scoring import Curve, Measured, Measurement, measure
from attacks.statistics import Estimate, ratio_estimate
from attacks.targets import (
    DpSgd,
    Experiment,
    NoProtection,
    Protection,
    TrainingSetup,
    Watch,
    decode_config,
    fresh_stream,
    load_config,
    prepare,
    train_target,
)
from attacks.threat import Claim, Finding, Population, Scores, Status, promised

SCHEMA_VERSION = 1
_PACKAGES = ("privlm", "torch", "numpy", "scipy", "opacus", "dp-accounting", "tokenizers")


class SuiteConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An audit: what is trained, how it is protected, how it is measured.

    ``seed`` drives initialisation, the public split and label permutations. The
    coins that decide membership, and all noise, are fresh secrets on every run.
    """

    protections: Annotated[tuple[NoProtection | DpSgd, ...], msgspec.Meta(min_length=1)]
    setup: TrainingSetup = TrainingSetup()
    measurement: Measurement = Measurement()
    seed: Annotated[int, msgspec.Meta(ge=0)] = 0

    def __post_init__(self) -> None:
        names = [protection.name for protection in self.protections]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"protections: the name {name!r} stands twice")


@dataclass(frozen=True)
class ProtectionResult:
    """One row of the table.

    Attributes:
        name: of the protection.
        claim: what it promises.
        findings: one an attack and population; every bound holds simultaneously.
        curves: for drawing.
        utility: bits per byte on the test documents; the document is the unit.
        seconds: of protected training.
        details: of the plan that ran.
        scores: of every candidate record, for the owner of the records.
    """

    name: str
    claim: Claim
    findings: tuple[Finding, ...]
    curves: tuple[Curve, ...] = field(repr=False)
    utility: Estimate
    seconds: float
    details: dict[str, float | int | str]
    scores: tuple[Scores, ...] = field(repr=False)

    @property
    def exceeds_claim(self) -> bool:
        """Something was promised and a bound contradicts it."""
        return self.claim.epsilon is not None and self.status is Status.LEAK

    @property
    def status(self) -> Status:
        """The verdict over all findings: a leak anywhere is a leak."""
        statuses = {finding.status for finding in self.findings}
        for status in (Status.LEAK, Status.WITHIN_CLAIM, Status.NO_EVIDENCE, Status.NOT_EVALUABLE):
            if status in statuses:
                return status
        return Status.NOT_APPLICABLE

    @property
    def strongest(self) -> Finding:
        """The membership finding with the largest lower bound on ε, the first of equals."""
        return max(
            (f for f in self.findings if f.population != "secrets"), key=lambda f: f.lower_bound
        )


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
            result.claim.epsilon is not None and result.status is Status.NOT_EVALUABLE
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


def run_suite(config: SuiteConfig, *, ledger_dir: Path, watch: Watch) -> SuiteResult:
    """Train every protection's model, attack each alike, and judge.

    Args:
        config: declared beforehand.
        ledger_dir: where every protection's releases are recorded.
        watch: where progress is shown.

    Raises:
        ConfigError, DataError, ValueError: before any model is trained where the
            configuration cannot work; the message says what to change.
    """
    started = datetime.datetime.now(datetime.UTC)
    rng = np.random.default_rng(config.seed)
    experiment = prepare(
        config.setup,
        seed=config.seed,
        stream=fresh_stream("audit"),
        watch=watch,
        protections=config.protections,
    )
    results = tuple(
        _attack(experiment, protection, config, ledger_dir, watch, rng)
        for protection in config.protections
    )
    results = with_positive_control(results)
    truth = experiment.truth
    return SuiteResult(
        config=config,
        results=results,
        base_utility=_utility(experiment.base_utility),
        counts={
            "text records": int((~experiment.canary_N).sum()),
            "text records trained on": int(truth.member_N[~experiment.canary_N].sum()),
            "canaries": int(experiment.canary_N.sum()),
            "canaries trained on": int(truth.member_N[experiment.canary_N].sum()),
            "secrets": len(truth.secret_member_K),
            "secrets trained on": int(truth.secret_member_K.sum()),
            "duplicate records dropped": len(experiment.corpus.blocks.duplicates),
            "test documents": len(experiment.base_utility.bits_D),
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
        record_ids=experiment.candidates.record_ids,
        member_N=truth.member_N,
        canary_N=experiment.canary_N,
    )


def with_positive_control(
    results: tuple[ProtectionResult, ...],
) -> tuple[ProtectionResult, ...]:
    """Call "within claim" only what the same attack contradicts where nothing protects.

    An attack that shows less than the claimed ε on the unprotected model could
    not have contradicted the claim; that it did not is no finding.
    """
    unprotected = {
        (finding.attack, finding.population): finding.lower_bound
        for result in results
        if result.claim.epsilon is None
        for finding in result.findings
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
    unprotected: dict[tuple[str, Population], float],
) -> Finding:
    if finding.status is not Status.WITHIN_CLAIM or epsilon is None:
        return finding
    shown = unprotected.get((finding.attack, finding.population))
    if shown is None:
        reason = "no unprotected model shows what this attack can do; add a protection of type none"
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


def _attack(
    experiment: Experiment,
    protection: Protection,
    config: SuiteConfig,
    ledger_dir: Path,
    watch: Watch,
    rng: np.random.Generator,
) -> ProtectionResult:
    target = train_target(experiment, protection, ledger_dir=ledger_dir, watch=watch)
    with watch(f"attacks on {protection.name}", 1) as done:
        measured: Measured = measure(
            target.view,
            experiment.truth,
            experiment.canary_N,
            target.claim,
            config.measurement,
            rng,
        )
        done(1)
    return ProtectionResult(
        name=protection.name,
        claim=target.claim,
        findings=measured.findings,
        curves=measured.curves,
        utility=_utility(target.utility),
        seconds=target.seconds,
        details=target.details,
        scores=measured.scores,
    )


def _utility(bits: Any) -> Estimate:
    return ratio_estimate(bits.bits_D, bits.bytes_D)
