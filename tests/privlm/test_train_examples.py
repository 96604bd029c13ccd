"""The configurations under examples/, each at its smallest, from data to released weights."""

import json
from pathlib import Path

import msgspec
import pytest
import torch
from made_up_examples import write_digits, write_tones
from safetensors.torch import load_file

from privlm.config import (
    ConfigError,
    LanguageModelConfig,
    PublicTraining,
    TokenizerConfig,
    TrainConfig,
    decode_config,
    load_config,
)
from privlm.data import DataError
from privlm.export import export_run
from privlm.models.adapters import load_adapters
from privlm.models.huggingface import ModelError
from privlm.models.pretrained import load
from privlm.privacy import PrivacyConfig
from privlm.progress import watching
from privlm.runs import train_run

pytest.importorskip("transformers")
pytest.importorskip("peft")

EXAMPLES = Path(__file__).parents[2] / "examples"
QUIET = watching(quiet=True)
ONCE = PublicTraining(epochs=1, batch_size=16)


def smallest(name: str, **changes) -> TrainConfig:
    config = load_config(EXAMPLES / name, TrainConfig)
    model = msgspec.structs.replace(config.model, width=16, layers=1, heads=2)
    privacy = msgspec.structs.replace(config.privacy, target_epsilon=None, noise_multiplier=1.0)
    settings = {"model": model, "public": ONCE, "privacy": privacy, "checkpoint_every": 2} | changes
    return msgspec.structs.replace(config, **settings)


