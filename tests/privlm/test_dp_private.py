"""make_private: the loop around it may change, the mechanism may not.

Randomness is secret and fresh in every run, so that each statistical test states how often it
would raise a false alarm.
"""

import copy
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

from privlm.dp import (
    NO_LEDGER,
    BallsInBinsSampler,
    Banded,
    Budget,
    BudgetExceeded,
    CyclicPoissonSampler,
    LedgerError,
    OutOfTurn,
    make_private,
    read_ledger,
)
from privlm.dp.clipping import AutomaticClipping
from privlm.dp.fingerprints import fingerprint_of_items
from privlm.dp.releases import BudgetSpent
from privlm.models import UnknownLossError

WIDTH = 6


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(5)


@pytest.fixture
def data(generator):
    return [
        {"x": torch.randn(WIDTH, generator=generator), "y": torch.randn(2, generator=generator)}
        for _ in range(24)
    ]


@pytest.fixture
def model(generator):
    made = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 2))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(generator=generator)
    return made


def squared_error(model, batch):
    return (model(batch["x"]) - batch["y"]).square().sum(1)


def private(model, data, *, batch_size=8, lr=0.1, **changes):
    settings = {
        "noise_multiplier": 1.0,
        "target_delta": 1e-5,
        "epochs": 2,
        "ledger": NO_LEDGER,
        "loss": squared_error,
    }
    return make_private(
        model,
        torch.optim.SGD(model.parameters(), lr=lr),
        DataLoader(data, batch_size=batch_size, shuffle=True),
        **settings | changes,
    )


def take_steps(training, count):
    _, optimizer, loader = training
    for _, batch in zip(range(count), loader, strict=False):
        optimizer.zero_grad()
        optimizer.backward(batch)
        optimizer.step()


