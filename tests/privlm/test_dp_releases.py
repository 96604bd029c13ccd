"""From clipped sums to gradients: what is counted, what is noised, what is made again."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from privlm.dp.clipping import AdaptiveClipping, ClippedSum, FlatClipping
from privlm.dp.factorization import Banded
from privlm.dp.ledger import Ledger
from privlm.dp.plan import Plan
from privlm.dp.records import (
    Collated,
    InMemory,
    OfContributors,
    OfUsers,
    check_unit,
    per_user,
)
from privlm.dp.releases import BudgetSpent, Releases, ReplayDiffers
from privlm.dp.sampling import CyclicPoissonSampler, PoissonSampler
from privlm.dp.training import fit, private_gradients
from privlm.dp.users import ExampleLevelSampling, UserLevelSampling, bound_contributions
from protocols.randomness import Stream

SEED = bytes(range(32))


def stream(label="run"):
    return Stream(SEED, label)


def plan(**changes):
    settings = {
        "sampler": PoissonSampler(0.5),
        "steps": 6,
        "noise_multiplier": 1.0,
        "expected_batch_size": 10.0,
        "delta": 1e-5,
    }
    return Plan(**settings | changes)


@pytest.fixture
def ledger(tmp_path):
    with Ledger(tmp_path / "ledger.jsonl", dataset="d" * 64) as opened:
        yield opened


def total(values=(1.0, 2.0), bound=1.0, **counts):
    return ClippedSum((torch.tensor(values, dtype=torch.float64),), bound, **counts)


class TestReleases:
    def test_each_step_is_counted_once_and_noised_anew(self, ledger):
        releases = Releases(plan(), ledger, "r", stream())
        released = [releases.release(total())[0] for _ in range(6)]
        assert ledger.steps("r") == 6
        assert len({tuple(r.tolist()) for r in released}) == 6

    def test_the_plan_ends(self, ledger):
        releases = Releases(plan(steps=1), ledger, "r", stream())
        releases.draw(20)
        releases.release(total())
        with pytest.raises(BudgetSpent):
            releases.draw(20)

    def test_a_counted_step_is_made_again_from_the_same_batch_and_noise(self, ledger):
        first = Releases(plan(), ledger, "r", stream(), released={})
        batches, released, digests = [], [], {}
        for step in range(4):
            batches.append(first.draw(20)[0])
            released.append(first.release(total())[0])
            digests[step] = first.digest
        again = Releases(plan(), ledger, "r", stream(), start=1, released=digests)
        for step in (1, 2, 3):
            assert torch.equal(again.draw(20)[0], batches[step])
            assert torch.equal(again.release(total())[0], released[step])
            assert ledger.steps("r") == 4
        again.release(total())
        assert ledger.steps("r") == 5

    def test_a_step_that_comes_out_differently_is_not_released(self, ledger):
        """Two sums under one noise would give their difference away."""
        first = Releases(plan(), ledger, "r", stream(), released={})
        first.release(total())
        digests = {0: first.digest}
        with pytest.raises(ReplayDiffers):
            Releases(plan(), ledger, "r", stream(), start=0, released=digests).release(
                total((1.5, 2.0))
            )
        with pytest.raises(ValueError, match="give the digests"):
            Releases(plan(), ledger, "r", stream(), start=0)

    def test_another_plan_does_not_go_on_under_the_name_of_a_dearer_one(self, ledger):
        Releases(plan(noise_multiplier=10.0), ledger, "r", stream()).release(total())
        for other in (plan(noise_multiplier=0.1), plan(clipping=FlatClipping(2.0))):
            with pytest.raises(ValueError, match="another plan"):
                Releases(other, ledger, "r", stream())

    def test_two_runs_of_one_stream_share_no_noise(self, ledger):
        a, b = (Releases(plan(), ledger, run, stream()) for run in ("a", "b"))
        assert not torch.equal(a.draw(1000)[0], b.draw(1000)[0])
        assert (a.release(total())[0] != b.release(total())[0]).all()

    def test_correlated_noise_is_rebuilt_in_the_middle(self, ledger):
        banded = plan(sampler=CyclicPoissonSampler(0.5, 3), correlation=Banded(3))
        first = Releases(banded, ledger, "r", stream(), released={})
        released, digests = [], {}
        for step in range(6):
            released.append(first.release(total())[0])
            digests[step] = first.digest
        for start in (1, 4):
            again = Releases(banded, ledger, "r", stream(), start=start, released=digests)
            for step in range(start, 6):
                assert torch.equal(again.release(total())[0], released[step])
        assert ledger.steps("r") == 6

    @pytest.mark.parametrize("correlation", [None, Banded(3)])
    def test_a_run_that_needs_its_stream_is_not_resumed_without_saying_so(
        self, ledger, correlation
    ):
        """Drawn anew, groups and past noise would be others than those released under."""
        cyclic = plan(sampler=CyclicPoissonSampler(0.5, 3), correlation=correlation)
        Releases(cyclic, ledger, "r", stream()).release(total())
        with pytest.raises(ValueError, match="the same secret stream"):
            Releases(cyclic, ledger, "r", Stream.fresh("another"))
        assert Releases(cyclic, ledger, "r", stream(), start=1).step == 1

    def test_a_start_beyond_the_ledger_is_refused(self, ledger):
        with pytest.raises(ValueError, match="the ledger counts 0"):
            Releases(plan(), ledger, "r", stream(), start=1)

    def test_a_sum_under_another_bound_is_refused_before_it_is_counted(self, ledger):
        releases = Releases(plan(), ledger, "r", stream())
        with pytest.raises(ValueError, match=r"clipped to 2\.0, this step's bound is 1\.0"):
            releases.release(total(bound=2.0))
        assert ledger.steps("r") == 0

    def test_the_report_says_what_happened(self, ledger):
        releases = Releases(plan(), ledger, "r", stream())
        releases.release(total(examples=4, unclipped=3, loss=10.0))
        report = releases.report
        assert (report.step, report.examples, report.unclipped, report.loss) == (0, 4, 3, 2.5)
        assert report.max_grad_norm == 1.0


class TestAdaptiveClipping:
    def test_the_bound_follows_the_quantile(self, ledger):
        rule = AdaptiveClipping(1.0, 0.5, 0.3, 5.0)
        adaptive = plan(clipping=rule, steps=60, expected_batch_size=1000.0)
        releases = Releases(adaptive, ledger, "r", stream())
        norms = np.random.default_rng(1).lognormal(2.0, 0.3, 1000)  # median e² = 7.39
        for _ in range(60):
            bound = releases.max_grad_norm
            below = int((norms <= bound).sum())
            releases.release(total(bound=bound, examples=1000, unclipped=below))
        assert releases.max_grad_norm == pytest.approx(math.exp(2.0), rel=0.1)

    def test_gradients_and_count_together_cost_what_the_plan_says(self, ledger):
        """σ⁻² = σ_gradient⁻² + σ_count⁻²: the two releases are one Gaussian mechanism."""
        rule = AdaptiveClipping(count_noise_multiplier=2.0)
        adaptive = plan(clipping=rule, steps=400, expected_batch_size=1.0)
        releases = Releases(adaptive, ledger, "r", stream())
        gradients, counts = [], []
        for _ in range(400):
            bound = releases.max_grad_norm
            values = torch.zeros(50, dtype=torch.float64)
            gradients.append(releases.release(ClippedSum((values,), bound))[0] / bound)
            moved = math.log(releases.max_grad_norm / bound) / -rule.learning_rate
            counts.append(moved + rule.target_quantile - 0.5)
        # 20,000 and 400 normals: false alarms below 1e-6 and 1e-5.
        of_gradient = float(torch.cat(gradients).std())
        of_count = float(np.std(counts)) * 2  # over the count's sensitivity of 1/2
        assert of_gradient == pytest.approx((1 - 1 / 4) ** -0.5, rel=0.03)
        assert of_count == pytest.approx(2.0, rel=0.16)

    def test_a_count_that_costs_all_is_refused(self):
        with pytest.raises(ValueError, match="count_noise_multiplier"):
            plan(clipping=AdaptiveClipping(count_noise_multiplier=0.5))


def squared(model, batch):
    x = batch["examples"] if isinstance(batch, dict) else batch
    return (model(x).flatten(1) - 1).square().sum(1)


class TestRecords:
    def test_a_data_set_with_a_collator(self):
        items = [{"x": torch.full((2,), float(i))} for i in range(5)]
        records = Collated(items, lambda part: {"x": torch.stack([item["x"] for item in part])})
        assert len(records) == 5
        assert records.take(torch.tensor([3, 1]))["x"].tolist() == [[3.0, 3.0], [1.0, 1.0]]
        assert len(records.take(torch.tensor([], dtype=torch.int64))) == 0

    @pytest.mark.parametrize("given", ["text", 7, ("text",)])
    def test_a_collator_that_gives_no_tensors_is_refused(self, given):
        records = Collated(["a"], lambda items: given)
        with pytest.raises(ValueError, match=f"a collator gave {type(given).__name__}"):
            records.take(torch.tensor([0]))

    def test_one_user_moves_the_sum_by_one_bound_at_most(self, ledger):
        """Ten examples of one user, each clipped alone, could move it by ten bounds."""
        torch.manual_seed(3)
        model = nn.Linear(3, 2).double()
        examples = torch.randn(30, 3).double() * 5
        users = ["anna"] * 10 + [f"u{n}" for n in range(20)]
        records = OfUsers(InMemory(examples), bound_contributions(users, 4, stream("users")))
        assert len(records) == 21
        bound = 0.1

        def sum_of(which):
            uls = plan(
                users=UserLevelSampling(4),
                noise_multiplier=0.0,
                clipping=FlatClipping(bound),
                sampler=PoissonSampler(1.0),
                expected_batch_size=1.0,
                steps=1,
            )
            with private_gradients(
                model,
                per_user(squared),
                _Some(records, which),
                uls,
                ledger,
                run=f"{which}",
                stream=stream(),
                microbatch_size=4,
            ) as gradients:
                return torch.cat([g.flatten() for g in gradients.next()])

        everybody, without = sum_of(range(21)), sum_of(range(1, 21))
        assert float((everybody - without).norm()) <= bound
        assert float((everybody - without).norm()) > 0.9 * bound

    def test_records_of_another_unit_are_refused(self, ledger):
        examples = InMemory(torch.randn(6, 3))
        chosen = bound_contributions(["a", "a", "b", "b", "c", "c"], 2, stream("users"))
        by_user = plan(users=UserLevelSampling(2))
        by_example = plan(users=ExampleLevelSampling(2))
        for settings, records in (
            (by_user, examples),
            (by_user, OfContributors(examples, chosen)),
            (by_example, examples),
            (plan(), OfUsers(examples, chosen)),
            (plan(users=UserLevelSampling(1)), OfUsers(examples, chosen)),
        ):
            with (
                pytest.raises(ValueError, match="users|examples"),
                private_gradients(
                    nn.Linear(3, 2), squared, records, settings, ledger, run="x", stream=stream()
                ),
            ):
                pass
        check_unit(OfContributors(examples, chosen), by_example.users)

    def test_a_record_of_several_rows_is_refused(self, ledger):
        """Each row would be clipped by itself, and the record move the sum by all of them."""
        records = Collated(
            [torch.ones(3)] * 4, lambda items: torch.stack([x for x in items for _ in range(8)])
        )
        everyone = plan(sampler=PoissonSampler(1.0))
        with (
            private_gradients(
                nn.Linear(3, 2), squared, records, everyone, ledger, run="x", stream=stream()
            ) as gradients,
            pytest.raises(ValueError, match="4 records gave a batch of 32 rows"),
        ):
            gradients.next()
        assert ledger.steps("x") == 0

    def test_a_user_counts_by_the_mean_of_his_examples(self):
        torch.manual_seed(3)
        model = nn.Linear(3, 2).double()
        examples = torch.randn(5, 3).double()
        records = OfUsers(
            InMemory(examples), bound_contributions(["a", "a", "b", "a", "b"], 3, stream("users"))
        )
        loss_U = per_user(squared)(model, records.take(torch.tensor([0, 1])))
        each = squared(model, examples)
        torch.testing.assert_close(
            loss_U, torch.stack([each[[0, 1, 3]].mean(), each[[2, 4]].mean()])
        )


class _Some(OfUsers):
    """Some of the users."""

    def __init__(self, records, which):
        self.records, self.which = records, torch.tensor(list(which))
        self.examples_per_user = records.examples_per_user

    def __len__(self):
        return len(self.which)

    def take(self, which):
        return self.records.take(self.which[which])


def test_training_by_users_runs_to_its_end(ledger):
    torch.manual_seed(3)
    model = nn.Linear(3, 2)
    users = [f"u{n % 7}" for n in range(40)]
    records = OfUsers(InMemory(torch.randn(40, 3)), bound_contributions(users, 4, stream("users")))
    uls = plan(users=UserLevelSampling(4), steps=5)
    before = model.weight.detach().clone()
    with private_gradients(
        model, per_user(squared), records, uls, ledger, run="r", stream=stream()
    ) as gradients:
        fit(model, gradients, torch.optim.SGD(model.parameters(), lr=0.1), range(5))
    assert ledger.steps("r") == 5
    assert not torch.equal(model.weight, before)
    assert uls.guarantee().unit == "user"
