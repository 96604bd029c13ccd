"""Sampling, clipping, noise and their order: each test rejects the wrong engine too.

Statistical tests run on fixed streams; each states the false-alarm probability it
would have on a fresh one.
"""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from privlm.dp.clipping import ROUNDING_MARGIN, ClippedSum, NonFiniteGradient, PerExampleClipping
from privlm.dp.ledger import Ledger
from privlm.dp.noise import GRID_BITS, GaussianMechanism
from privlm.dp.plan import Plan
from privlm.dp.releases import BudgetSpent
from privlm.dp.sampling import PoissonSampler
from privlm.dp.training import (
    PlainGradients,
    PrivateGradients,
    causal_lm_loss,
    fit,
    private_gradients,
)
from privlm.models import TinyConfig, TinyDecoder
from protocols.randomness import Stream

SEED = bytes(range(32))


def stream(label: str = "test") -> Stream:
    return Stream(SEED, label)


def tiny(dtype=torch.float32) -> TinyDecoder:
    config = TinyConfig(vocab_size=23, context=8, width=16, layers=2, heads=2)
    return TinyDecoder(config, torch.Generator().manual_seed(1)).to(dtype)


def examples(count: int, seed: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 23, (count, 8), generator=generator)
    mask = (torch.arange(8) < torch.randint(2, 9, (count, 1), generator=generator)).long()
    return torch.stack([ids, mask], dim=1)


def per_example_gradients(model: nn.Module, batch: torch.Tensor) -> list[list[torch.Tensor]]:
    """The slow truth: one backward an example."""
    parameters = list(model.parameters())
    return [
        list(torch.autograd.grad(causal_lm_loss(model, example[None]).sum(), parameters))
        for example in batch
    ]


def clipped_by_loop(model: nn.Module, batch: torch.Tensor, bound: float) -> list[torch.Tensor]:
    total = [torch.zeros_like(p) for p in model.parameters()]
    for gradients in per_example_gradients(model, batch):
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        for so_far, g in zip(total, gradients, strict=True):
            so_far.add_(g * min(1.0, bound * (1 - ROUNDING_MARGIN) / float(norm)))
    return total


class TestSampling:
    def test_every_example_joins_independently_at_the_rate(self):
        """Batch sizes are Binomial(N, q); z-tests at |z| < 5, false alarms below 1e-5."""
        n, q, draws = 400, 0.1, 2000
        source = stream()
        sizes = np.array([len(PoissonSampler(q).draw(n, t, source)) for t in range(draws)])
        variance = n * q * (1 - q)
        assert abs(sizes.mean() - n * q) < 5 * math.sqrt(variance / draws)
        assert abs(sizes.var() / variance - 1) < 5 * math.sqrt(2 / draws)

    def test_fixed_size_batches_would_be_noticed(self):
        """The same variance test rejects a shuffler whose batches all hold N·q."""
        sizes = np.full(2000, 40)
        assert abs(sizes.var() / (400 * 0.1 * 0.9) - 1) > 5 * math.sqrt(2 / 2000)

    def test_inclusion_of_two_examples_is_independent(self):
        """A 2x2 table over 4000 draws, p > 1e-6; a shuffler's negative dependence is rejected."""
        source = stream("pairs")
        table = np.zeros((2, 2), int)
        shuffled = np.zeros((2, 2), int)
        rng = np.random.default_rng(0)
        for step in range(4000):
            drawn = set(PoissonSampler(0.5).draw(4, step, source).tolist())
            table[int(0 in drawn), int(1 in drawn)] += 1
            fixed = set(rng.permutation(4)[:2].tolist())
            shuffled[int(0 in fixed), int(1 in fixed)] += 1
        assert stats.chi2_contingency(table).pvalue > 1e-6 > stats.chi2_contingency(shuffled).pvalue

    def test_two_steps_draw_different_batches(self):
        source = stream()
        first, second = (PoissonSampler(0.5).draw(1000, t, source) for t in range(2))
        assert not torch.equal(first, second)