def flat(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


class TestMechanism:
    @pytest.mark.parametrize("microbatch_size", [1, 5, 64])
    def test_a_step_is_the_clipped_mean_whatever_the_micro_batch(
        self, model, data, microbatch_size
    ):
        """Every example drawn, no noise: the step of a loop over examples, clipped one by one."""
        expected = torch.zeros_like(flat(model))
        for item in data:
            one = {name: value[None] for name, value in item.items()}
            loss = squared_error(model, one).sum()
            gradient = torch.cat(
                [g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]
            )
            expected += gradient * min(1.0, 0.5 / float(gradient.norm()))
        before = flat(model)
        with private(
            model,
            data,
            batch_size=24,
            lr=1.0,
            noise_multiplier=0.0,
            max_grad_norm=0.5,
            microbatch_size=microbatch_size,
        ) as training:
            take_steps(training, 1)
            report = training.optimizer.report
        torch.testing.assert_close(flat(model), before - expected / 24, rtol=1e-4, atol=1e-6)
        assert (report.examples, report.step) == (24, 0)

    def test_noise_is_added_once_a_step_however_many_micro_batches(self):
        """Kolmogorov-Smirnov over 20,000 parameters; a false alarm in 10^9 runs."""
        silent = nn.Linear(100, 200, bias=False)
        before = flat(silent)
        with private(
            silent,
            [{"x": torch.ones(100)}] * 10,
            batch_size=10,
            lr=1.0,
            loss=lambda model, batch: (model(batch["x"]) * 0).sum(1),
            noise_multiplier=1.5,
            max_grad_norm=2.0,
            microbatch_size=1,
        ) as training:
            take_steps(training, 1)
        noise = (flat(silent) - before).double().numpy()
        std = 1.5 * 2.0 / 10
        accepted = stats.kstest(noise, "norm", args=(0, std)).pvalue
        for wrong in (2 / 3, 3 / 2, math.sqrt(10)):
            assert stats.kstest(noise, "norm", args=(0, wrong * std)).pvalue < 1e-9 < accepted

    def test_batches_are_poisson_and_not_the_loaders_shuffle(self):
        """z-tests of sizes and of pairs at |z| < 6.5; false alarms below 10^-9 in all.

        Shuffled batches, which all hold 10, fail the first; fixed-size ones the second too.
        """
        data = [{"x": torch.full((1,), float(i))} for i in range(20)]
        sizes, first, second = [], [], []
        training = private(
            nn.Linear(1, 1),
            data,
            batch_size=10,
            epochs=300,
            loss=lambda model, batch: model(batch["x"])[:, 0] * 0,
        )
        with training as (_, optimizer, loader):
            for _ in range(300):
                for batch in loader:
                    present = set(batch["x"].flatten().tolist())
                    sizes.append(len(present))
                    first.append(0.0 in present)
                    second.append(1.0 in present)
                    optimizer.backward(batch)
                    optimizer.step()
        draws = len(sizes)
        assert draws == 600

        def is_binomial(sizes):
            variance_error = np.var(sizes) / 5.0 - 1
            return abs(np.mean(sizes) - 10) < 6.5 * math.sqrt(5 / draws) and abs(
                variance_error
            ) < 6.5 * math.sqrt(2 / draws)

        assert is_binomial(sizes)
        assert not is_binomial([10] * draws)
        correlation = np.corrcoef(first, second)[0, 1]
        assert abs(correlation) < 6.5 / math.sqrt(draws)
        assert abs(np.mean(first) - 0.5) < 6.5 * 0.5 / math.sqrt(draws)

    def test_an_empty_batch_is_shaped_like_any_other_and_releases_noise(self, model, data):
        """No empty batch among 60 has a probability below 10^-11."""
        seen = 0
        with private(model, data, batch_size=1, epochs=60 / 24) as training:
            for _ in range(3):
                for batch in training.data_loader:
                    before = flat(model)
                    training.optimizer.backward(batch)
                    training.optimizer.step()
                    if not len(batch["x"]):
                        seen += 1
                        assert batch["x"].shape == (0, WIDTH)
                        assert (flat(model) != before).all()
                if not training.optimizer.steps_left:
                    break
        assert seen > 0

    def test_epsilon_is_the_plans(self, model, data):
        with private(model, data, noise_multiplier=None, target_epsilon=4.0) as training:
            _, optimizer, loader = training
            assert optimizer.plan.steps == 2 * len(loader) == 6
            assert optimizer.plan.sampler.sampling_probability == 8 / 24
            assert optimizer.epsilon() == 0.0
            take_steps(training, 2)
            assert 0 < optimizer.epsilon() == optimizer.epsilon(2) < optimizer.epsilon(6)
            assert optimizer.epsilon(6) == optimizer.guarantee().epsilon
            assert 3.9 < optimizer.guarantee().epsilon <= 4.0

    def test_another_sampler_and_rule(self, model, data):
        with private(
            model,
            data,
            sampler=BallsInBinsSampler(3),
            correlation=Banded(2),
            clipping=AutomaticClipping(0.3),
        ) as training:
            take_steps(training, 3)
            assert training.optimizer.plan.max_grad_norm == 0.3
            assert training.optimizer.steps_taken == 3


class TestOrder:
    def test_a_step_needs_a_backward(self, model, data):
        with private(model, data) as (_, optimizer, loader):
            with pytest.raises(OutOfTurn, match="step needs a backward"):
                optimizer.step()
            batch = next(iter(loader))
            with pytest.raises(OutOfTurn, match="step needs a backward"):
                optimizer.step()
            optimizer.backward(batch)
            optimizer.zero_grad()
            with pytest.raises(OutOfTurn, match="step needs a backward"):
                optimizer.step()
            assert optimizer.steps_taken == 0

    def test_a_batch_serves_once(self, model, data):
        with private(model, data) as (_, optimizer, loader):
            batch = next(iter(loader))
            optimizer.backward(batch)
            with pytest.raises(OutOfTurn, match="twice"):
                optimizer.backward(batch)
            optimizer.step()
            with pytest.raises(OutOfTurn, match="just gave"):
                optimizer.backward(batch)
            with pytest.raises(OutOfTurn, match="step needs a backward"):
                optimizer.step()
            assert optimizer.steps_taken == 1

    @pytest.mark.parametrize(
        "other",
        [
            dict,
            lambda batch: {name: value[:-1] for name, value in batch.items()},
            lambda batch: batch["x"],
            lambda batch: None,
        ],
        ids=["copied", "shortened", "part", "nothing"],
    )
    def test_only_the_batch_just_drawn_is_taken(self, model, data, other):
        with private(model, data, batch_size=24) as (_, optimizer, loader):
            batch = next(iter(loader))
            with pytest.raises(OutOfTurn, match="just gave"):
                optimizer.backward(other(batch))

    def test_a_batch_shortened_in_place_is_refused(self, model, data):
        with private(model, data, batch_size=24) as (_, optimizer, loader):
            batch = next(iter(loader))
            for name in batch:
                batch[name] = batch[name][:3]
            with pytest.raises(OutOfTurn, match="just gave"):
                optimizer.backward(batch)

    @pytest.mark.parametrize(
        "change",
        [lambda x: x.mul_(5.0), lambda x: x.sub_(x.mean(0))],
        ids=["scaled", "mixed"],
    )
    def test_a_batch_written_to_is_refused(self, model, data, change):
        with private(model, data, batch_size=24) as (_, optimizer, loader):
            batch = next(iter(loader))
            change(batch["x"])
            with pytest.raises(OutOfTurn, match="just gave"):
                optimizer.backward(batch)

    def test_a_tensor_put_into_the_batch_is_refused(self, model, data):
        with private(model, data, batch_size=24) as (_, optimizer, loader):
            batch = next(iter(loader))
            batch["x"] = batch["x"] - batch["x"].mean(0)
            with pytest.raises(OutOfTurn, match="just gave"):
                optimizer.backward(batch)

    def test_an_ordinary_backward_before_the_step_is_refused(self, model, data):
        with private(model, data, batch_size=24) as (_, optimizer, loader):
            batch = next(iter(loader))
            optimizer.backward(batch)
            squared_error(model, batch).mean().backward()
            with pytest.raises(OutOfTurn, match="ordinary backward"):
                optimizer.step()
            assert optimizer.steps_taken == 0

    def test_no_batch_is_passed_over(self, model, data):
        with private(model, data) as (_, _, loader):
            batches = iter(loader)
            first = next(batches)
            with pytest.raises(OutOfTurn, match="passed over"):
                next(batches)
            again = next(iter(loader))
            assert torch.equal(first["x"], again["x"])

    def test_an_ordinary_backward_beside_it_is_refused(self, model, data):
        with private(model, data, batch_size=24) as (_, optimizer, loader):
            batch = next(iter(loader))
            squared_error(model, batch).mean().backward()
            with pytest.raises(OutOfTurn, match=r"0\.weight.*ordinary backward"):
                optimizer.backward(batch)
            optimizer.zero_grad()
            optimizer.backward(batch)
            optimizer.step()
            assert all(p.grad is None for p in model.parameters())

    def test_parameters_stay_trained_or_frozen(self, model, data):
        model[0].weight.requires_grad_(False)
        with private(model, data) as (_, optimizer, loader):
            model[0].weight.requires_grad_(True)
            with pytest.raises(OutOfTurn, match="freeze"):
                optimizer.backward(next(iter(loader)))

    def test_frozen_parameters_do_not_move(self, model, data):
        model[0].weight.requires_grad_(False)
        before = copy.deepcopy(model.state_dict())
        with private(model, data) as training:
            take_steps(training, 2)
        moved = {n for n, value in model.state_dict().items() if not value.equal(before[n])}
        assert moved == {"0.bias", "2.weight", "2.bias"}

    def test_the_end_of_the_plan_is_the_end(self, model, data):
        with private(model, data) as training:
            _, optimizer, loader = training
            for _ in range(2):
                take_steps(training, 99)
            assert (optimizer.steps_taken, optimizer.steps_left) == (6, 0)
            before = flat(model)
            with pytest.raises(BudgetSpent):
                next(iter(loader))
            assert torch.equal(flat(model), before)

    def test_what_would_look_twice_is_refused(self, model, data):
        with private(model, data) as (_, optimizer, loader):
            optimizer.backward(next(iter(loader)))
            with pytest.raises(ValueError, match="closure"):
                optimizer.step(lambda: None)
            with pytest.raises(ValueError, match="made private"):
                optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


class Endless(IterableDataset):
    def __iter__(self):
        yield {"x": torch.ones(WIDTH)}


class TestRefused:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"target_epsilon": 1.0}, "one of the two"),
            ({"noise_multiplier": None}, "one of the two"),
            ({"batch_size": 25}, "exceeds the 24 examples"),
            ({"epochs": 0}, "epochs"),
            ({"max_grad_norm": 1.0, "clipping": AutomaticClipping()}, "bound of its own"),
            ({"max_grad_norm": 0.0}, "max_grad_norm"),
            ({"target_delta": 1.0}, "delta"),
            ({"microbatch_size": 0}, "microbatch_size"),
        ],
    )
    def test_settings(self, model, data, changes, message):
        with pytest.raises(ValueError, match=message):
            private(model, data, **changes)

    @pytest.mark.parametrize(
        ("loader", "message"),
        [
            (lambda d: DataLoader(Endless(), batch_size=2), "no indices"),
            (lambda d: DataLoader(d, sampler=WeightedRandomSampler([1.0] * 24, 24)), "sampler of"),
            (lambda d: DataLoader(d, batch_size=None), "sampler of"),
            (lambda d: DataLoader(d, batch_sampler=[[0, 1], [2]]), "sampler of"),
            (lambda d: DataLoader(d, batch_size=2, num_workers=1), "num_workers"),
        ],
    )
    def test_loaders(self, model, data, loader, message):
        with pytest.raises(ValueError, match=message):
            make_private(
                model,
                torch.optim.SGD(model.parameters(), lr=1.0),
                loader(data),
                noise_multiplier=1.0,
                target_delta=1e-5,
                epochs=1,
                ledger=NO_LEDGER,
                loss=squared_error,
            )

    @pytest.mark.parametrize(
        ("trained", "message"),
        [
            (lambda m: m[2].parameters(), r"does not train 0\.weight"),
            (lambda m: [*m.parameters(), nn.Parameter(torch.ones(1))], "not the model's"),
        ],
    )
    def test_optimizers_and_nothing_is_left_behind(self, model, data, tmp_path, trained, message):
        with pytest.raises(ValueError, match=message):
            make_private(
                model,
                torch.optim.SGD(trained(model), lr=1.0),
                DataLoader(data, batch_size=8),
                noise_multiplier=1.0,
                target_delta=1e-5,
                epochs=1,
                ledger=tmp_path / "ledger.jsonl",
                loss=squared_error,
            )
        assert not any("forward" in module.__dict__ for module in model.modules())
        private(model, data, ledger=tmp_path / "ledger.jsonl").optimizer.close()

    def test_a_model_that_does_not_tell_its_loss(self, model, data):
        with pytest.raises(UnknownLossError):
            private(model, data, loss=None)

    def test_a_collator_that_packs_examples(self, model, data):
        loader = DataLoader(
            data, batch_size=24, collate_fn=lambda items: {"x": torch.ones(1, len(items))}
        )
        with (
            make_private(
                model,
                torch.optim.SGD(model.parameters(), lr=1.0),
                loader,
                noise_multiplier=1.0,
                target_delta=1e-5,
                epochs=1,
                ledger=NO_LEDGER,
                loss=squared_error,
            ) as (_, _, batches),
            pytest.raises(ValueError, match="1 rows of 24 examples"),
        ):
            next(iter(batches))