def train(config, out, *, resume=False):
    return train_run(config, out, resume=resume, watch=QUIET)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def some_topics(here, count=8) -> str:
    from pydoc_data.topics import topics

    lines = [{"id": name, "text": topics[name][:1500]} for name in sorted(topics)[:count]]
    (here / "topics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return "topics.jsonl"


@pytest.fixture
def text_lora(here):
    config = smallest("text-lora.yaml", epochs=2, batch_size=16)
    corpus = msgspec.structs.replace(config.corpus, source=some_topics(here), context=16)
    tokenizer = msgspec.structs.replace(config.tokenizer, vocab_size=260)
    return msgspec.structs.replace(config, corpus=corpus, tokenizer=tokenizer)


class TestTextAndLora:
    def test_adapters_learn_and_the_base_stays(self, text_lora, here):
        result = train(text_lora, here / "out")
        assert result.guarantee.unit == "example"
        assert result.steps == result.planned_steps > 3
        weights = load_file(here / "out" / "model.safetensors")
        adapters = {name for name in weights if "lora_" in name}
        assert 0 < len(adapters) < len(weights)
        begun = load_file(_first_checkpoint(text_lora, here / "again"))
        for name, value in weights.items():
            same = torch.equal(value, begun[f"model.{name}"])
            assert same == (name not in adapters), name

    def test_what_is_exported_computes_what_was_trained(self, text_lora, here):
        train(text_lora, here / "out")
        done = export_run(here / "out", here / "released", hyperparameters="on public text alone")
        assert done.format == "peft"
        assert "adapter_model.safetensors" in done.files
        assert not {f for f in done.files if "checkpoint" in f or "ledger" in f or "steps" in f}
        base = load(here / "released" / "base")
        exported = load_adapters(base.model, here / "released").eval()
        weights = load_file(here / "out" / "model.safetensors")
        ids = torch.arange(12)[None]
        from privlm.export import _released
        from privlm.run_folder import RunFolder

        trained, _, ours = _released(RunFolder(here / "out"), text_lora)
        assert weights["base_model.model.lm_head.weight"].shape[0] == ours.vocab_size
        torch.testing.assert_close(exported(ids).logits, trained(ids).logits)
        text = "the quick “brown” fox\n\t!"
        assert base.tokenizer.encode(text) == ours.encode(text)
        assert base.tokenizer.end_id == ours.end_id
        card = (here / "released" / "README.md").read_text()
        for said in ("poisson", "(ε = ", "on public text alone", "PLD", "a block of 16 tokens"):
            assert said in card
        assert str(here) not in card
        config = json.loads((here / "released" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "base"

    def test_a_model_from_a_folder_needs_no_public_text(self, text_lora, here):
        train(msgspec.structs.replace(text_lora, lora=None), here / "out")
        export_run(here / "out", here / "pretrained")
        config = decode_config(
            json.dumps(
                {
                    "privacy": {"noise_multiplier": 1.0},
                    "model": {"path": str(here / "pretrained")},
                    "lora": {"rank": 2},
                    "corpus": {"source": "topics.jsonl", "public_source": "none", "context": 16},
                    "epochs": 1,
                    "batch_size": 16,
                }
            ),
            TrainConfig,
            where="test",
        )
        result = train(config, here / "tuned")
        assert result.public_documents == 0
        assert 0 < result.base_bits_per_byte < 10
        done = export_run(here / "tuned", here / "adapters")
        assert not any(name.startswith("base/") for name in done.files)
        named = json.loads((here / "adapters" / "adapter_config.json").read_text())
        assert named["base_model_name_or_path"] == "pretrained"


def _first_checkpoint(config, out) -> Path:
    """The checkpoint before the first private step."""

    class Stopped(Exception):
        pass

    import contextlib

    @contextlib.contextmanager
    def watch(what, steps):
        def show(done, note=""):
            if what == "private training":
                raise Stopped

        yield show

    with contextlib.suppress(Stopped):
        train_run(config, out, resume=False, watch=watch)
    return out / "checkpoint.safetensors"


class TestImagesAndSounds:
    def test_users_of_a_folder_of_images(self, here):
        for name, count in (("scans", 24), ("public-scans", 4)):
            (here / name).mkdir()
            write_digits(here / name, count)
        lines = [
            json.loads(line) | {"user": f"writer {n % 12}"}
            for n, line in enumerate((here / "scans/records.jsonl").read_text().splitlines())
        ]
        (here / "scans/records.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        config = smallest("vision.yaml", batch_size=2, epochs=1)
        result = train(config, here / "out")
        assert result.guarantee.unit == "user"
        assert result.unit == "record"
        assert "a user, with at most 4 examples" in _card(here)
        steps = (here / "out" / "steps.jsonl").read_text().splitlines()
        assert len(steps) == 1 + result.steps

    def test_a_folder_of_sounds_under_correlated_noise(self, here):
        for name, count in (("calls", 30), ("public-calls", 3)):
            (here / name).mkdir()
            write_tones(here / name, count)
        privacy = PrivacyConfig(noise_multiplier=1.0, correlation={"kind": "banded", "bands": 2})
        privacy = msgspec.convert(msgspec.to_builtins(privacy), PrivacyConfig)
        config = smallest("audio.yaml", batch_size=4, epochs=1, privacy=privacy)
        result = train(config, here / "out")
        assert result.steps > 2
        assert not (here / "out" / "secret.key").exists()
        assert "banded, bands 2" in _card(here)

    def test_a_text_file_is_refused(self, here):
        (here / "scans").mkdir()
        (here / "scans" / "a.txt").write_text("text")
        corpus = {"source": "scans", "public_source": "scans"}
        config = msgspec.structs.replace(
            smallest("vision.yaml"),
            corpus=msgspec.convert(corpus, type(smallest("vision.yaml").corpus)),
        )
        with pytest.raises(DataError, match=r"trained on a \.jsonl of texts with images"):
            train(config, here / "out")
        assert not (here / "out").exists()


def _card(here) -> str:
    export_run(here / "out", here / "released")
    return (here / "released" / "README.md").read_text()


def test_a_folder_of_another_kind_of_model_is_refused(here):
    from privlm.models.architectures import Sizes, build
    from privlm.models.pretrained import save

    save(build("bert", Sizes(vocab_size=64), torch.Generator().manual_seed(0)), here / "bert")
    config = smallest("text-lora.yaml", lora=None)
    changed = {
        "model": LanguageModelConfig(path=str(here / "bert")),
        "tokenizer": TokenizerConfig(),
    }
    with pytest.raises(ModelError, match="only models that predict the next"):
        train(msgspec.structs.replace(config, **changed), here / "out")


def test_an_unfinished_run_is_not_exported(text_lora, here):
    _first_checkpoint(text_lora, here / "out")
    with pytest.raises(ConfigError, match="not finished.*--resume"):
        export_run(here / "out", here / "released")
    assert not (here / "released").exists()
