"""Checkpoints of a training run: one safetensors file, replaced whole or not at all."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from protocols.files import write_atomically

_FORMAT = "privlm checkpoint 1"


class CheckpointError(ValueError):
    """A checkpoint that is missing, foreign or does not fit the model."""


@dataclass(frozen=True)
class Checkpoint:
    """What was read: ``step`` optimiser steps lie behind it."""

    step: int


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int
) -> None:
    """Write model and optimiser state. Optimiser state is private: it is never exported.

    Raises:
        OSError: the file could not be written; the old one stays.
    """
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    scalars: dict[str, dict[str, Any]] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            elif value is not None:
                scalars.setdefault(str(index), {})[name] = value
    metadata = {"format": _FORMAT, "step": str(step), "scalars": json.dumps(scalars)}
    write_atomically(path, save({k: v.contiguous() for k, v in tensors.items()}, metadata))


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Checkpoint:
    """Restore both in place.

    Raises:
        CheckpointError: the file is missing, damaged, or of another model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as a checkpoint: {error}") from error
    if metadata.get("format") != _FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of a run")
    state: dict[int, dict[str, Any]] = {
        int(index): dict(values) for index, values in json.loads(metadata["scalars"]).items()
    }
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = value
    try:
        model.load_state_dict(
            {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        )
    except RuntimeError as error:
        raise CheckpointError(f"{path}: of another model: {error}") from error
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return Checkpoint(int(metadata["step"]))


def save_weights(path: Path, model: nn.Module) -> None:
    """Write the weights alone: what may be published under the run's guarantee."""
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    write_atomically(path, save(weights, {"format": "pt"}), mode=0o644)