class TestLedger:
    def test_a_run_goes_on_where_the_ledger_stands(self, model, data, tmp_path):
        """The model lost two steps with its process; they are paid for all the same."""
        ledger = tmp_path / "ledger.jsonl"
        with private(model, data, ledger=ledger, run="a") as training:
            take_steps(training, 2)
            saved = copy.deepcopy(model.state_dict())
            take_steps(training, 2)
        model.load_state_dict(saved)
        with private(model, data, ledger=ledger, run="a") as training:
            assert (training.optimizer.steps_taken, training.optimizer.steps_left) == (4, 2)
            take_steps(training, 99)
            assert training.optimizer.steps_left == 0
            with pytest.raises(BudgetSpent):
                next(iter(training.data_loader))
            guarantee = training.optimizer.guarantee()
        history = read_ledger(ledger)
        assert history.steps("a") == 6
        assert history.spent(1e-5).value == guarantee.epsilon

    def test_a_step_that_fails_behind_the_ledger_stays_counted(self, model, data, tmp_path):
        with private(model, data, ledger=tmp_path / "ledger.jsonl", run="a") as training:
            _, optimizer, loader = training

            def fail(*_):
                raise RuntimeError("no")

            hook = optimizer.register_step_pre_hook(fail)
            optimizer.backward(next(iter(loader)))
            with pytest.raises(RuntimeError, match="no"):
                optimizer.step()
            hook.remove()
            assert all(p.grad is None for p in model.parameters())
            assert optimizer.steps_taken == 1
        assert read_ledger(tmp_path / "ledger.jsonl").steps("a") == 1

    def test_runs_are_new_unless_named(self, model, data, tmp_path):
        ledger = tmp_path / "ledger.jsonl"
        for _ in range(2):
            with private(model, data, ledger=ledger) as training:
                assert training.optimizer.steps_taken == 0
                take_steps(training, 1)
        assert sorted(read_ledger(ledger).steps(r) for r in read_ledger(ledger).releases) == [1, 1]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"noise_multiplier": 2.0}, "another plan"),
            ({"dataset": "other"}, "belongs to data set"),
        ],
    )
    def test_neither_another_plan_nor_other_data_goes_on(
        self, model, data, tmp_path, changes, message
    ):
        settings = {"ledger": tmp_path / "ledger.jsonl", "run": "a", "dataset": "mine"}
        with private(model, data, **settings) as training:
            take_steps(training, 1)
        with pytest.raises(LedgerError, match=message):
            private(model, data, **settings | changes)

    @pytest.mark.parametrize(
        "changes",
        [
            {"sampler": CyclicPoissonSampler(0.5, 3)},
            {"sampler": BallsInBinsSampler(3), "correlation": Banded(2)},
        ],
    )
    def test_what_needs_the_secret_it_began_with_does_not_go_on(
        self, model, data, tmp_path, changes
    ):
        settings = {"ledger": tmp_path / "ledger.jsonl", "run": "a"} | changes
        with private(model, data, **settings) as training:
            take_steps(training, 1)
        with pytest.raises(ValueError, match="secret that it began with"):
            private(model, data, **settings)

    def test_the_budget_of_the_data_stops_the_step_before_it(self, model, data, tmp_path):
        settings = {"ledger": tmp_path / "ledger.jsonl", "run": "a"}
        with private(model, data, **settings) as training:
            room = training.optimizer.epsilon(2)
            settings["budget"] = Budget(room, 1e-5)
        with private(model, data, **settings) as training:
            take_steps(training, 2)
            before = flat(model)
            with pytest.raises(BudgetExceeded):
                take_steps(training, 1)
            assert torch.equal(flat(model), before)
        assert read_ledger(settings["ledger"]).steps("a") == 2


