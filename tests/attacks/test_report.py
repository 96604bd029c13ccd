"""The report of an audit, on a made-up result: what each file says, hides and survives."""

import csv
import errno
import hashlib
import hmac
import html.parser
import io
import itertools
import json
import math
import os
import re
import resource
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from rich.cells import cell_len
from rich.console import Console

from attacks.report import (
    FindingsUnreadable,
    NotARecordKey,
    ReportNotWritten,
    files,
    findings_of,
    print_findings,
    read_findings,
    read_key,
    record_name,
    report_html,
    to_json,
    wording,
    write_report,
)
from attacks.scoring import Curve, Measurement
from attacks.statistics import Estimate, Interval, RocBand
from attacks.suite import ProtectionResult, SuiteConfig, SuiteResult
from attacks.targets import DpSgd, NoProtection
from attacks.threat import Claim, Control, Finding, Scores, Status

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


def curve(attack, population, power):
    fpr = np.geomspace(0.01, 0.99, 100)
    tpr = fpr**power
    columns = (fpr, tpr, tpr * 0.7, np.minimum(1.0, tpr * 1.3))
    band = RocBand(*(tuple(c.tolist()) for c in columns), 0.95, "pointwise", "made up")
    return Curve(attack, population, band)


def protection(name, claim, status, reason, bound, area, utility, share, *, seed):
    rng = np.random.default_rng(seed)
    return ProtectionResult(
        name=name,
        claim=claim,
        findings=(
            membership("loss", "text", bound / 2, area, status, reason, tpr=2 * area - 0.99),
            membership("loss", "canaries", bound, area, status, reason),
            secrets_finding(share, status, reason),
        ),
        curves=(curve("loss", "text", 2 - 2 * area), curve("loss", "canaries", 2 - 2 * area)),
        utility=estimate(utility, utility - 0.2, utility + 0.2, n=9),
        seconds=74.4,
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


@pytest.fixture
def result():
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


# findings.json


def strict(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_findings_survive_the_file_and_infinity_is_null(result, tmp_path):
    places = write_report(result, tmp_path, quiet())
    raw = strict(places.findings.read_text("utf-8"))
    first = raw["protections"][0]["findings"][0]
    assert first["estimate"]["interval"]["high"] is None
    assert first["lower_bound"] == result.results[0].findings[0].lower_bound
    assert raw["protections"][1]["status"] == "not evaluable"
    assert raw["config"]["protections"][1]["privacy"]["target_epsilon"] == 8.0
    assert raw["seed"] == 7
    assert len(raw["protections"][0]["curves"][0]["fpr"]) == 100
    assert read_findings(places.findings) == findings_of(result)
    assert read_findings(places.findings).protections[0].strongest().population == "canaries"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_no_number_without_a_value_reaches_the_file(result, bad):
    first, *others = result.results
    finding = replace(first.findings[0], ceiling=bad, lower_bound=bad)
    details = {"odd": bad, "numpy": np.float64(1.5), "count": np.int64(3)}
    odd = replace(result, results=(replace(first, findings=(finding,), details=details), *others))
    encoded = to_json(findings_of(odd))
    raw = strict(encoded.decode())["protections"][0]
    assert raw["findings"][0]["ceiling"] is None
    assert raw["details"] == {"odd": None, "numpy": 1.5, "count": 3}
    assert msgspec.json.decode(encoded, type=type(findings_of(odd))) == findings_of(odd)
    report_html(findings_of(odd))
    printed(odd)


def test_key_order_is_that_of_the_schema(result):
    raw = strict(to_json(findings_of(result)).decode())
    assert list(raw)[:4] == ["schema_version", "started", "seconds", "exceeds_claim"]
    assert to_json(findings_of(result)) == to_json(findings_of(result))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no findings file"),
        (b'{"schema_version": 1', "no findings file"),
        (b'{"rows": []}', "no findings file"),
        (b"\xff\xfe", "no findings file"),
        (b'{"schema_version": 999}', "schema version 999"),
        (b'{"schema_version": 1}', "does not follow its schema"),
    ],
)
def test_other_files_are_refused_by_name(content, says, tmp_path):
    path = tmp_path / "findings.json"
    path.write_bytes(content)
    with pytest.raises(FindingsUnreadable, match=says) as caught:
        read_findings(path)
    assert str(path) in str(caught.value)


# report.html


