"""Every sampler against its law, and plans whose amplification nobody earned.

Statistical tests run on a fixed stream; each states the false-alarm probability that it would have
on a fresh one.
"""

import math

import dp_accounting
import msgspec
import numpy as np
import pytest
import torch
from scipy import stats

from privlm.dp import (
    AdaptiveClipping,
    BallsInBinsSampler,
    Banded,
    Blt,
    CyclicPoissonSampler,
    ExampleLevelSampling,
    FixedSizeSampler,
    Plan,
    PoissonSampler,
    Search,
    TruncatedPoissonSampler,
    UnearnedAmplification,
    UserLevelSampling,
    bound_contributions,
)
from privlm.dp.accounting import epsilon_of
from privlm.dp.sampling import rounds
from protocols.randomness import Stream

N, DRAWS = 12, 4000
FALSE_ALARM = 1e-6


@pytest.fixture
def source() -> Stream:
    return Stream(bytes(range(32)), "sampling")


def inclusion(draw, source: Stream, draws: int = DRAWS) -> np.ndarray:
    """0-1 matrix of shape (draws, N), every draw under a stream of its own."""
    joined = np.zeros((draws, N))
    for number in range(draws):
        joined[number, draw(N, 0, source.child(f"run {number}")).numpy()] = 1
    return joined


def fits_law(joined: np.ndarray, mean: float, pair: float) -> bool:
    """Whether frequencies and joint frequencies are as stated.

    Bonferroni over N + N(N-1)/2 normal tests: false alarms below FALSE_ALARM.
    """
    draws = len(joined)
    first, second = np.triu_indices(N, k=1)
    tests = N + len(first)
    bound = stats.norm.isf(FALSE_ALARM / 2 / tests)
    alone = np.abs(joined.mean(0) - mean) / math.sqrt(mean * (1 - mean) / draws)
    together = (joined[:, first] * joined[:, second]).mean(0)
    jointly = np.abs(together - pair) / math.sqrt(pair * (1 - pair) / draws)
    return bool((alone < bound).all() and (jointly < bound).all())


def truncated_law(q: float, capacity: int) -> tuple[float, float]:
    """Inclusion of one and of two examples: E[K'/N] and E[K'(K'-1)/(N(N-1))], K' = min(K, cap)."""
    sizes = np.arange(N + 1)
    weight, kept = stats.binom.pmf(sizes, N, q), np.minimum(sizes, capacity)
    return float(weight @ kept / N), float(weight @ (kept * (kept - 1)) / (N * (N - 1)))


