"""``records.csv``: which records are at risk, for their owner.

Each row is one attack's score of one record. The record is named by HMAC-SHA256 of its id under
a key that is drawn afresh for every report and lies in ``records.key`` as 64 hexadecimal digits.
Whoever holds the key and an id finds the row::

    printf %s "$ID" | openssl dgst -sha256 -mac HMAC -macopt hexkey:$(cat records.key)

or, in Python, ``record_name(read_key(path), record_id)``. Without the key the names are opaque,
even to someone who lists all ids.

The rows themselves are no less private than the answer to "was this record trained on?": whoever
holds the released model and a candidate record can compute its score and so find its row, name or
no name. The file is written for its owner alone, like the key, and is not for publication.

Shape suffix: N candidate records.
"""

from __future__ import annotations

import csv
import hmac
import io
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt

from attacks.suite import SuiteResult

COLUMNS = ("record", "kind", "member", "protection", "attack", "score", "percentile")

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


class NotARecordKey(ValueError):
    """Names made with a damaged key would match no row and look like "not at risk"."""


def record_name(key: bytes, record_id: str) -> str:
    """HMAC-SHA256(key, id in UTF-8) in hexadecimal (RFC 2104)."""
    return hmac.digest(key, record_id.encode("utf-8"), "sha256").hex()


def key_file(key: bytes) -> bytes:
    """The content of ``records.key``."""
    return key.hex().encode() + b"\n"


def read_key(path: Path) -> bytes:
    """The key in ``records.key``.

    Raises:
        OSError: the file cannot be read.
        NotARecordKey: it does not hold 64 hexadecimal digits.
    """
    content = path.read_bytes()
    if not re.fullmatch(rb"[0-9a-f]{64}\n?", content):
        raise NotARecordKey(f"{path} does not hold a key: 64 hexadecimal digits are wanted")
    return bytes.fromhex(content.decode())


def records_csv(result: SuiteResult, key: bytes) -> bytes:
    """All scores in CSV; within a protection the riskiest first.

    ``percentile`` is the share, in per cent, of records of the same kind that were not trained on
    and score lower, ties counting half. Rows are sorted by it, records that were trained on before
    others and text before canaries.

    Raises:
        ValueError: scores, ids and coins differ in number.
    """
    member_N = np.asarray(result.member_N, dtype=np.bool_)
    canary_N = np.asarray(result.canary_N, dtype=np.bool_)
    count = len(result.record_ids)
    if member_N.shape != (count,) or canary_N.shape != (count,):
        raise ValueError(
            f"{count} record ids, but {member_N.shape} memberships and {canary_N.shape} kinds"
        )
    names_N = [record_name(key, record_id) for record_id in result.record_ids]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for protection in result.results:
        rows: list[tuple[float, bool, bool, str, str, float]] = []
        for scores in protection.scores:
            score_N = scores.values.double().cpu().numpy()
            if score_N.shape != (count,):
                raise ValueError(
                    f"{protection.name}, {scores.attack}: {count} records, but scores of shape "
                    f"{score_N.shape}"
                )
            percentile_N = _percentiles(score_N, member_N, canary_N)
            rows += zip(
                (-percentile_N).tolist(),
                (~member_N).tolist(),
                canary_N.tolist(),
                names_N,
                [scores.attack] * count,
                score_N.tolist(),
                strict=True,
            )
        for risk, outside, canary, name, attack, score in sorted(rows):
            kind, member = "canary" if canary else "text", "false" if outside else "true"
            writer.writerow(
                (name, kind, member, protection.name, attack, repr(score), f"{-risk:.2f}")
            )
    return text.getvalue().encode("utf-8")


def _percentiles(score_N: Floats, member_N: Bools, canary_N: Bools) -> Floats:
    percentile_N = np.zeros(len(score_N))
    for kind_N in (canary_N, ~canary_N):
        others = np.sort(score_N[kind_N & ~member_N])
        if not others.size:
            continue
        below = np.searchsorted(others, score_N[kind_N], "left")
        up_to = np.searchsorted(others, score_N[kind_N], "right")
        percentile_N[kind_N] = 100.0 * (below + up_to) / (2.0 * others.size)
    return percentile_N