class TestAroundIt:
    @pytest.mark.parametrize("over", ["outer", "inner"])
    def test_schedulers_and_states(self, model, data, over):
        with private(model, data, lr=1.0) as training:
            _, optimizer, _ = training
            followed = optimizer if over == "outer" else optimizer.inner
            scheduler = torch.optim.lr_scheduler.ExponentialLR(followed, 0.5)
            take_steps(training, 1)
            scheduler.step()
            assert optimizer.param_groups[0]["lr"] == 0.5
            state = optimizer.state_dict()
            optimizer.param_groups[0]["lr"] = 3.0
            optimizer.load_state_dict(state)
            assert optimizer.inner.param_groups[0]["lr"] == 0.5
            assert isinstance(optimizer, torch.optim.Optimizer)

    def test_adam_keeps_its_moments(self, model, data):
        training = make_private(
            model,
            torch.optim.AdamW(model.parameters(), lr=0.01),
            DataLoader(data, batch_size=8),
            noise_multiplier=1.0,
            target_delta=1e-5,
            epochs=1,
            ledger=NO_LEDGER,
            loss=squared_error,
        )
        with training as (_, optimizer, _):
            take_steps(training, 2)
            assert {int(s["step"]) for s in optimizer.state_dict()["state"].values()} == {2}

    def test_tensors_in_places_have_their_place_for_a_name(self, generator):
        data = TensorDataset(torch.randn(8, 3, generator=generator), torch.arange(8))
        training = private(
            nn.Linear(3, 1),
            data,
            loss=lambda model, batch: model(batch["0"])[:, 0] * batch["1"],
        )
        with training:
            take_steps(training, 1)
            assert training.optimizer.report.examples == 8

    def test_closing_leaves_an_ordinary_model_and_an_open_ledger(self, model, data, tmp_path):
        ledger = tmp_path / "ledger.jsonl"
        training = private(model, data, ledger=ledger)
        with pytest.raises(LedgerError, match="in use"):
            private(copy.deepcopy(model), data, ledger=ledger)
        take_steps(training, 1)
        training.optimizer.close()
        training.optimizer.close()
        assert not any("forward" in module.__dict__ for module in model.modules())
        with pytest.raises(OutOfTurn, match="closed"):
            take_steps(training, 1)
        squared_error(model, torch.utils.data.default_collate(data)).sum().backward()
        assert all(p.grad is not None for p in model.parameters())


class TestFingerprints:
    def test_of_the_items_and_not_of_their_order(self, data):
        assert fingerprint_of_items(data) == fingerprint_of_items(data[::-1])
        changed = copy.deepcopy(data)
        changed[7]["x"][0] += 1
        assert fingerprint_of_items(data) != fingerprint_of_items(changed)
        assert fingerprint_of_items(data) != fingerprint_of_items(data[1:])

    @pytest.mark.parametrize(
        "item",
        [
            {"b": [1, 2], "a": "text", "c": (None, 2.5, True)},
            np.arange(3),
            {"x": torch.ones(2, dtype=torch.bfloat16), "y": np.int64(3)},
            torch.tensor(1.0),
        ],
    )
    def test_of_many_kinds(self, item):
        assert fingerprint_of_items([item]) == fingerprint_of_items([copy.deepcopy(item)])
        assert fingerprint_of_items([item]) != fingerprint_of_items([item, item])

    def test_shapes_count(self):
        assert fingerprint_of_items([torch.ones(2, 3)]) != fingerprint_of_items([torch.ones(3, 2)])

    def test_what_has_none_is_named_by_its_owner(self):
        with pytest.raises(ValueError, match="dataset='...'"):
            fingerprint_of_items([object()])
