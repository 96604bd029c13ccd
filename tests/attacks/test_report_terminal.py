"""The tables in the terminal, and the words and numbers in them."""

import io
import math
import re
from dataclasses import replace

import pytest
from made_up_audits import (
    estimate,
    made_up_result,
    printed,
    renamed,
    three_moments,
    watched,
    without_training,
)
from rich.cells import cell_len
from rich.console import Console

from attacks.report import (
    figures,
    findings_of,
    print_findings,
    wording,
    write_report,
)
from attacks.report.reading import reading
from attacks.threat import Status


@pytest.fixture
def result():
    return made_up_result()


def made_up_watched():
    return watched(made_up_result())


@pytest.fixture(params=[made_up_result, made_up_watched, three_moments, without_training])
def any_result(request):
    return request.param()


def test_rounding_never_flatters():
    assert figures.at_least(4.9399) == "4.93"
    assert figures.at_least(4.74) == "4.74"
    assert figures.interval(0.5541, 0.5541) == "[0.55, 0.56]"
    assert figures.interval(-0.001, None) == "[-0.01, ∞]"
    assert figures.interval(None, 0.0) == "[−∞, 0.00]"
    assert figures.number(None) == "–"


def utility(value, baseline=None, *, low=None, high=None):
    ends = (value if end is None else end for end in (low, high))
    made = replace(made_up_result().results[0].utility, baseline=baseline)
    made = replace(made, estimate=estimate(value, *ends))
    row = replace(made_up_result().results[0], utility=made)
    return findings_of(replace(made_up_result(), results=(row,))).protections[0].utility


def test_small_amounts_keep_their_digits_and_are_rounded_outwards():
    said = utility(3.04e-9, low=2.91e-9, high=3.12e-9).estimate
    assert figures.amount(said) == ("3.0e-9", "[2.9, 3.2]e-9")
    assert figures.amount(utility(2e-9, low=-1e-9, high=4.2e-8).estimate) == (
        "0.2e-8",
        "[-0.1, 4.2]e-8",
    )
    assert figures.amount(utility(0.004, low=0.0, high=0.02).estimate) == ("0.00", "[0.00, 0.02]")
    assert figures.amount(utility(2.0, low=2.0, high=2.0).estimate) == ("2.00", "")
    assert figures.amount(utility(2.0, low=1.0, high=math.inf).estimate) == ("2.00", "[1.00, ∞]")


def test_a_change_is_called_by_its_direction():
    assert figures.change(utility(2.31, 2.39)) == "−0.08 better"
    assert figures.change(utility(2.39, 2.31)) == "+0.08 worse"
    assert figures.change(utility(2.391, 2.39)) == "+0.00 same"
    assert figures.change(utility(3e-9, 0.0)) == "+3.0e-9 worse"
    assert figures.change(utility(1e-9, 3e-9)) == "−2.0e-9 better"
    assert figures.change(utility(1e-9)) == "–"


def test_times_and_bytes_are_said_in_fitting_units():
    seconds = (0.0, 3.4e-4, 0.01234, 0.9996, 8.14, 26.2, 102.0, 7260.0)
    said = ["0.0 s", "340 µs", "12.3 ms", "1.0 s", "8.1 s", "26 s", "1 min 42 s", "2 h 01 min"]
    assert [figures.duration(s) for s in seconds] == said
    sizes = (None, 12.0, 999.6, 4_912_345.0, 999_700_000.0, 2.5e12, 1.5e15)
    said = ["0 B", "12 B", "1 kB", "4.91 MB", "1 GB", "2.5 TB", "1,500 TB"]
    assert [figures.traffic(s) for s in sizes] == said


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


# the table


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


@pytest.mark.parametrize("width", [80, 100, 120, 160])
def test_a_watched_engine_is_held_against_its_claim(width):
    text = printed(made_up_watched(), width)
    assert all(cell_len(line) <= width for line in text.splitlines())
    table, rest = text.split("Every attack, with its controls")
    assert "ε ≥ 2.00" in table
    assert "white-box, gradients" in table
    engine = rest.split("What the engine did, over what is claimed of it")[1]
    one, end = engine.index("✗ DP-SGD at ε = 1"), engine.index("How to read this")
    assert "– DP-SGD at ε = 8" in engine[:one]
    assert "1.00 [0.90, 1.10]" in engine[:one]
    assert "0.12 [0.11, 0.14]" in engine[one:end]
    assert "1.01 [0.98, 1.04]" in engine[one:end]
    assert "laws of noise" not in rest.split("What the engine did")[0]


def test_verdict_stands_in_its_row_at_80_columns(result):
    lines = printed(result).splitlines()
    row = next(line for line in lines if line.startswith("DP-SGD at ε = 8"))
    assert "ε = 8" in row
    assert "ε ≥ 0.70 (ceiling 5.02)" in row
    assert "? not" in row
    assert "evaluable" in lines[lines.index(row) + 1]


def test_a_very_narrow_terminal_loses_no_verdict(any_result):
    text = printed(any_result, 40)
    assert "…" not in text
    assert all(cell_len(line) <= 40 for line in text.splitlines())


def test_terminal_speaks_ascii_where_it_must(result):
    text = printed(renamed(result, "prot\u00e9g\u00e9 \x1b[31m[red]"), encoding="ascii")
    assert "eps >= 4.93" in text
    assert "x leak" in text
    assert "\x1b" not in text
    assert "[31m[red]" in text.replace("\n", "")


def test_colour_is_only_an_addition(any_result):
    stream = io.StringIO()
    console = Console(file=stream, width=80, force_terminal=True, color_system="standard")
    print_findings(findings_of(any_result), console)
    assert "\x1b[" in stream.getvalue()
    plain = re.sub(r"\x1b\[[\d;]*m", "", stream.getvalue())
    assert [line.rstrip() for line in plain.splitlines()] == [
        line.rstrip() for line in printed(any_result).splitlines()
    ]


