"""PrivateTrainer: transformers' arguments are honoured or refused, the mechanism is the plan's."""

import copy
import dataclasses
import importlib.util
import math
import shutil
import sys
from pydoc_data.topics import topics

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from transformers import (
    DataCollatorWithFlattening,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from privlm.dp import NO_LEDGER, AutomaticClipping, LedgerError, read_ledger
from privlm.dp import huggingface as door
from privlm.dp.clipping import ROUNDING_MARGIN
from privlm.dp.huggingface import MARKER, PrivateTrainer
from privlm.dp.releases import BudgetSpent
from privlm.dp.trainer_arguments import (
    CHECKED,
    HONOURED,
    REFUSED,
    WITHOUT_EFFECT,
    ArgumentRefused,
    PrivacyArguments,
    check_arguments,
)
from privlm.models.adapters import add_lora
from privlm.models.loss import causal_lm

TEXT = " ".join(topics[name] for name in sorted(topics)).encode()
LENGTHS = [16, 9, 12]
EXAMPLES = 48


def records(start, count):
    """Byte ids of real text, of several lengths."""
    cut = [TEXT[(start + i) * 16 :][: LENGTHS[i % 3]] for i in range(count)]
    return [{"input_ids": list(text), "labels": list(text)} for text in cut]


TRAIN, HELD_OUT = records(0, EXAMPLES), records(1000, 8)


def collate(items):
    longest = max(len(item["input_ids"]) for item in items)
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for item in items:
        gap = longest - len(item["input_ids"])
        batch["input_ids"].append(item["input_ids"] + [0] * gap)
        batch["attention_mask"].append([1] * len(item["input_ids"]) + [0] * gap)
        batch["labels"].append(item["labels"] + [-100] * gap)
    return {name: torch.tensor(rows) for name, rows in batch.items()}


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(7)


@pytest.fixture
def model(generator):
    config = GPT2Config(
        vocab_size=256,
        n_positions=16,
        n_embd=16,
        n_layer=1,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    made = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2, generator=generator)
    return made


@pytest.fixture(autouse=True)
def cheap_accounting(monkeypatch, request):
    """Seconds an accounting; one test does without this."""
    if "real_accounting" not in request.fixturenames:
        monkeypatch.setattr(door, "epsilon_after", lambda plan, steps: float(steps))


@pytest.fixture
def real_accounting():
    return True


@pytest.fixture
def arguments(tmp_path):
    def make(**changes):
        settings = {
            "output_dir": str(tmp_path / "out"),
            "use_cpu": True,
            "disable_tqdm": True,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 3,
            "num_train_epochs": 2,
            "learning_rate": 0.01,
            "optim": "adamw_torch",
            "save_strategy": "no",
            "logging_strategy": "no",
        }
        return TrainingArguments(**settings | changes)

    return make


@pytest.fixture
def privacy(tmp_path):
    def make(**changes):
        settings = {"noise_multiplier": 1.0, "target_delta": 1e-5, "ledger": tmp_path / "ledger"}
        return PrivacyArguments(**settings | changes)

    return make


def trainer(model, args, privacy, **changes):
    settings = {"train_dataset": TRAIN, "data_collator": collate, "privacy": privacy}
    return PrivateTrainer(model, args, **settings | changes)


def flat(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


class RaiseAt(TrainerCallback):
    """As a killed process: nothing is saved any more."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class TestArguments:
    def test_every_field_is_in_one_table(self):
        """A new version of transformers adds fields; decide what they do to the guarantee."""
        tables = [HONOURED, WITHOUT_EFFECT, CHECKED, frozenset(REFUSED)]
        known = [name for table in tables for name in table]
        assert len(known) == len(set(known))
        assert {field.name for field in dataclasses.fields(TrainingArguments)} == set(known)

    @pytest.mark.parametrize("name", sorted(REFUSED))
    def test_what_cannot_be_honoured_is_refused_by_name(self, name, arguments):
        args = arguments()
        check_arguments(args)
        neutral = REFUSED[name][0]
        setattr(args, name, not neutral if isinstance(neutral, bool) else "something")
        with pytest.raises(ArgumentRefused, match=f"^{name}="):
            check_arguments(args)

    def test_an_unknown_field_is_refused_unless_left_alone(self, tmp_path):
        @dataclasses.dataclass
        class Newer(TrainingArguments):
            brand_new: int = 0

        check_arguments(Newer(output_dir=str(tmp_path), use_cpu=True))
        with pytest.raises(ArgumentRefused, match="brand_new=3"):
            check_arguments(Newer(output_dir=str(tmp_path), use_cpu=True, brand_new=3))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"optim": "lomo"}, "during backward"),
            ({"optim": "galore_adamw_layerwise"}, "during backward"),
            ({"optim": "adamw_torch_xla"}, "hardware"),
            ({"accelerator_config": {"split_batches": True}}, "accelerator_config"),
            ({"activation_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant"),
        ],
    )
    def test_some_values_are_refused(self, arguments, changes, message):
        with pytest.raises(ArgumentRefused, match=message):
            check_arguments(arguments(**changes))

    def test_several_devices_are_refused(self, arguments):
        args = arguments()
        args._n_gpu = 2
        with pytest.raises(ArgumentRefused, match="CUDA_VISIBLE_DEVICES"):
            check_arguments(args)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"eval_dataset": TRAIN}, "is the training data"),
            ({"eval_dataset": {"mine": TRAIN}}, "is the training data"),
            ({"train_dataset": iter(TRAIN)}, "length and items"),
            ({"model_init": lambda: None}, "model_init"),
            ({"compute_loss_func": lambda *_: None}, "compute_loss_func"),
        ],
    )
    def test_data_and_hooks(self, model, arguments, privacy, changes, message):
        with pytest.raises(ArgumentRefused, match=message):
            trainer(model, arguments(), privacy(), **changes)

    def test_a_loss_that_would_not_be_called_is_refused(self, model, arguments, privacy):
        class Mine(PrivateTrainer):
            def compute_loss(self, *args, **kwargs):
                return 0.0

        with pytest.raises(ArgumentRefused, match="compute_loss is not called"):
            Mine(model, arguments(), train_dataset=TRAIN, privacy=privacy())

    def test_two_bounds_are_refused(self, model, arguments, privacy):
        with pytest.raises(ArgumentRefused, match="give both the same"):
            trainer(model, arguments(), privacy(clipping=AutomaticClipping(0.1)))

    def test_searches_and_loose_batches_are_refused(self, model, arguments, privacy):
        ours = trainer(model, arguments(), privacy())
        with pytest.raises(ArgumentRefused, match="search"):
            ours.hyperparameter_search()
        with pytest.raises(ValueError, match="only during train"):
            ours.get_train_dataloader()

    @pytest.mark.parametrize("examples", [24, 47, 48])
    @pytest.mark.parametrize(("micro", "accumulated"), [(4, 1), (4, 3), (5, 2)])
    @pytest.mark.parametrize("length", [{"num_train_epochs": 2.5}, {"max_steps": 17}])
    def test_the_plan_is_as_long_as_transformers_training(
        self, model, arguments, privacy, examples, micro, accumulated, length
    ):
        args = arguments(
            per_device_train_batch_size=micro, gradient_accumulation_steps=accumulated, **length
        )
        theirs = Trainer(model, args, train_dataset=TRAIN[:examples], data_collator=collate)
        steps = theirs.set_initial_training_values(args, theirs.get_train_dataloader())[-1]
        ours = trainer(model, args, privacy(), train_dataset=TRAIN[:examples])
        assert ours.plan.steps == steps
        assert ours.plan.expected_batch_size == micro * accumulated
        assert ours.plan.sampler.sampling_probability == micro * accumulated / examples


class TestTraining:
    @pytest.mark.parametrize(("micro", "accumulated"), [(48, 1), (4, 12), (1, 48)])
    def test_accumulation_does_not_change_the_mechanism(
        self, model, arguments, privacy, micro, accumulated
    ):
        """Every example drawn, no noise: the step of a loop over examples, clipped one by one."""
        expected, bound = torch.zeros_like(flat(model)), 0.5
        for item in TRAIN:
            loss = causal_lm(model, collate([item])).sum()
            gradient = torch.cat(
                [g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]
            )
            kept = bound * (1 - ROUNDING_MARGIN)
            expected += gradient * min(1.0, kept / float(gradient.norm()))
        before = flat(model)
        args = arguments(
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulated,
            max_steps=1,
            max_grad_norm=bound,
            learning_rate=1.0,
            optim="sgd",
        )
        trainer(model, args, privacy(noise_multiplier=0.0)).train()
        # Float32 norms are rounded up by about 10^-4.
        moved = flat(model) - before
        torch.testing.assert_close(
            moved, -expected / EXAMPLES, rtol=1e-3, atol=3e-4 * float(expected.abs().max())
        )

    def test_noise_comes_once_a_step_and_not_from_the_seed(self, model, arguments, privacy):
        """z-test of the variance at |z| < 6.5; false alarms below 10^-9. Once per micro-batch
        would be about 48 times as much.
        """
        noises = []
        for _ in range(2):
            trained = copy.deepcopy(model)
            args = arguments(
                per_device_train_batch_size=1,
                gradient_accumulation_steps=48,
                max_steps=1,
                learning_rate=1.0,
                optim="sgd",
                seed=3,
            )
            silent = trainer(
                trained,
                args,
                privacy(noise_multiplier=2.0),
                loss=lambda model, batch: (
                    model(batch["input_ids"][:, :4]).logits.flatten(1).sum(1) * 0
                ),
            )
            silent.train()
            noises.append((flat(trained) - flat(model)).double() * 48 / 2.0)
        assert not torch.equal(*noises)
        count = noises[0].numel()
        assert abs(noises[0].var() - 1) < 6.5 * math.sqrt(2 / count) < 0.25

    def test_batches_are_poisson(self, model, arguments, privacy, monkeypatch):
        """Sizes over 150 steps are Binomial(48, 1/4): |z| < 6.5, false alarms below 10^-9 for the
        mean. Batches of equal size, as transformers draws them, have no variance.
        """
        sizes = []

        def count(model, batch):
            return model(batch["input_ids"][:, :2]).logits.flatten(1).sum(1) * 0

        class Watch(TrainerCallback):
            def on_step_end(self, args, state, control, **_):
                sizes.append(ours._turns.releases.report.examples)

        ours = trainer(
            model,
            arguments(max_steps=150),
            privacy(ledger=NO_LEDGER),
            loss=count,
            callbacks=[Watch()],
        )
        ours.train()
        sizes = torch.tensor(sizes, dtype=torch.float64)
        assert abs(sizes.mean() - 12) < 6.5 * 3 / math.sqrt(150)
        assert 9 * (1 - 6.5 * math.sqrt(2 / 150)) < sizes.var() < 9 * (1 + 6.5 * math.sqrt(2 / 150))

    def test_adapters_move_and_the_base_does_not(self, model, arguments, privacy, generator):
        adapted = add_lora(model, rank=2, alpha=4.0, generator=generator)
        before = copy.deepcopy(adapted.state_dict())
        trainer(adapted, arguments(bf16=True, activation_checkpointing=True), privacy()).train()
        after = adapted.state_dict()
        moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
        assert moved
        assert moved == {name for name in after if "lora_" in name}

    @pytest.mark.parametrize(
        "changes",
        [
            {"bf16": True},
            {"activation_checkpointing": True},
            {"optim": "adafactor"},
            {"lr_scheduler_type": "cosine", "warmup_steps": 2},
        ],
        ids=lambda changes: next(iter(changes)),
    )
    def test_it_trains_under(self, model, arguments, privacy, changes):
        """No noise to speak of, so that the held-out loss must fall."""
        ours = trainer(
            model,
            arguments(num_train_epochs=6, **changes),
            privacy(noise_multiplier=0.01),
            eval_dataset=HELD_OUT,
        )
        before = ours.evaluate()["eval_loss"]
        ours.train()
        assert ours.evaluate()["eval_loss"] < before - 0.3
        assert (ours.plan.steps, ours.marker.steps) == (24, 24)

    def test_the_schedule_and_decay_are_transformers(self, model, arguments, privacy):
        class Rates(TrainerCallback):
            def on_step_end(self, args, state, control, optimizer, **_):
                seen.append([group["lr"] for group in optimizer.param_groups])
                decays.append([group["weight_decay"] for group in optimizer.param_groups])

        runs = []
        for kind, extra in ((Trainer, {}), (PrivateTrainer, {"privacy": privacy()})):
            seen, decays = [], []
            kind(
                copy.deepcopy(model),
                arguments(weight_decay=0.1, lr_scheduler_type="polynomial", warmup_steps=2),
                train_dataset=TRAIN,
                data_collator=collate,
                callbacks=[Rates()],
                **extra,
            ).train()
            runs.append((seen, decays))
        assert runs[0] == runs[1]
        assert len(runs[0][0]) == 8

    def test_an_optimizer_of_ones_own(self, model, arguments, privacy):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        before = flat(model)
        ours = trainer(model, arguments(), privacy(), optimizers=(optimizer, None))
        ours.train()
        assert ours.optimizer is optimizer
        assert not torch.equal(flat(model), before)

    def test_afterwards_all_is_ordinary_whatever_happened(
        self, model, arguments, privacy, tmp_path
    ):
        ours = trainer(model, arguments(), privacy(run="a"), callbacks=[RaiseAt(3)])
        with pytest.raises(KeyboardInterrupt):
            ours.train()
        assert not any("forward" in m.__dict__ for m in model.modules() if m is not model)
        assert type(ours.optimizer) is torch.optim.AdamW
        assert ours.marker.steps == 3
        again = trainer(model, arguments(), privacy(run="a"))
        again.train()
        assert read_ledger(tmp_path / "ledger").steps("a") == again.plan.steps == 8

    def test_packed_examples_are_refused(self, model, arguments, privacy):
        packing = DataCollatorWithFlattening()
        ours = trainer(model, arguments(max_steps=20), privacy(), data_collator=packing)
        with pytest.raises(ValueError, match="1 rows of"):
            ours.train()


class TestLogs:
    def test_what_is_private_is_called_so(self, model, arguments, privacy, tmp_path):
        args = arguments(
            logging_strategy="steps",
            logging_steps=2,
            eval_strategy="steps",
            eval_steps=4,
            save_strategy="steps",
            save_steps=4,
        )
        ours = trainer(model, args, privacy(), eval_dataset=HELD_OUT)
        result = ours.train()
        history = ours.state.log_history
        public = {
            "step", "epoch", "learning_rate", "epsilon", "train_runtime", "total_flos",
            "train_samples_per_second", "train_steps_per_second",
        }  # fmt: skip
        names = {name for entry in history for name in entry}
        assert {name for name in names if name.startswith("private/")} == {
            "private/loss", "private/train_loss", "private/clipped_fraction",
        }  # fmt: skip
        evaluated = {name for name in names if name.startswith("eval_")}
        assert names - evaluated <= public | {n for n in names if n.startswith("private/")}
        losses = [entry["private/loss"] for entry in history if "private/loss" in entry]
        assert len(losses) == 4
        assert all(4 < loss < 8 for loss in losses)
        assert all(0 <= e.get("private/clipped_fraction", 0) <= 1 for e in history)
        assert result.metrics["epsilon"] == 8.0
        assert ours.state.total_flos == 0
        assert (tmp_path / "out" / "checkpoint-4" / MARKER).is_file()

    @pytest.mark.usefixtures("real_accounting")
    def test_epsilon_is_the_plans(self, model, arguments, privacy):
        ours = trainer(model, arguments(), privacy(noise_multiplier=None, target_epsilon=3.0))
        assert ours.epsilon() == 0.0
        result = ours.train()
        spent = ours.guarantee().epsilon
        assert 2.9 < result.metrics["epsilon"] == ours.epsilon() == spent <= 3.0


class TestResuming:
    @pytest.fixture
    def saving(self, arguments):
        return lambda **changes: arguments(save_strategy="steps", save_steps=3, **changes)

    def interrupted(self, model, args, privacy, step):
        ours = trainer(model, args, privacy, callbacks=[RaiseAt(step)])
        with pytest.raises(KeyboardInterrupt):
            ours.train()
        return ours

    def test_lost_steps_stay_counted(self, model, saving, privacy, tmp_path):
        """Steps 4 and 5 of 8 are lost with the process; three remain, and not five."""
        first = self.interrupted(copy.deepcopy(model), saving(), privacy(), 5)
        second = trainer(model, saving(), privacy())
        second.train(resume_from_checkpoint=True)
        assert second.marker.run == first.marker.run
        assert second.state.global_step == 3 + 3
        assert second.marker.steps == 8 == second.epsilon()
        history = read_ledger(tmp_path / "ledger")
        assert list(history.releases) == [first.marker.run]
        assert history.steps(first.marker.run) == second.plan.steps == 8
        assert (tmp_path / "out" / "checkpoint-6" / MARKER).is_file()
        with pytest.raises(BudgetSpent):
            trainer(model, saving(), privacy()).train(resume_from_checkpoint=True)

    def test_weights_moments_and_rates_come_back(self, model, saving, privacy, tmp_path):
        args = saving(max_steps=6)
        first = trainer(copy.deepcopy(model), args, privacy(), callbacks=[RaiseAt(4)])
        with pytest.raises(KeyboardInterrupt):
            first.train()
        seen = {}

        class Begin(TrainerCallback):
            def on_train_begin(self, args, state, control, optimizer, **_):
                seen["weights"] = flat(model)
                seen["steps"] = {int(s["step"]) for s in optimizer.state.values()}
                seen["rate"] = optimizer.param_groups[0]["lr"]

        second = trainer(model, args, privacy(), callbacks=[Begin()])
        second.train(resume_from_checkpoint=True)
        saved = GPT2LMHeadModel.from_pretrained(tmp_path / "out" / "checkpoint-3")
        assert torch.equal(seen["weights"], flat(saved))
        assert seen["steps"] == {3}
        assert seen["rate"] == pytest.approx(0.01 / 2)

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda out, ledger: ledger.unlink(), "missing"),
            (lambda out, ledger: ledger.write_text(""), "counts 0 steps"),
            (lambda out, ledger: (out / "checkpoint-3" / MARKER).unlink(), "does not say"),
        ],
        ids=["no ledger", "an empty ledger", "no marker"],
    )
    def test_nothing_goes_on_that_the_ledger_does_not_vouch_for(
        self, model, saving, privacy, tmp_path, spoil, message
    ):
        self.interrupted(model, saving(), privacy(), 4)
        spoil(tmp_path / "out", tmp_path / "ledger")
        with pytest.raises(LedgerError, match=message):
            trainer(model, saving(), privacy()).train(resume_from_checkpoint=True)
        assert not (tmp_path / "out" / "checkpoint-6").exists()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"noise_multiplier": 1.1}, "another plan"),
            ({"run": "other"}, "not 'other'"),
            ({"ledger": NO_LEDGER}, "cannot be resumed"),
            ({"dataset": "other"}, "belongs to data set"),
        ],
    )
    def test_nor_with_other_settings(self, model, saving, privacy, changes, message):
        self.interrupted(model, saving(), privacy(), 4)
        with pytest.raises(LedgerError, match=message):
            trainer(model, saving(), privacy(**changes)).train(resume_from_checkpoint=True)

    def test_nor_from_an_older_ledger(self, model, saving, privacy, tmp_path):
        class Copy(TrainerCallback):
            def on_step_end(self, args, state, control, **_):
                if state.global_step == 2:
                    shutil.copy(tmp_path / "ledger", tmp_path / "older")

        ours = trainer(model, saving(), privacy(), callbacks=[Copy(), RaiseAt(4)])
        with pytest.raises(KeyboardInterrupt):
            ours.train()
        with pytest.raises(LedgerError, match="counts 2 steps"):
            trainer(model, saving(), privacy(ledger=tmp_path / "older")).train(
                resume_from_checkpoint=True
            )

    def test_without_a_checkpoint_there_is_nothing_to_resume(self, model, arguments, privacy):
        args = arguments()
        with pytest.raises(ValueError, match="no checkpoint"):
            trainer(model, args, privacy()).train(resume_from_checkpoint=True)


def test_without_transformers_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    spec = importlib.util.spec_from_file_location("a_second_door", door.__file__)
    with pytest.raises(ImportError, match=r"pip install 'privlm\[hf\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