class Page(html.parser.HTMLParser):
    VOID = frozenset({"meta", "br", "rect", "path", "circle"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def page(result):
    return Page(report_html(findings_of(result)).decode())


def test_page_needs_nothing_else_and_is_small(result):
    text = report_html(findings_of(result)).decode()
    assert len(text) < 400_000
    assert "http://" not in text
    assert "https://" not in text
    assert not re.search(r"url\((?!#)|@import|javascript:", text)
    for tag, attributes in page(result).tags:
        assert tag not in {"script", "link", "img", "iframe", "object", "embed", "base"}
        assert "src" not in attributes
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("href", "#").startswith("#")


def test_page_is_accessible(result):
    tags = page(result).tags
    names = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(names) == len(set(names))
    for tag, attributes in tags:
        for referring in ("href", "aria-labelledby"):
            for name in attributes.get(referring, "").split():
                assert name.removeprefix("#") in names
        if tag == "th":
            assert attributes["scope"] in {"row", "col"}
        if tag == "svg":
            assert attributes.get("role") == "img" or attributes["aria-hidden"] == "true"
    levels = [int(tag[1]) for tag, _ in tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def luminance(colour):
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_text_is_readable_in_light_and_dark(result):
    text = report_html(findings_of(result)).decode()
    schemes = [
        dict(re.findall(r"--([\w-]+): (#\w{6})", b)) for b in re.findall(r":root \{[^}]+", text)
    ]
    assert len(schemes) == 2
    for colours in schemes:
        for ink in ("ink", "muted", "mark", "red", "green", "amber"):
            grounds = ["paper", "card"] + ([f"{ink}-soft"] if f"{ink}-soft" in colours else [])
            for ground in grounds:
                assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
        for line in range(6):  # graphical objects: WCAG 2.2, 1.4.11
            assert contrast(colours[f"s{line}"], colours["card"]) >= 3.0


def test_names_are_escaped(result):
    hostile = renamed(result, HOSTILE)
    text = report_html(findings_of(hostile)).decode()
    assert "<script" not in text
    assert HOSTILE in Page(text).text


def test_page_says_what_was_measured(result):
    said = page(result)
    for piece in (
        "ε ≥ 4.93",
        "ceiling 5.02",
        "not evaluable",
        "within claim",
        "nothing was claimed",
    ):
        assert piece in said.text
    curves = [a for tag, a in said.tags if tag == "path" and a.get("class", "").startswith("curve")]
    # two panels of three lines, and a swatch for each
    assert len(curves) == 12
    ceilings = [
        a for t, a in said.tags if t == "path" and a.get("class", "").startswith("ceiling s")
    ]
    assert len(ceilings) == 4
    assert all("nan" not in a["d"] and "inf" not in a["d"] for a in curves + ceilings)


def test_a_suite_without_secrets_is_drawn(result):
    bare = replace(
        result,
        results=tuple(
            replace(r, findings=tuple(f for f in r.findings if f.population != "secrets"))
            for r in result.results
        ),
    )
    assert "Planted secrets" not in page(bare).text
    assert "Planted secrets" not in printed(bare)


# words


def test_rounding_never_flatters():
    assert wording.at_least(4.9399) == "4.93"
    assert wording.at_least(4.74) == "4.74"
    assert wording.interval(0.5541, 0.5541) == "[0.55, 0.56]"
    assert wording.interval(-0.001, None) == "[-0.01, ∞]"
    assert wording.interval(None, 0.0) == "[−∞, 0.00]"
    assert wording.number(None) == "–"


@pytest.mark.parametrize(
    ("statuses", "says"),
    [
        (
            (Status.LEAK, Status.LEAK, Status.WITHIN_CLAIM),
            "More leaks than is claimed: DP-SGD at ε = 8.",
        ),
        ((Status.LEAK, Status.NOT_EVALUABLE, Status.NOT_EVALUABLE), "No claim could be tested"),
        ((Status.LEAK, Status.WITHIN_CLAIM, Status.WITHIN_CLAIM), "2 claims were tested and not"),
        ((Status.LEAK, Status.NOT_EVALUABLE, Status.WITHIN_CLAIM), "1 claim could not be tested"),
    ],
)
def test_headline(result, statuses, says):
    changed = tuple(
        replace(r, findings=tuple(replace(f, status=status) for f in r.findings))
        for r, status in zip(result.results, statuses, strict=True)
    )
    found = findings_of(replace(result, results=changed))
    assert says in wording.headline(found)
    assert found.exceeds_claim == ("More leaks" in says)


def test_a_blind_baseline_that_wins_is_called_out(result):
    assert not wording.warnings(findings_of(result))
    first, *others = result.results
    control = Control("AUC of a blind baseline", 0.7, 0.65, 0.75)
    told = tuple(replace(f, controls=(control,)) for f in first.findings)
    bad = replace(result, results=(replace(first, findings=told), *others))
    assert "do not measure membership alone" in printed(bad).replace("\n", " ").replace("  ", " ")
    assert "Control failed" in page(bad).text


# terminal


@pytest.mark.parametrize("width", [80, 100, 120, 160])
def test_terminal_crops_nothing(result, width):
    text = printed(result, width)
    assert "\x1b" not in text
    assert "…" not in text
    assert all(cell_len(line) <= width for line in text.splitlines())
    table = text[: text.index("Every attack")]
    rows = table.split("─\n", 1)[1]
    for piece in (
        "✗ leak",
        "? not",
        "evaluable",
        "✓ within",
        "4.93",
        "5.02",
        "99.0%",
        "2.77",
        "was claimed",
    ):
        assert piece in rows, piece


def test_verdict_stands_in_its_row_at_80_columns(result):
    lines = printed(result).splitlines()
    row = next(line for line in lines if line.startswith("DP-SGD at ε = 8"))
    assert "ε = 8" in row
    assert "ε ≥ 0.70 (ceiling 5.02)" in row
    assert "? not" in row
    assert "evaluable" in lines[lines.index(row) + 1]


def test_a_very_narrow_terminal_loses_no_verdict(result):
    text = printed(result, 40)
    assert "…" not in text
    assert all(cell_len(line) <= 40 for line in text.splitlines())


def test_terminal_speaks_ascii_where_it_must(result):
    text = printed(renamed(result, "prot\u00e9g\u00e9 \x1b[31m[red]"), encoding="ascii")
    assert "eps >= 4.93" in text
    assert "x leak" in text
    assert "\x1b" not in text
    assert "[31m[red]" in text.replace("\n", "")


def test_colour_is_only_an_addition(result):
    stream = io.StringIO()
    console = Console(file=stream, width=80, force_terminal=True, color_system="standard")
    print_findings(findings_of(result), console)
    assert "\x1b[" in stream.getvalue()
    plain = re.sub(r"\x1b\[[\d;]*m", "", stream.getvalue())
    assert [line.rstrip() for line in plain.splitlines()] == [
        line.rstrip() for line in printed(result).splitlines()
    ]


def test_json_alone_when_asked(result, tmp_path):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    places = write_report(result, tmp_path, Console(file=stream), as_json=True)
    assert stream.buffer.getvalue() == places.findings.read_bytes()


# records.csv


def rows_of(places):
    with places.records.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_owner_finds_every_record_and_no_one_else_does(result, tmp_path):
    places = write_report(result, tmp_path, quiet())
    key, rows = read_key(places.key), rows_of(places)
    assert len(key) == 32
    assert len(rows) == 3 * len(IDS)
    names = {hmac.new(key, i.encode(), hashlib.sha256).hexdigest(): n for n, i in enumerate(IDS)}
    scores = {r.name: r.scores[0].values.tolist() for r in result.results}
    for row in rows:
        n = names[row["record"]]
        assert row["member"] == ("true" if MEMBER_N[n] else "false")
        assert row["kind"] == ("canary" if CANARY_N[n] else "text")
        assert float(row["score"]) == scores[row["protection"]][n]
        assert row["attack"] == "loss"
    assert record_name(key, IDS[0]) in names
    bare = {hashlib.sha256(i.encode()).hexdigest() for i in IDS}
    assert not bare & {row["record"] for row in rows}


def test_riskiest_come_first_by_hand(result, tmp_path):
    # Text: members 0 and 1, others 2 and 3; canaries: member 4, other 5.
    scores = torch.tensor([3.0, 1.0, 1.0, 2.0, 9.0, 8.0], dtype=torch.float64)
    small = replace(
        result,
        results=(replace(result.results[0], scores=(Scores("loss", scores),)),),
        record_ids=IDS[:6],
        member_N=np.array([1, 1, 0, 0, 1, 0], bool),
        canary_N=np.array([0, 0, 0, 0, 1, 1], bool),
    )
    places = write_report(small, tmp_path, quiet())
    key = read_key(places.key)
    order = {record_name(key, i): n for n, i in enumerate(IDS[:6])}
    got = [(order[row["record"]], float(row["percentile"])) for row in rows_of(places)]
    # Ties count half: record 1 beats none of {1, 2} and ties one of two.
    assert got == [(0, 100.0), (4, 100.0), (3, 75.0), (5, 50.0), (1, 25.0), (2, 25.0)]


def test_scores_must_fit_the_records(result, tmp_path):
    with pytest.raises(ValueError, match="99 record ids"):
        write_report(replace(result, record_ids=IDS[:99]), tmp_path, quiet())
    assert not list(tmp_path.iterdir())


def test_key_is_fresh_and_for_its_owner_alone(result, tmp_path):
    (tmp_path / "records.key").write_text("old")
    (tmp_path / "records.key").chmod(0o644)
    mask = os.umask(0)
    try:
        places = write_report(result, tmp_path, quiet())
    finally:
        os.umask(mask)
    assert stat.S_IMODE(places.key.stat().st_mode) == 0o600
    assert stat.S_IMODE(places.records.stat().st_mode) == 0o600
    first = read_key(places.key)
    write_report(result, tmp_path, quiet())
    assert read_key(places.key) != first


@pytest.mark.parametrize("content", [b"", b"ab" * 31, b"zz" * 32, b"ab" * 33])
def test_damaged_keys_are_refused(content, tmp_path):
    (tmp_path / "records.key").write_bytes(content)
    with pytest.raises(NotARecordKey, match=r"records\.key"):
        read_key(tmp_path / "records.key")


def test_no_record_id_in_any_file_or_on_the_screen(result, tmp_path):
    console = quiet()
    write_report(result, tmp_path, console)
    seen = [content.decode() for content in contents(tmp_path).values()]
    for text in [*seen, console.file.getvalue()]:
        assert not any(record_id in text for record_id in IDS)
        assert "diary" not in text
        assert "planted-token" not in text


# all or none


def fail_at(call, function, error):
    calls = iter(range(1, 1000))

    def failing(*arguments, **named):
        if next(calls) == call:
            raise error
        return function(*arguments, **named)

    return failing


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("there_before", [False, True])
@pytest.mark.parametrize(
    ("where", "call"),
    [("open", 1), ("open", 3), *(("fsync", n) for n in range(1, 6))]
    + [("replace", n) for n in range(1, 5)],
)
def test_nothing_is_left_half_written(result, tmp_path, monkeypatch, where, call, there_before):
    out = tmp_path / "audit"
    if there_before:
        write_report(renamed(result, "the older audit"), out, quiet())
        (out / "notes.txt").write_text("mine")
    before = contents(out) if there_before else {}
    module = Path if where == "replace" else files.os
    monkeypatch.setattr(module, where, fail_at(call, getattr(module, where), FULL))
    console = quiet()
    with pytest.raises(ReportNotWritten, match="No space left on device") as caught:
        write_report(result, out, console)
    assert str(out) in str(caught.value)
    assert contents(out) == before
    assert "no protection" in console.file.getvalue()  # the table is shown all the same
    monkeypatch.undo()
    write_report(result, out, quiet())
    assert set(contents(out)) >= NAMES


def test_a_file_the_kernel_cuts_short(result, tmp_path):
    write_report(renamed(result, "the older audit"), tmp_path, quiet())
    before = contents(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(ReportNotWritten, match=r"findings\.json: File too large"):
            write_report(result, tmp_path, quiet())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path) == before


def test_where_links_are_unknown_the_old_file_is_copied(result, tmp_path, monkeypatch):
    write_report(renamed(result, "the older audit"), tmp_path, quiet())
    before = contents(tmp_path)
    monkeypatch.setattr(files.os, "link", fail_at(1, os.link, OSError(errno.EPERM, "no links")))
    copied = []
    monkeypatch.setattr(
        files.shutil, "copy2", lambda *a, f=shutil.copy2, **k: copied.append(a) or f(*a, **k)
    )
    monkeypatch.setattr(Path, "replace", fail_at(3, Path.replace, FULL))
    with pytest.raises(ReportNotWritten):
        write_report(result, tmp_path, quiet())
    assert len(copied) == 1
    assert contents(tmp_path) == before


def test_a_folder_in_the_way_is_named(result, tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(ReportNotWritten, match=r"report\.html: a folder stands in its place"):
        write_report(result, tmp_path, quiet())
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_closed_pipe_costs_no_file(result, tmp_path):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    with pytest.raises((BrokenPipeError, SystemExit)):
        write_report(result, tmp_path, Console(file=Closed(), width=80))
    assert set(contents(tmp_path)) == NAMES


def test_an_interrupt_leaves_nothing(result, tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "fsync", fail_at(3, os.fsync, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        write_report(result, tmp_path, quiet())
    assert not contents(tmp_path)
