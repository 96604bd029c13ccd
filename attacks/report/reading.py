"""How to read the table: every term that stands in it, explained."""

from __future__ import annotations

from collections.abc import Iterator

from attacks.report import figures, wording
from attacks.report.findings import FindingRecord, Findings
from attacks.scoring import secrecy
from attacks.threat import Moment, Population, Status

Entry = tuple[str, str]
"""(term, meaning); a meaning begins in lower case and ends with a full stop."""


def reading(findings: Findings) -> list[Entry]:
    """What the terms in these findings mean, and no others."""
    return [
        *_bounds(findings),
        *_membership(findings),
        *_shares(findings),
        *_verdicts(findings),
        *_price(findings),
        (
            "this report",
            "is not differentially private: it states exact figures of systems that ran on the "
            "data.",
        ),
    ]


def _bounds(findings: Findings) -> Iterator[Entry]:
    said = {Moment.TRAINING: "the training", Moment.INFERENCE: "what is sent of one request"}
    bounded = [
        said.get(moment, "what is sent")
        for moment, protections in findings.moments()
        if any(finding.bounds_epsilon for p in protections for finding in p.findings)
    ]
    if bounded:
        yield (
            "ε ≥ x (ceiling y)",
            f"{' or '.join(bounded)} is not (e, δ)-differentially private for any e below x. All "
            f"bounds of one row hold together with probability {findings.confidence:.3g}. A "
            "perfect attack on this many records would have shown y: a bound at its ceiling means "
            "“at least”, and a claim above the ceiling cannot be tested.",
        )


def _membership(findings: Findings) -> Iterator[Entry]:
    if "text" in _populations(findings):
        fpr = figures.rate_name(findings.fpr)
        yield (
            f"TPR at {fpr} FPR, AUC",
            f"share of text records trained on that are found while {fpr} of the others are "
            f"accused (chance: {fpr}), and area under the ROC curve (chance: 0.50), of the attack "
            "on text with the largest bound. Each interval holds by itself with probability "
            f"{100 * findings.confidence:.3g}%.",
        )
    if "gradients" in _populations(findings):
        yield (
            "white-box, gradients",
            "the adversary sees every noised gradient on the way and knows every record but the "
            "canary in question: the strongest that the claim speaks of.",
        )
    if "engine" in _populations(findings):
        yield (
            "what the engine did",
            "variance of its noise and of its batches over what is claimed (1.00); the first "
            "figure is that of the parameter tensor with the least noise. All intervals of one "
            f"row hold together with probability {secrecy.CONFIDENCE}; less noise or other batches "
            "than claimed is a leak.",
        )
    ranked = next((p.secrets.metric for p in findings.protections if p.secrets), None)
    if ranked is not None:
        yield "secrets", f"{ranked}; a secret never seen ranks first once in so many."


def _shares(findings: Findings) -> Iterator[Entry]:
    populations = _populations(findings)
    if not populations.isdisjoint({"texts", "prompts"}):
        yield (
            "in order, as a set, exactly",
            "share of the tokens that the attack puts where they stood; distinct tokens that were "
            "there and were named, over those that were there or were named; share of texts that "
            "it gets whole. Chance is what the same reconstructions reach against the text of "
            "somebody else.",
        )
    if "uploads" in populations:
        yield (
            "matched",
            "share of uploads for which the attack names the update behind it, of several that it "
            "chose itself; chance is one in so many.",
        )
    if "requests" in populations:
        fpr = figures.rate_name(findings.fpr)
        yield (
            "AUC, TPR of requests",
            "the adversary knows two prompts and must say which was sent. Chance is 0.50, and "
            f"{fpr} where {fpr} are accused wrongly.",
        )


def _verdicts(findings: Findings) -> Iterator[Entry]:
    yield "leak", "a measurement exceeds the claim, or something shows and nothing was claimed."
    if any(p.claim.epsilon is not None for p in findings.protections):
        yield (
            "within claim",
            "no attack here contradicts the claim, though the same attack exceeds it where nothing "
            "protects. It is no proof: a better attack may show more.",
        )
    if any(p.claim.nothing_leaks for p in findings.protections):
        yield (
            "no evidence",
            "it is claimed that nothing leaks; over enough trials the attacks here succeed at most "
            f"{100 * secrecy.MARGIN:g} points more often than chance, and the same attacks win "
            "where the protection is weakened. It is no proof: a better attack may show more.",
        )
    if any(f.status is Status.NOT_APPLICABLE for p in findings.protections for f in p.findings):
        yield "not applicable", "shown beside a claim that other figures are held against."
    yield (
        "not evaluable",
        "no outcome could have contradicted the claim: even a perfect attack would not reach it, "
        "this one is too weak where nothing protects, or too little was attacked.",
    )


def _price(findings: Findings) -> Iterator[Entry]:
    said = []
    for moment, protections in findings.moments():
        units = ", ".join(dict.fromkeys(p.utility.unit for p in protections))
        what = " of documents that nobody trained on" if moment is Moment.TRAINING else ""
        against = (
            f", against {wording.baseline(moment)}"
            if any(p.utility.baseline is not None for p in protections)
            else ""
        )
        said.append(f"{moment}: {units}{what}{against}")
    yield (
        "utility",
        "what the protected system is still good for; lower is better. "
        f"{_capital('; '.join(said))}. A change has no interval of its own.",
    )
    yield (
        "time, bytes",
        "of the protected path on this machine, for one unit of work, which is named; 0 B where "
        "nothing crosses a wire.",
    )


def _populations(findings: Findings) -> set[Population]:
    found: list[FindingRecord] = [f for p in findings.protections for f in p.findings]
    return {finding.population for finding in found}


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