def shuffled(examples: int, step: int, stream: Stream) -> torch.Tensor:
    """What is no Poisson sampler: every batch holds N/4."""
    return torch.from_numpy(np.sort(stream.permutation(examples)[: examples // 4]))


LAWS = [
    (PoissonSampler(0.25), 0.25, 0.25**2),
    (TruncatedPoissonSampler(0.25, 3, N), *truncated_law(0.25, 3)),
    (FixedSizeSampler(3, N), 3 / N, 3 * 2 / (N * (N - 1))),
    (CyclicPoissonSampler(0.5, 2), 0.25, 0.25**2),
    (BallsInBinsSampler(4), 0.25, 0.25**2),
]


@pytest.mark.parametrize(("sampler", "mean", "pair"), LAWS)
def test_inclusion_follows_the_law_of_the_sampler(source, sampler, mean, pair):
    assert fits_law(inclusion(sampler.draw, source), mean, pair)


def test_a_shuffler_that_poses_as_poisson_is_caught(source):
    joined = inclusion(shuffled, source)
    assert not fits_law(joined, 0.25, 0.25**2)
    assert fits_law(joined, 0.25, 3 * 2 / (N * (N - 1)))


def test_truncation_without_a_secret_choice_is_caught(source):
    """Keeping the first of too many examples favours low indices."""

    def first_ones(examples, step, stream):
        return PoissonSampler(0.25).draw(examples, step, stream)[:3]

    assert not fits_law(inclusion(first_ones, source), *truncated_law(0.25, 3))


@pytest.mark.parametrize("sampler", [law[0] for law in LAWS])
def test_one_stream_and_step_give_one_batch_whatever_was_drawn_before(source, sampler):
    first = sampler.draw(N, 3, source)
    assert first.dtype == torch.int64
    assert torch.equal(first, first.sort().values)
    sampler.draw(N, 4, source)
    source.bytes(10)
    assert torch.equal(sampler.draw(N, 3, source), first)


@pytest.mark.parametrize("sampler", [PoissonSampler(0.5), FixedSizeSampler(30, 60)])
def test_two_steps_are_independent(source, sampler):
    """Agreement of 200 pairs of consecutive batches of 60; |z| < 5, false alarms below 1e-6."""
    first = [set(sampler.draw(60, step, source).tolist()) for step in range(400)]
    both = [len(a & b) for a, b in zip(first[::2], first[1::2], strict=True)]
    # 60 examples, each in both with probability 1/4; fixed sizes make the variance smaller.
    assert abs(np.mean(both) - 15) < 5 * math.sqrt(60 * 3 / 16 / 200)
    assert max(both) < 30


@pytest.mark.parametrize("sampler", [CyclicPoissonSampler(1.0, 5), BallsInBinsSampler(5)])
def test_an_example_waits_for_its_turn(source, sampler):
    epochs = [[sampler.draw(40, 5 * e + t, source) for t in range(5)] for e in range(3)]
    for epoch in epochs:
        assert sorted(torch.cat(epoch).tolist()) == list(range(40))
        assert all(torch.equal(a, b) for a, b in zip(epoch, epochs[0], strict=True))


def test_another_example_moves_nobody_to_another_bin(source):
    sampler = BallsInBinsSampler(4)
    for step in range(4):
        fewer, more = (sampler.draw(n, step, source) for n in (30, 31))
        assert set(fewer.tolist()) == set(more.tolist()) - {30}


@pytest.mark.parametrize(
    ("sampler", "examples"),
    [(TruncatedPoissonSampler(0.1, 5, 100), 101), (TruncatedPoissonSampler(0.1, 5, 100), 98),
     (FixedSizeSampler(5, 100), 99)],
)  # fmt: skip
def test_another_population_than_the_accounted_one_is_refused(source, sampler, examples):
    with pytest.raises(ValueError, match="the accounting is for 100 examples"):
        sampler.draw(examples, 0, source)


def test_the_cost_of_truncation_is_not_monotone_in_the_population():
    """Why fewer examples than were accounted for are refused."""
    costs = [
        epsilon_of(TruncatedPoissonSampler(1.0, 5, n).event(2.0, 1), 1e-3).value for n in (6, 60)
    ]
    assert costs[0] > costs[1]


@pytest.mark.parametrize(
    "make",
    [
        lambda: PoissonSampler(0.0),
        lambda: TruncatedPoissonSampler(0.1, 0, 10),
        lambda: FixedSizeSampler(11, 10),
        lambda: CyclicPoissonSampler(1.5, 2),
        lambda: BallsInBinsSampler(0),
        lambda: UserLevelSampling(0),
    ],
)
def test_a_sampler_that_cannot_be_is_refused(make):
    with pytest.raises(ValueError, match="must lie in|at least 1|exceeds the population"):
        make()


def plan(**changes) -> Plan:
    values = {
        "sampler": PoissonSampler(0.1),
        "steps": 100,
        "noise_multiplier": 1.0,
        "expected_batch_size": 64.0,
        "delta": 1e-5,
    }
    return Plan(**(values | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"correlation": Banded(4)}, "no amplification is proven"),
        ({"correlation": Blt(2)}, "no amplification is proven"),
        ({"correlation": Blt(2), "sampler": CyclicPoissonSampler(0.1, 4)}, "no amplification"),
        ({"correlation": Banded(4), "sampler": CyclicPoissonSampler(0.1, 3)}, "4 bands need"),
        ({"correlation": Banded(4), "sampler": TruncatedPoissonSampler(0.1, 9, 90)}, "no amplif"),
        ({"sampler": FixedSizeSampler(6, 60)}, "set neighbours to replace-one"),
        ({"users": ExampleLevelSampling(2), "sampler": BallsInBinsSampler(4)}, "els.*Poisson"),
        ({"users": ExampleLevelSampling(2), "neighbours": "replace-one"}, "els.*removing"),
    ],
)
def test_amplification_that_nobody_earned_is_refused(changes, message):
    with pytest.raises(UnearnedAmplification, match=message):
        plan(**changes)


def test_a_cyclic_sampler_cannot_pass_for_poisson():
    honest = plan(sampler=CyclicPoissonSampler(0.4, 4))
    assert honest.event() != plan(sampler=PoissonSampler(0.1)).event()
    written = msgspec.to_builtins(honest)
    written["sampler"]["type"] = "poisson"
    with pytest.raises(msgspec.ValidationError, match="unknown field `cycle`"):
        msgspec.convert(written, Plan)


def test_banded_noise_under_cyclic_sampling_costs_its_rounds():
    """arXiv 2306.08153: b bands are a Poisson event of ceil(T / b) rounds."""
    banded = plan(sampler=CyclicPoissonSampler(0.1, 8), correlation=Banded(8), steps=100)
    assert banded.event() == PoissonSampler(0.1).event(1.0, 13)
    assert banded.event(8) == PoissonSampler(0.1).event(1.0, 1)


@pytest.mark.parametrize(
    ("sampler", "strategy"),
    [(CyclicPoissonSampler(0.1, 8), Banded(8)), (BallsInBinsSampler(8), Blt(2))],
)
def test_correlated_noise_has_no_cost_beyond_the_steps_that_it_was_made_for(sampler, strategy):
    made = plan(sampler=sampler, correlation=strategy, steps=20)
    assert made.event(20) == made.event()
    with pytest.raises(ValueError, match="made for 20 steps"):
        made.event(21)


@pytest.mark.parametrize("strategy", [Banded(4), Blt(2)])
def test_unamplified_correlated_noise_is_one_gaussian(strategy):
    """The matrix mechanism: sensitivity of all participations together, by brute force."""
    correlated = plan(sampler=BallsInBinsSampler(10), correlation=strategy, steps=40)
    column = strategy.coefficients(40)
    matrix = sum(np.diag(np.full(40 - j, c), -j) for j, c in enumerate(column))
    worst = np.linalg.norm(matrix[:, ::10].sum(1))
    assert correlated.event().noise_multiplier == pytest.approx(1 / worst)
    assert correlated.event(15).noise_multiplier > correlated.event().noise_multiplier


def test_bins_without_correlation_claim_no_amplification():
    assert plan(sampler=BallsInBinsSampler(30)).event() == dp_accounting.SelfComposedDpEvent(
        dp_accounting.GaussianDpEvent(1.0), 4
    )
    assert [rounds(n, 30) for n in (1, 30, 31, 90)] == [1, 1, 2, 3]


def test_adaptive_clipping_pays_for_its_count_out_of_the_same_noise():
    adaptive = plan(clipping=AdaptiveClipping(count_noise_multiplier=10.0))
    assert adaptive.event() == plan().event()
    gradients = adaptive.mechanism.noise_multiplier
    assert gradients > 1.0
    assert gradients**-2 + 10.0**-2 == pytest.approx(1.0)
    with pytest.raises(ValueError, match="count_noise_multiplier.*must exceed"):
        plan(clipping=AdaptiveClipping(count_noise_multiplier=0.5))
    with pytest.raises(ValueError, match="adaptive clipping changes the bound"):
        plan(
            clipping=AdaptiveClipping(),
            correlation=Banded(2),
            sampler=CyclicPoissonSampler(0.1, 2),
        )


class TestUsers:
    def test_nobody_contributes_more_than_the_bound(self, source):
        users = ["ann"] * 7 + ["bob"] * 2 + ["ann"] * 3 + ["eve"]
        kept = bound_contributions(users, 3, source)
        assert kept.users == ("ann", "bob", "eve")
        assert kept.mask_Uk.sum(1).tolist() == [3, 2, 1]
        for row, (index_k, mask_k) in enumerate(zip(kept.index_Uk, kept.mask_Uk, strict=True)):
            mine = index_k[mask_k].tolist()
            assert mine == sorted(set(mine))
            assert {users[i] for i in mine} == {kept.users[row]}
        assert kept.examples.tolist() == sorted(kept.index_Uk[kept.mask_Uk].tolist())
        index_Bk, mask_Bk = kept.of(torch.tensor([1]))
        assert index_Bk[mask_Bk].tolist() == [7, 8]

    def test_the_choice_is_uniform(self, source):
        """χ² over the C(4, 2) = 6 pairs in 1200 choices; false alarms at 1e-6."""
        pairs = {}
        for number in range(1200):
            chosen = bound_contributions(["u"] * 4, 2, source.child(str(number))).examples
            pairs[tuple(chosen.tolist())] = pairs.get(tuple(chosen.tolist()), 0) + 1
        assert len(pairs) == 6
        assert stats.chisquare(list(pairs.values())).pvalue > 1e-6

    def test_sampling_examples_costs_a_mixture_of_gaussians(self):
        """With one example a user it is the Poisson event; with more it costs more."""
        one, two = (plan(users=ExampleLevelSampling(k), steps=10) for k in (1, 2))
        alone = plan(steps=10).guarantee().epsilon
        assert one.guarantee().epsilon == pytest.approx(alone, abs=2e-3)
        assert two.guarantee().epsilon > 1.3 * alone
        assert "per user" in str(two.guarantee())

    def test_sampling_users_costs_what_sampling_examples_does_with_users_for_examples(self):
        by_user = plan(users=UserLevelSampling(50))
        assert by_user.unit == "user"
        assert by_user.event() == plan().event()


class TestSearch:
    @pytest.mark.parametrize(
        ("search", "law"),
        [
            (Search(mean_trials=4.0), stats.geom(0.25)),
            (Search(mean_trials=4.0, law="poisson"), stats.poisson(4.0)),
            (
                Search(mean_trials=4.0, law="truncated-negative-binomial", shape=1.0),
                stats.geom(0.25),
            ),
        ],
    )
    def test_trials_follow_the_law_that_is_accounted(self, source, search, law):
        """χ² over 2000 draws; false alarms at 1e-6. The law of twice the mean is rejected."""
        drawn = np.array([search.draw_trials(source) for _ in range(2000)])
        edges = np.arange(0, 9)
        observed = [(drawn == k).sum() for k in edges] + [(drawn > 8).sum()]
        expected = np.array([*law.pmf(edges), law.sf(8)]) * 2000
        used = expected > 0
        assert (np.array(observed)[~used] == 0).all()
        assert stats.chisquare(np.array(observed)[used], expected[used]).pvalue > 1e-6
        twice = Search(mean_trials=8.0, law=search.law, shape=search.shape)
        wrong = np.array([twice.draw_trials(source) for _ in range(2000)])
        counts = np.array([*((wrong == k).sum() for k in edges), (wrong > 8).sum()])
        assert stats.chisquare(counts[used], expected[used]).pvalue < 1e-6

    @pytest.mark.parametrize("shape", [0.0, 0.5])
    def test_the_truncated_negative_binomial_has_its_mean(self, source, shape):
        """Tails are long: the mean of min(K, 60) over 3000 draws, |z| < 5."""
        search = Search(mean_trials=5.0, law="truncated-negative-binomial", shape=shape)
        from privlm.dp.selection import _gamma

        gamma = _gamma(shape, 5.0)
        k = np.arange(1, 3000)
        log_terms = (
            np.cumsum(np.log((np.arange(3000)[:-1] + shape + (shape == 0)) / k))
            if shape
            else -np.log(k)
        )
        weights = np.exp(log_terms + k * math.log1p(-gamma))
        weights /= weights.sum()
        assert weights @ k == pytest.approx(5.0, rel=1e-6)
        capped = np.minimum(k, 60)
        mean = weights @ capped
        deviation = math.sqrt(weights @ (capped - mean) ** 2 / 3000)
        drawn = np.array([search.draw_trials(source) for _ in range(3000)])
        assert drawn.min() == 1
        assert abs(np.minimum(drawn, 60).mean() - mean) < 5 * deviation

    def test_a_search_costs_more_than_one_run_and_less_than_all_of_them(self):
        from privlm.dp import epsilon_of_search

        run = plan(noise_multiplier=4.0)
        searched = epsilon_of_search(Search(mean_trials=10.0), run)
        assert searched.accountant == "RDP"
        assert "PLD does not know" in searched.fallback_reason
        assert run.guarantee().epsilon < searched.value
        assert searched.value < epsilon_of(run.sampler.event(4.0, 100 * 40), 1e-5).value

    def test_one_trial_is_the_least(self, source):
        assert Search(mean_trials=1.0).draw_trials(source) == 1
        with pytest.raises(ValueError, match="mean_trials"):
            Search(mean_trials=0.5)
        with pytest.raises(ValueError, match="shape"):
            Search(mean_trials=2.0, law="poisson", shape=1.0)
