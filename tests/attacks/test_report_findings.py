"""``findings.json``: what the file holds, and what is refused."""

import json
import math
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from made_up_audits import made_up_result, printed, quiet, three_moments, without_training

from attacks.report import (
    FindingsUnreadable,
    findings_of,
    read_findings,
    report_html,
    to_json,
    write_report,
)


@pytest.fixture
def result():
    return made_up_result()


@pytest.fixture(params=[made_up_result, three_moments, without_training])
def any_result(request):
    return request.param()


def strict(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_findings_of_all_moments_survive_the_file(any_result, tmp_path):
    places = write_report(any_result, tmp_path, quiet())
    assert read_findings(places.findings) == findings_of(any_result)


def test_what_does_not_apply_is_null_and_the_rest_stands_in_objects(tmp_path):
    raw = strict(write_report(three_moments(), tmp_path, quiet()).findings.read_text("utf-8"))
    rows = {row["name"]: row for row in raw["protections"]}
    masked, trained = rows["masked sums"], rows["no protection"]
    assert raw["schema_version"] == 2
    moments = [row["moment"] for row in raw["protections"]]
    assert moments == ["training"] * 3 + ["aggregation"] * 2 + ["inference"] * 3
    assert masked["moment"] == "aggregation"
    assert masked["claim"]["nothing_leaks"] is True
    assert masked["claim"]["short"] == "nothing but the sum"
    assert masked["utility"]["unit"] == "relative error of the sum"
    assert masked["utility"]["baseline"] == 0.0
    assert masked["utility"]["estimate"]["value"] == 3.04e-9
    assert masked["cost"] == {
        "seconds": 0.01234,
        "sent_bytes": 4_912_345.0,
        "unit": "client and round",
    }
    assert masked["findings"][1]["chance"] == 1 / 64
    assert masked["findings"][1]["lower_bound"] is None
    assert masked["findings"][1]["ceiling"] is None
    assert trained["cost"]["sent_bytes"] is None
    assert trained["claim"]["nothing_leaks"] is False
    assert trained["findings"][0]["chance"] is None
    assert raw["base_utility"]["unit"] == "bits per byte"


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
        (b'{"schema_version": 2', "no findings file"),
        (b'{"rows": []}', "no findings file"),
        (b"\xff\xfe", "no findings file"),
        (b'{"schema_version": 999}', "schema version 999"),
        (b'{"schema_version": 1}', "schema version 1"),
        (b'{"schema_version": 2}', "does not follow its schema"),
    ],
)
def test_other_files_are_refused_by_name(content, says, tmp_path):
    path = tmp_path / "findings.json"
    path.write_bytes(content)
    with pytest.raises(FindingsUnreadable, match=says) as caught:
        read_findings(path)
    assert str(path) in str(caught.value)
