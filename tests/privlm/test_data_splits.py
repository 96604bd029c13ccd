import dataclasses
import itertools
from functools import partial

import pytest
from scipy import stats

from privlm.data import (
    ByteTokenizer,
    DataError,
    Document,
    Duplicate,
    Split,
    cut_blocks,
    cut_split,
    deduplicate,
    draw_membership,
    load_documents,
    split_documents,
)
from protocols.randomness import Stream

CORPUS = load_documents()
BYTES = ByteTokenizer()


def parts_of(split):
    return split.public, split.private, split.test


@pytest.mark.parametrize("seed", range(10))
def test_parts_are_disjoint_and_complete(seed):
    parts = parts_of(split_documents(CORPUS, seed))
    assert sorted(d.id for part in parts for d in part) == sorted(d.id for d in CORPUS)


@pytest.mark.parametrize("seed", range(3))
def test_no_document_moves_another(seed):
    """What is trained on the public part without protection must not depend on the private one."""
    split = split_documents(CORPUS, seed)
    for removed in split.private:
        rest = split_documents([d for d in CORPUS if d != removed], seed)
        assert rest.public == split.public
        assert rest.test == split.test


def test_split_depends_on_seed_and_not_on_order():
    assert split_documents(CORPUS, 1) == split_documents(CORPUS[::-1], 1)
    assert len({split_documents(CORPUS, seed) for seed in range(5)}) == 5


def test_shares_are_honoured():
    """Binomial counts of 4000 documents, each within 5 deviations."""
    documents = [Document(str(n), "x") for n in range(4000)]
    parts = parts_of(split_documents(documents, 0, {"public": 2, "private": 5, "test": 1}))
    for part, share in zip(parts, (2 / 8, 5 / 8, 1 / 8), strict=True):
        assert abs(len(part) - 4000 * share) < 5 * (4000 * share * (1 - share)) ** 0.5
    parts = parts_of(split_documents(documents, 0, {"private": 1, "test": 1}))
    assert not parts[0]
    assert all(parts[1:])


def test_users_stay_together_when_asked():
    documents = [Document(str(n), "x" * (n + 1), f"u{n % 7}") for n in range(70)]
    users = [{d.user for d in part} for part in parts_of(split_documents(documents, by="user"))]
    assert all(not a & b for a, b in itertools.combinations(users, 2))
    users = [{d.user for d in part} for part in parts_of(split_documents(documents))]
    assert users[0] & users[1]


def test_a_part_without_documents_is_refused_with_the_ways_out():
    documents = [Document("a", "text"), Document("b", "text")]
    with pytest.raises(DataError, match="none of 2 documents fell to the .* part; add documents"):
        split_documents(documents)
    for shares in ({"public": 1, "private": 0, "test": 1}, {"train": 1}, {}):
        with pytest.raises(DataError, match="shares must be positive"):
            split_documents(documents, 0, shares)


def test_exact_duplicates_are_found_within_and_across():
    cut = partial(cut_blocks, tokenizer=BYTES, context=8, min_tail=2)
    split = Split(
        public=(Document("p", "licence-"),),
        private=(
            Document("a", "licence-secret-1"),
            Document("b", "secret-1"),
            Document("c", "own"),
        ),
        test=(Document("t", "own"), Document("u", "unseen")),
    )
    blocks = cut_split(split, cut)
    assert blocks.duplicates == (
        Duplicate(kept="p#0", dropped="a#0"),
        Duplicate(kept="a#1", dropped="b#0"),
        Duplicate(kept="t#0", dropped="c#0"),
    )
    assert blocks.private.record_ids == ("a#1",)
    assert blocks.test.record_ids == ("t#0", "u#0")
    kept = cut_split(split, cut, keep_duplicates=True)
    assert kept.duplicates == blocks.duplicates
    assert kept.private.record_ids == ("a#0", "a#1", "b#0", "c#0")
    with pytest.raises(DataError, match="all 1 records repeat"):
        deduplicate(cut([Document("q", "own")]), [blocks.test])


def test_padding_cannot_make_a_duplicate():
    blocks = cut_blocks([Document("a", "ab"), Document("b", "cd")], BYTES, 8)
    ended = dataclasses.replace(blocks, ids_NT=blocks.ids_NT[[0, 0]])
    assert deduplicate(ended)[1] == (Duplicate("a#0", "b#0"),)
    longer = ended.mask_NT.clone()
    longer[1, 3] = True  # the same ids, but here the token that also pads is real
    assert deduplicate(dataclasses.replace(ended, mask_NT=longer))[1] == ()


def test_default_corpus_has_some_duplicates_and_none_after_the_cut():
    cut = partial(cut_blocks, tokenizer=BYTES, context=128)
    blocks = cut_split(split_documents(CORPUS), cut)
    assert len(blocks.private) > 1000
    assert deduplicate(blocks.private, [blocks.public, blocks.test])[1] == ()


def dispersion_p_values(draw, trials=400, n=100):
    """Two-sided p-values of the number of members: of its mean, and of its variance over trials."""
    counts = [int(draw(n, trial).sum()) for trial in range(trials)]
    mean_p = stats.binomtest(sum(counts), trials * n, 0.5).pvalue
    statistic = sum((count - n / 2) ** 2 for count in counts) / (n / 4)
    tail = stats.chi2.cdf(statistic, trials)
    return mean_p, 2 * min(tail, 1 - tail)


def test_membership_is_independent_fair_coins():
    # Fixed seeds: no false alarms from run to run; each threshold is a 1e-4 level.
    stream = Stream(bytes(range(32)), "test membership")
    fair = dispersion_p_values(lambda n, t: draw_membership(n, stream.child(str(t))))
    assert min(fair) > 1e-4
    # The same test rejects "exactly half", which has the right mean and no independence.
    half = dispersion_p_values(lambda n, t: stream.child(f"half {t}").permutation(n) < n // 2)
    assert half[1] < 1e-4
    biased = dispersion_p_values(lambda n, t: stream.child(f"b{t}").bernoulli(0.55, (n,)))
    assert biased[0] < 1e-4


def test_membership_repeats_under_one_stream_label_only():
    seed = bytes(32)
    first = draw_membership(64, Stream(seed, "a"))
    assert first.shape == (64,)
    assert first.dtype == bool
    assert (first == draw_membership(64, Stream(seed, "a"))).all()
    assert (first != draw_membership(64, Stream(seed, "b"))).any()
    with pytest.raises(ValueError, match="at least one"):
        draw_membership(0, Stream(seed, "a"))
