"""Checkpoints of a training run: one safetensors file, replaced whole or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from protocols.files import write_atomically

_FORMAT = "privlm checkpoint 1"

_Scalars = dict[int, dict[str, float | int | bool]]


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, foreign or does not fit the model."""


class Checkpoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where a run stood when it was saved.

    Attributes:
        run: the run that it belongs to.
        step: steps paid for; on a private run, releases on the ledger.
        steps_lost: how many of these an interruption undid, so that the model
            lies ``step - steps_lost`` optimiser steps after the base model.
        base_bits_per_byte: utility of the public base model, measured once.
        max_grad_norm: the next step's clipping bound, where it follows a quantile.
    """

    run: str
    step: int
    steps_lost: int = 0
    base_bits_per_byte: float
    max_grad_norm: float | None = None


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint
) -> None:
    """Write model and optimiser state. Optimiser state is private: it is never exported.

    Raises:
        OSError: the file could not be written; the old one stays.
    """
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    scalars: _Scalars = {}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            elif value is not None:
                scalars.setdefault(int(index), {})[name] = value
    tensors = unshared(tensors)
    metadata = {
        "format": _FORMAT,
        "checkpoint": msgspec.json.encode(checkpoint).decode(),
        "scalars": msgspec.json.encode(scalars).decode(),
    }
    metadata["sha256"] = _digest(metadata, tensors)
    write_atomically(path, save(tensors, metadata))


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, run: str
) -> Checkpoint:
    """Restore both in place.

    Raises:
        CheckpointError: the file is missing or damaged, or belongs to another run
            or model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the checkpoint is missing; {_MEND}") from None
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: not readable as a checkpoint ({reason}); {_MEND}") from None
    if metadata.get("format") != _FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of a run; {_MEND}")
    if metadata.pop("sha256", None) != _digest(metadata, tensors):
        raise CheckpointError(f"{path}: the checkpoint is damaged; {_MEND}")
    checkpoint = msgspec.json.decode(metadata["checkpoint"], type=Checkpoint)
    if checkpoint.run != run:
        raise CheckpointError(
            f"{path}: belongs to run {checkpoint.run}, not to {run} of this folder; {_MEND}"
        )
    state: dict[int, dict[str, Any]] = {
        index: dict(values)
        for index, values in msgspec.json.decode(metadata["scalars"], type=_Scalars).items()
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
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: of another model ({reason}); {_MEND}") from None
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return checkpoint


_MEND = "restore it from a backup, or start anew in another --out"


def save_weights(path: Path, model: nn.Module) -> None:
    """Write the weights alone: what may be published under the run's guarantee.

    Raises:
        OSError: the file could not be written; the old one stays.
    """
    write_atomically(path, save(unshared(model.state_dict()), {"format": "pt"}), mode=0o644)


def unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU and contiguous; a tensor that stands under two names (a tied head) as two."""
    seen: set[int] = set()
    alone = {}
    for name, value in tensors.items():
        kept = value.detach().cpu().contiguous()
        if kept.data_ptr() in seen:
            kept = kept.clone()
        seen.add(kept.data_ptr())
        alone[name] = kept
    return alone


def _digest(metadata: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """SHA-256 over everything: safetensors itself notices no flipped bit."""
    digest = hashlib.sha256(msgspec.json.encode(sorted(metadata.items())))
    for name, value in sorted(tensors.items()):
        digest.update(f"\n{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
