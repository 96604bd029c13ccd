import math
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from privlm.data import (
    ByteTokenizer,
    Canary,
    DataError,
    new_token_canaries,
    plant,
    secret_canaries,
)
from protocols.randomness import Stream

BYTES = ByteTokenizer()
DIGITS = [BYTES.encode(digit)[0] for digit in "0123456789"]


def stream(label="canaries"):
    return Stream(bytes(range(32)), label)


def test_secret_canaries_carry_prompt_and_uniform_secret():
    prompts = [BYTES.encode(f"The code of user {n} is ") for n in range(300)]
    canaries = secret_canaries(prompts, DIGITS, 4, stream())
    assert [list(canary.prompt_ids) for canary in canaries] == prompts
    assert all(canary.space == 10_000 for canary in canaries)
    assert canaries[0].max_exposure == pytest.approx(math.log2(10_000))
    counts = Counter(token for canary in canaries for token in canary.secret_ids)
    assert set(counts) == set(DIGITS)
    assert stats.chisquare(list(counts.values())).pvalue > 1e-4  # fixed seed: no false alarm
    assert secret_canaries(prompts, DIGITS, 4, stream()) == canaries
    assert secret_canaries(prompts, DIGITS, 4, stream("other")) != canaries


def test_the_secret_does_not_print():
    canary = Canary("c", (1,), (9731,))
    assert "9731" not in repr(canary)


@pytest.mark.parametrize("count", [1, 30, 60, 99])
def test_candidates_are_distinct_alternatives(count):
    (canary,) = secret_canaries([[1, 2]], DIGITS, 2, stream())
    rows = {tuple(row) for row in canary.candidates(count, stream("c")).tolist()}
    assert len(rows) == count
    assert canary.secret_ids not in rows
    assert all(len(row) == 2 and set(row) <= set(DIGITS) for row in rows)


@pytest.mark.parametrize("count", [3, 20])  # by rejection, and by permutation of the space
def test_candidates_are_uniform_over_the_alternatives(count):
    canary = Canary("c", (1,), (0, 3), (0, 1, 2, 3, 4))
    source = stream("uniform")
    drawn = Counter(
        tuple(row)
        for trial in range(400)
        for row in canary.candidates(count, source.child(str(trial))).tolist()
    )
    assert len(drawn) == 24
    assert stats.chisquare(list(drawn.values())).pvalue > 1e-4  # fixed seed: no false alarm


def test_huge_spaces_are_sampled():
    (canary,) = secret_canaries([[1]], list(range(256)), 32, stream())
    assert canary.max_exposure == 256.0
    assert canary.candidates(50, stream("c")).shape == (50, 32)


def test_new_token_canaries_share_no_token_with_text_or_each_other():
    tokenizer = BYTES.reserve(12)
    canaries = new_token_canaries(tokenizer, 6)
    used = [token for canary in canaries for token in canary.prompt_ids + canary.secret_ids]
    assert sorted(used) == list(tokenizer.reserved_ids)
    assert canaries[0].space == 1
    with pytest.raises(
        DataError, match=r"need 14 reserved ids, the tokenizer has 12; call .*\(2\)"
    ):
        new_token_canaries(tokenizer, 7)
    with pytest.raises(DataError, match="no alphabet"):
        canaries[0].candidates(1, stream())


def test_plant_pads_or_repeats():
    canaries = [Canary("a", (1, 2), (3,)), Canary("b", (4,), (5,))]
    padded = plant(canaries, 7, 0)
    assert padded.ids_NT.tolist() == [[1, 2, 3, 0, 0, 0, 0], [4, 5, 0, 0, 0, 0, 0]]
    assert padded.length_N.tolist() == [3, 2]
    assert padded.record_ids == padded.users == ("a", "b")
    repeated = plant(canaries, 7, 0, fill="repeat")
    assert repeated.ids_NT.tolist() == [[1, 2, 3, 1, 2, 3, 0], [4, 5, 4, 5, 4, 5, 0]]
    assert repeated.length_N.tolist() == [6, 6]
    scored = plant(canaries, 7, 0, fill="repeat", loss_on="secret")
    assert np.array_equal(scored.ids_NT, repeated.ids_NT)
    assert scored.labels_NT[0].tolist() == [-100, -100, 3, -100, -100, 3, -100]


def test_single_tokens_need_company():
    canaries = new_token_canaries(BYTES.reserve(2), 2, tokens_each=1)
    with pytest.raises(DataError, match=r"fill='repeat'"):
        plant(canaries, 8, BYTES.end_id)
    assert plant(canaries, 8, BYTES.end_id, fill="repeat").ids_NT[0].tolist() == [257] * 8


def test_errors_give_the_numbers():
    with pytest.raises(
        DataError, match="'a' has 6 prompt and 3 secret tokens, the context holds 8"
    ):
        plant([Canary("a", (1,) * 6, (2,) * 3)], 8, 0)
    with pytest.raises(DataError, match="no canaries"):
        plant([], 8, 0)
    with pytest.raises(DataError, match="record ids repeat"):
        plant([Canary("a", (1,), (2,))] * 2, 8, 0)
    with pytest.raises(DataError, match="empty secret"):
        Canary("a", (1,), ())
    with pytest.raises(DataError, match="leaves its alphabet"):
        Canary("a", (1,), (2,), (3, 4))
    with pytest.raises(DataError, match="repeats an id"):
        Canary("a", (1,), (3,), (3, 3))
    with pytest.raises(DataError, match="all different"):
        secret_canaries([[1], [1]], DIGITS, 2, stream())
    with pytest.raises(DataError, match="two symbols"):
        secret_canaries([[1]], [5], 2, stream())
    with pytest.raises(DataError, match="99 alternatives to its secret, cannot draw 100"):
        secret_canaries([[1]], DIGITS, 2, stream())[0].candidates(100, stream("c"))
    with pytest.raises(DataError, match="must be positive"):
        new_token_canaries(BYTES.reserve(2), 0)