def test_json_alone_when_asked(result, tmp_path):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    places = write_report(result, tmp_path, Console(file=stream), as_json=True)
    assert stream.buffer.getvalue() == places.findings.read_bytes()


def with_status(protections, statuses):
    return tuple(
        replace(p, findings=tuple(replace(f, status=status) for f in p.findings))
        for p, status in zip(protections, statuses, strict=True)
    )


def test_headline_counts_claims_of_all_moments():
    # Claims: ε = 2, ε = 8, ε = 1, "nothing but" of the masked sums and of the three servers.
    found = findings_of(three_moments())
    assert wording.headline(found) == (
        "3 claims were tested and not contradicted. 2 claims could not be tested by this audit."
    )
    assert not found.exceeds_claim


def test_a_promise_of_nothing_can_be_broken():
    result = without_training()
    masked = result.results[-1]
    broken = replace(result, results=with_status([masked], [Status.LEAK]))
    found = findings_of(broken)
    assert found.exceeds_claim
    assert wording.headline(found) == "More leaks than is claimed: masked sums."
    assert wording.verdict(Status.LEAK, found.protections[0].claim).note == "more than claimed"
    assert re.search(r"✗ leak\s.*\n.*more than\s.*\n.*claimed", printed(broken))


def test_the_table_shows_the_attack_that_recovers_most():
    found = next(p for p in findings_of(three_moments()).protections if "noised" in p.name)
    assert found.strongest("prompts").attack == "nearest neighbour with prior"
    table = printed(three_moments()).split("Every attack")[0]
    noised = table[table.index("noised split") :]
    assert "in order 11.1%" in noised
    assert "9.0% [" not in noised


def test_moments_stand_in_their_order_and_none_is_empty(result):
    order = ["TRAINING", "AGGREGATION", "INFERENCE"]

    def shown(made):
        table = printed(made).split("Every attack")[0]
        return [m for m in re.findall(r"^[A-Z]+(?= )", table, re.MULTILINE) if m in order]

    assert shown(three_moments()) == order
    assert shown(without_training()) == order[1:]
    assert shown(result) == order[:1]


@pytest.mark.parametrize("width", [80, 100, 120, 160])
def test_every_moment_shows_claim_leakage_verdict_and_price(width):
    text = printed(three_moments(), width)
    assert "…" not in text
    assert all(cell_len(line) <= width for line in text.splitlines())
    table = text.split("Every attack")[0]
    for piece in (
        "in order 98.2%",
        "as a set",
        "exactly 84.4%",
        "matched 98.4%",
        "matched 1.6% [1.0, 2.4]" if width < 120 else "matched 1.6%",
        "(chance 1.6%)",
        "in order 99.9%",
        "(chance 9.0%)",
        "ε ≥ 1.23",
        "(ceiling 4.99)",
        "○ no",
        "evidence",
        "[2.9, 3.2]e-9",
        "+3.0e-9 worse",
        "4.91 MB",
        "1.23 GB",
        "74 s, 0 B",
        "bits/byte",
        "relative",
        "a client and",
        "a token",
        "? three servers, prompts: only 600 tokens were attacked",
    ):
        assert piece in re.sub(r"\n +(were|attacked)", r" \1", table), piece
    for piece in (
        "tokens recovered in order",
        "texts recovered exactly",
        "against: the same attack where masks repeat",
        "98.0% [97.0, 99.0]",
        "against: the most frequent public token",
    ):
        assert piece in text.split("Every attack")[1], piece


def test_every_claim_is_printed_in_full():
    said = re.sub(r"\s+", " ", printed(three_moments()).split("What is claimed")[1])
    assert (
        "masked sums: nothing but the sum, whatever the adversary computes, against the server and "
        "all but two clients. Assumed: at least two honest clients in every sum." in said
    )
    assert "plain sums: nothing is claimed; the adversary is the server and all but two" in said
    assert said.index("no protection:") < said.index("plain sums:") < said.index("three servers:")


def test_units_that_differ_stand_in_their_rows():
    result = without_training()
    first, *others = result.results
    odd = replace(first, utility=replace(first.utility, unit="wrong answers"))
    table = printed(replace(result, results=(odd, *others))).split("Every attack")[0]
    assert "wrong" in table
    assert table.count("a token") == 3


def test_terms_are_explained_only_where_they_stand(result):
    def terms(made):
        return {term for term, _ in reading(findings_of(made))}

    shares = {"in order, as a set, exactly", "matched", "no evidence"}
    assert not shares & terms(result)
    assert shares <= terms(without_training())
    assert {"TPR at 1% FPR, AUC", "secrets"} <= terms(result)
    assert not {"TPR at 1% FPR, AUC", "secrets"} & terms(without_training())


def test_a_watched_engine_is_explained():
    terms = {term for term, _ in reading(findings_of(made_up_watched()))}
    assert {"white-box, gradients", "what the engine did"} <= terms
    assert not {"white-box, gradients", "what the engine did"} & {
        term for term, _ in reading(findings_of(made_up_result()))
    }


def test_a_control_without_width_is_said_to_be_one_number():
    plain = next(p for p in findings_of(three_moments()).protections if "without noise" in p.name)
    assert wording.yardsticks(plain.findings[0]) == [
        ("chance", "9.0%"),
        ("the most frequent public token everywhere", "7.1%"),
    ]
    noised = next(p for p in findings_of(three_moments()).protections if "noised" in p.name)
    assert wording.yardsticks(noised.findings[-1]) == [
        ("AUC under permuted labels", "0.50 [0.47, 0.53], p = 0.005"),
    ]
