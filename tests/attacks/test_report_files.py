"""The report's files: whose they are, what they hide, and that no half of them is left."""

import csv
import errno
import hashlib
import hmac
import io
import os
import resource
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_up_audits import (
    CANARY_N,
    IDS,
    MEMBER_N,
    NAMES,
    contents,
    made_up_result,
    quiet,
    renamed,
    three_moments,
    without_training,
)
from rich.console import Console

from attacks.report import (
    NotARecordKey,
    ReportNotWritten,
    files,
    read_key,
    record_name,
    write_report,
)
from attacks.threat import Scores


@pytest.fixture
def result():
    return made_up_result()


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


def test_without_a_training_no_scores_are_written(tmp_path):
    console = quiet()
    write_report(without_training(), tmp_path, console)
    assert set(contents(tmp_path)) == {"findings.json", "report.html"}
    assert "records" not in console.file.getvalue().split("Files")[1]


def test_scores_of_an_older_audit_do_not_lie_beside_a_report_without(result, tmp_path):
    write_report(result, tmp_path, quiet())
    write_report(without_training(), tmp_path, quiet())
    assert set(contents(tmp_path)) == {"findings.json", "report.html"}


def test_protections_without_scores_have_no_rows(tmp_path):
    places = write_report(three_moments(), tmp_path, quiet())
    names = {row["protection"] for row in rows_of(places)}
    assert names == {"no protection", "DP-SGD at ε = 8", "DP-SGD at ε = 1"}


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


@pytest.mark.parametrize(("where", "call"), [("unlink", 1), ("unlink", 2), ("_sync_folder", 1)])
def test_scores_of_an_older_audit_outlive_a_failure(result, tmp_path, monkeypatch, where, call):
    write_report(result, tmp_path, quiet())
    before = contents(tmp_path)
    module = Path if where == "unlink" else files
    monkeypatch.setattr(module, where, fail_at(call, getattr(module, where), FULL))
    with pytest.raises(ReportNotWritten, match="No space left on device"):
        write_report(without_training(), tmp_path, quiet())
    assert contents(tmp_path) == before
