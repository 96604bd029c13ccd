"""A checkpoint comes back exactly, or is refused with the file, the reason and the way out."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from privlm.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
    save_weights,
)
from privlm.dp.training import OptimizerConfig
from privlm.models import TinyConfig, TinyDecoder
from protocols.files import DirectoryInUse, is_leftover, locked_directory, write_atomically

OPTIMIZERS = [
    OptimizerConfig(kind="adamw", learning_rate=0.1, weight_decay=0.01),
    OptimizerConfig(kind="sgd", learning_rate=0.1, momentum=0.9),
    OptimizerConfig(kind="sgd", learning_rate=0.1),
]
STOOD = Checkpoint(run="a", step=7, steps_lost=2, base_bits_per_byte=4.5)


def model(seed: int = 0, width: int = 8) -> TinyDecoder:
    config = TinyConfig(vocab_size=11, context=4, width=width, layers=1, heads=2)
    return TinyDecoder(config, torch.Generator().manual_seed(seed))


def step(trained: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for number, parameter in enumerate(trained.parameters()):
        parameter.grad = torch.full_like(parameter, 0.1 * (number + 1))
    optimizer.step()


@pytest.fixture
def saved(tmp_path):
    trained = model()
    optimizer = OPTIMIZERS[0].build(list(trained.parameters()))
    step(trained, optimizer)
    save_checkpoint(tmp_path / "c", trained, optimizer, STOOD)
    return tmp_path / "c"


@pytest.mark.parametrize("config", OPTIMIZERS)
def test_training_goes_on_as_if_nothing_had_happened(tmp_path, config):
    trained = model()
    optimizer = config.build(list(trained.parameters()))
    step(trained, optimizer)
    step(trained, optimizer)
    save_checkpoint(tmp_path / "c", trained, optimizer, STOOD)
    restored = model(seed=1)
    restored_optimizer = config.build(list(restored.parameters()))
    assert load_checkpoint(tmp_path / "c", restored, restored_optimizer, run="a") == STOOD
    step(trained, optimizer)
    step(restored, restored_optimizer)
    for a, b in zip(trained.parameters(), restored.parameters(), strict=True):
        assert torch.equal(a, b)
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o600


def load(path, run: str = "a", **sizes) -> Checkpoint:
    fresh = model(**sizes)
    return load_checkpoint(path, fresh, OPTIMIZERS[0].build(list(fresh.parameters())), run=run)


def test_every_flipped_byte_and_every_cut_is_noticed(saved):
    whole = saved.read_bytes()
    for place in range(0, len(whole), 97):
        saved.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match="backup, or start anew") as refused:
            load(saved)
        assert str(refused.value).startswith(f"{saved}: ")
        assert "\n" not in str(refused.value)
    for kept in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:kept])
        with pytest.raises(CheckpointError, match="not readable as a checkpoint"):
            load(saved)
    saved.write_bytes(whole)
    assert load(saved) == STOOD


def test_foreign_files_are_refused(saved, tmp_path):
    with pytest.raises(CheckpointError, match="the checkpoint is missing"):
        load(tmp_path / "none")
    with pytest.raises(CheckpointError, match="not readable as a checkpoint"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="belongs to run a, not to b"):
        load(saved, run="b")
    with pytest.raises(CheckpointError, match="of another model") as refused:
        load(saved, width=16)
    assert "\n" not in str(refused.value)
    save_weights(tmp_path / "w", model())
    with pytest.raises(CheckpointError, match="not a checkpoint of a run"):
        load(tmp_path / "w")


def test_weights_alone_hold_no_optimiser_state_and_are_public(tmp_path):
    trained = model()
    save_weights(tmp_path / "w", trained)
    weights = load_file(tmp_path / "w")
    assert weights.keys() == trained.state_dict().keys()
    assert all(torch.equal(weights[k], v) for k, v in trained.state_dict().items())
    assert (tmp_path / "w").stat().st_mode & 0o044


class TestFiles:
    def test_what_cannot_be_written_leaves_the_old_file(self, tmp_path):
        write_atomically(tmp_path / "f", b"old")
        with pytest.raises(OSError, match="f") as failed:
            write_atomically(tmp_path / "missing" / "f", b"new")
        assert failed.value.filename == str(tmp_path / "missing" / "f")
        with pytest.raises(TypeError):
            write_atomically(tmp_path / "f", "text")
        assert [p.name for p in tmp_path.iterdir()] == ["f"]
        assert (tmp_path / "f").read_bytes() == b"old"

    def test_a_new_file_appears_by_renaming_alone(self, tmp_path, monkeypatch):
        def fail(self, target):
            raise OSError(5, "Input/output error")

        write_atomically(tmp_path / "f", b"old")
        monkeypatch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="Input/output error"):
            write_atomically(tmp_path / "f", b"new")
        assert [p.name for p in tmp_path.iterdir()] == ["f"]
        assert (tmp_path / "f").read_bytes() == b"old"

    def test_leftovers_are_told_from_other_files(self, tmp_path):
        assert is_leftover(tmp_path / ".run.json.123.new")
        assert not any(
            is_leftover(tmp_path / name)
            for name in ("run.json", ".new", ".run.json.new", "run.json.1.new", ".a.1.new.b")
        )

    def test_a_folder_is_locked_for_one(self, tmp_path):
        with (
            locked_directory(tmp_path),
            pytest.raises(DirectoryInUse) as refused,
            locked_directory(tmp_path),
        ):
            pass
        assert refused.value.filename == str(tmp_path)
        with locked_directory(tmp_path):
            pass


class Tied(nn.Module):
    """Two names for one tensor, as a model whose head is its embedding has them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def test_a_tied_head_is_saved_and_stays_tied(tmp_path):
    trained, restored = Tied(), Tied()
    optimizers = [OPTIMIZERS[0].build(list(m.parameters())) for m in (trained, restored)]
    step(trained, optimizers[0])
    save_checkpoint(tmp_path / "c", trained, optimizers[0], STOOD)
    load_checkpoint(tmp_path / "c", restored, optimizers[1], run="a")
    assert torch.equal(restored.head.weight, trained.embed.weight)
    assert restored.head.weight is restored.embed.weight
    save_weights(tmp_path / "w", trained)
    assert load_file(tmp_path / "w").keys() == {"embed.weight", "head.weight"}