class TestClipping:
    @pytest.mark.parametrize("bound", [1e-3, 0.5, 1e3])
    @pytest.mark.parametrize("microbatch_size", [1, 3, 64])
    def test_equals_the_loop_over_examples(self, bound, microbatch_size):
        model, batch = tiny(), examples(7)
        expected = clipped_by_loop(model, batch, bound)
        with PerExampleClipping(model, causal_lm_loss, bound, microbatch_size) as clipping:
            clipped = clipping.clipped_sum(batch)
        assert clipped.l2_sensitivity == bound
        for got, want in zip(clipped.values, expected, strict=True):
            # Float32 norms are rounded up by about 10^-4; in float64, 10^-9 is asked elsewhere.
            torch.testing.assert_close(got.float(), want, rtol=3e-4, atol=3e-5 * bound)

    def test_clipping_after_the_sum_would_be_noticed(self):
        model, batch = tiny(), examples(7)
        after = [sum(gs) for gs in zip(*per_example_gradients(model, batch), strict=True)]
        norm = torch.cat([g.flatten() for g in after]).norm()
        expected = clipped_by_loop(model, batch, 0.5)
        assert not torch.allclose(after[0] * 0.5 / norm, expected[0], rtol=1e-2)

    def test_one_example_moves_the_sum_by_no_more_than_the_sensitivity(self):
        model, batch = tiny(), examples(20) * 1
        with PerExampleClipping(model, causal_lm_loss, 0.1, 64) as clipping:
            for left_out in range(20):
                rest = torch.cat([batch[:left_out], batch[left_out + 1 :]])
                full, less = clipping.clipped_sum(batch), clipping.clipped_sum(rest)
                moved = torch.cat(
                    [
                        (a - b).flatten().double()
                        for a, b in zip(full.values, less.values, strict=True)
                    ]
                ).norm()
                assert moved <= 0.1 * (1 + 1e-5)
            alone = clipping.clipped_sum(batch[:1])
        assert torch.cat([v.flatten().double() for v in alone.values]).norm() <= 0.1

    def test_a_long_sum_of_aligned_gradients_keeps_the_sensitivity(self):
        """A running float32 sum of 2000 equal gradients would drift beyond the bound."""
        model, example = tiny(), examples(1)
        with PerExampleClipping(model, causal_lm_loss, 0.1, 64) as clipping:
            full = clipping.clipped_sum(example.expand(2001, 2, 8).contiguous())
            less = clipping.clipped_sum(example.expand(2000, 2, 8).contiguous())
        moved = torch.cat(
            [(a - b).flatten() for a, b in zip(full.values, less.values, strict=True)]
        ).norm()
        assert moved.dtype == torch.float64
        assert 0.0999 < moved <= 0.1

    @pytest.mark.parametrize(("bound", "size"), [(1e-24, 4), (0.0, 4), (1.0, 0), (1.0, 5000)])
    def test_bounds_that_floats_cannot_keep_are_refused(self, bound, size):
        with pytest.raises(ValueError, match="max_grad_norm|microbatch_size"):
            PerExampleClipping(tiny(), causal_lm_loss, bound, size)

    def test_an_empty_batch_sums_to_zero(self):
        with PerExampleClipping(tiny(), causal_lm_loss, 1.0, 4) as clipping:
            clipped = clipping.clipped_sum(examples(3)[:0])
        assert all(not bool(value.any()) for value in clipped.values)

    def test_padding_changes_nothing(self):
        model, batch = tiny(), examples(4)
        other = batch.clone()
        other[:, 0][batch[:, 1] == 0] = 5
        with PerExampleClipping(model, causal_lm_loss, 1.0, 4) as clipping:
            for a, b in zip(
                clipping.clipped_sum(batch).values, clipping.clipped_sum(other).values, strict=True
            ):
                torch.testing.assert_close(a, b)

    def test_a_gradient_that_is_not_finite_is_refused(self):
        model = tiny()
        with torch.no_grad():
            model.head.weight[3, 3] = math.nan
        with (
            PerExampleClipping(model, causal_lm_loss, 1.0, 4) as clipping,
            pytest.raises(NonFiniteGradient, match="not finite; nothing was released"),
        ):
            clipping.clipped_sum(examples(4))

    def test_a_loss_that_couples_examples_is_refused(self):
        with (
            PerExampleClipping(
                tiny(), lambda model, batch: causal_lm_loss(model, batch).mean(), 1.0, 4
            ) as clipping,
            pytest.raises(ValueError, match="one value per example"),
        ):
            clipping.clipped_sum(examples(4))

    def test_batch_norm_is_refused_by_name(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        with pytest.raises(ValueError, match="BatchNorm"):
            PerExampleClipping(model, causal_lm_loss, 1.0, 4).__enter__()

    def test_tied_weights_share_one_exact_norm(self):
        config = TinyConfig(vocab_size=23, context=8, width=16, layers=1, heads=2, tied_head=True)
        model = TinyDecoder(config, torch.Generator().manual_seed(1))
        batch = examples(5)
        expected = clipped_by_loop(model, batch, 0.5)
        with PerExampleClipping(model, causal_lm_loss, 0.5, 8) as clipping:
            clipped = clipping.clipped_sum(batch)
        for got, want in zip(clipped.values, expected, strict=True):
            torch.testing.assert_close(got.float(), want, rtol=1e-4, atol=1e-6)

    def test_the_hooks_are_gone_afterwards(self):
        model, batch = tiny(), examples(3)
        with PerExampleClipping(model, causal_lm_loss, 1.0, 4) as clipping:
            clipping.clipped_sum(batch)
        causal_lm_loss(model, batch).sum().backward()
        assert all(getattr(p, "grad_sample", None) is None for p in model.parameters())


class TestNoise:
    def released(self, noise_multiplier: float, sensitivity: float, count: int) -> np.ndarray:
        clipped = ClippedSum((torch.zeros(count // 2), torch.zeros(2, count // 4)), sensitivity)
        release = GaussianMechanism(noise_multiplier).release(clipped, stream("noise"))
        return torch.cat([v.flatten() for v in release.values]).double().numpy()

    def test_the_law_is_gaussian_with_the_stated_deviation(self):
        """KS over 40,000 draws: p > 1e-4 for σ, rejected below 1e-4 for 2σ/3, 3σ/2 and 0.95σ."""
        noise = self.released(1.7, 0.5, 40_000) / (1.7 * 0.5)
        assert stats.kstest(noise, "norm").pvalue > 1e-4
        for wrong in (2 / 3, 3 / 2, 0.95):
            assert stats.kstest(noise, "norm", args=(0, wrong)).pvalue < 1e-4

    def test_the_grid_depends_on_public_numbers_alone(self):
        values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
        release = GaussianMechanism(1.0).release(ClippedSum((values,), 1.0), stream())
        scaled = release.values[0].double() * 2.0**GRID_BITS
        assert torch.equal(scaled, scaled.round())

    def test_noise_is_never_used_twice(self):
        source = stream()
        clipped = ClippedSum((torch.zeros(1000),), 1.0)
        mechanism = GaussianMechanism(1.0)
        first, second = (mechanism.release(clipped, source).values[0] for _ in range(2))
        assert abs(float(np.corrcoef(first, second)[0, 1])) < 0.16  # 5 deviations
        assert not torch.equal(first, second)

    def test_secrets_do_not_print(self):
        assert "tensor" not in repr(ClippedSum((torch.ones(3),), 1.0))


def plan(steps: int = 5, q: float = 0.5, sigma: float = 1.0, batch: float = 10.0) -> Plan:
    return Plan(
        sampler=PoissonSampler(q),
        steps=steps,
        noise_multiplier=sigma,
        expected_batch_size=batch,
        delta=1e-5,
    )


class TestTraining:
    def test_the_ledger_is_written_before_the_noise_is_drawn(self, tmp_path, monkeypatch):
        order = []
        record, release = Ledger.record, GaussianMechanism.release
        monkeypatch.setattr(
            Ledger, "record", lambda *a, **k: (order.append("ledger"), record(*a, **k))[1]
        )
        monkeypatch.setattr(
            GaussianMechanism,
            "release",
            lambda *a, **k: (order.append("release"), release(*a, **k))[1],
        )
        with (
            Ledger(tmp_path / "l", dataset="d") as ledger,
            private_gradients(
                tiny(), causal_lm_loss, examples(8), plan(), ledger, run="r", stream=stream()
            ) as gradients,
        ):
            gradients.next()
        assert order == ["ledger", "release"]

    def test_a_step_beyond_the_plan_is_refused(self, tmp_path):
        model = tiny()
        with (
            Ledger(tmp_path / "l", dataset="d") as ledger,
            private_gradients(
                model, causal_lm_loss, examples(8), plan(2), ledger, run="r", stream=stream()
            ) as gradients,
        ):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            fit(model, gradients, optimizer, range(2))
            with pytest.raises(BudgetSpent, match="all 2 steps"):
                gradients.next()
            assert ledger.steps("r") == 2

    def test_noise_comes_once_a_step_whatever_the_microbatch(self, tmp_path):
        """Gradient variance over many coordinates: (σ·C/B)², χ² at 5 deviations."""
        clipping_free = torch.zeros(40, 2, 8, dtype=torch.long)  # no target: gradients are zero
        for microbatch_size in (2, 64):
            model = tiny()
            with (
                Ledger(tmp_path / str(microbatch_size), dataset="d") as ledger,
                private_gradients(
                    model,
                    causal_lm_loss,
                    clipping_free,
                    plan(sigma=3.0, batch=10.0),
                    ledger,
                    run="r",
                    stream=stream(),
                    microbatch_size=microbatch_size,
                ) as gradients,
            ):
                noise = torch.cat([g.flatten().double() for g in gradients.next()])
            ratio = float(noise.var()) / (3.0 / 10.0) ** 2
            assert abs(ratio - 1) < 5 * math.sqrt(2 / len(noise))

    def test_an_empty_batch_releases_noise_and_is_recorded(self, tmp_path):
        with (
            Ledger(tmp_path / "l", dataset="d") as ledger,
            private_gradients(
                tiny(), causal_lm_loss, examples(3), plan(q=1e-9), ledger, run="r", stream=stream()
            ) as gradients,
        ):
            assert any(bool(g.any()) for g in gradients.next())
            assert ledger.steps("r") == 1

    def test_the_normaliser_is_the_expected_batch_size(self, tmp_path):
        model, batch = tiny(), examples(6)
        expected = clipped_by_loop(model, batch, 1.0)
        with (
            Ledger(tmp_path / "l", dataset="d") as ledger,
            private_gradients(
                model,
                causal_lm_loss,
                batch,
                plan(q=1.0, sigma=0.0, batch=17.0),
                ledger,
                run="r",
                stream=stream(),
            ) as gradients,
        ):
            for got, want in zip(gradients.next(), expected, strict=True):
                torch.testing.assert_close(got.float(), want / 17.0, rtol=1e-4, atol=1e-6)

    def test_a_failed_ledger_stops_the_release(self, tmp_path, monkeypatch):
        released = []
        monkeypatch.setattr(GaussianMechanism, "release", lambda *a, **k: released.append(a))

        def full(*args):
            raise OSError(28, "No space left on device")

        with (
            Ledger(tmp_path / "l", dataset="d") as ledger,
            private_gradients(
                tiny(), causal_lm_loss, examples(4), plan(), ledger, run="r", stream=stream()
            ) as gradients,
        ):
            monkeypatch.setattr("privlm.dp.ledger.os.pwrite", full)
            with pytest.raises(ValueError, match="nothing was released; free some disk space"):
                gradients.next()
        assert released == []

    def test_sampling_and_noise_are_fresh_in_every_run(self, tmp_path):
        def first(seed: int) -> torch.Tensor:
            with (
                Ledger(tmp_path / str(seed), dataset="d") as ledger,
                private_gradients(
                    tiny(),
                    causal_lm_loss,
                    examples(8),
                    plan(),
                    ledger,
                    run="r",
                    stream=Stream.fresh("run"),
                ) as gradients,
            ):
                return gradients.next()[0]

        assert not torch.equal(first(1), first(2))

    def test_plain_gradients_are_means_over_every_example_once_an_epoch(self):
        model, batch = tiny(), examples(6)
        gradients = PlainGradients(
            model, causal_lm_loss, batch, 6, torch.Generator().manual_seed(0)
        )
        want = torch.autograd.grad(causal_lm_loss(model, batch).mean(), list(model.parameters()))
        for a, b in zip(gradients.next(), want, strict=True):
            torch.testing.assert_close(a, b)

    def test_training_on_nothing_is_refused(self):
        with pytest.raises(ValueError, match="no examples"):
            PlainGradients(tiny(), causal_lm_loss, examples(0), 4, torch.Generator())

    def test_private_training_learns(self, tmp_path):
        model, batch = tiny(), examples(1).expand(64, 2, 8).contiguous()
        before = float(causal_lm_loss(model, batch).mean().detach())
        with (
            Ledger(tmp_path / "l", dataset="d") as ledger,
            private_gradients(
                model,
                causal_lm_loss,
                batch,
                plan(steps=40, sigma=0.5, batch=32.0),
                ledger,
                run="r",
                stream=stream(),
            ) as gradients,
        ):
            assert isinstance(gradients, PrivateGradients)
            fit(model, gradients, torch.optim.SGD(model.parameters(), lr=0.5), range(40))
        assert float(causal_lm_loss(model, batch).mean().detach()) < before - 0.5
