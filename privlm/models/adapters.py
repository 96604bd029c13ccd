"""LoRA adapters (Hu et al. 2022): the door to ``peft``; no other module imports it.

The base model is frozen, and two thin matrices beside each chosen layer are trained:
y = W x + (alpha / rank) B A x, with A of shape (rank, in) random and B of shape (out, rank) zero.
"""

from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from privlm.models.architectures import borrowed_randomness
from privlm.models.huggingface import ModelError

ALL_LINEAR = "all-linear"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

_ATTENTION = r"(q_proj|k_proj|v_proj|o_proj)"
# A multimodal model learns in its language model and where features enter it; towers stay.
_DEFAULT_TARGETS: dict[str, str | list[str]] = {
    "gpt2": ["c_attn"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mistral": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "qwen3": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "llava": rf".*language_model\..*\.{_ATTENTION}|.*multi_modal_projector\.linear_[12]",
    "smolvlm": rf".*text_model\..*\.{_ATTENTION}|.*connector\.modality_projection\.proj",
    "idefics3": rf".*text_model\..*\.{_ATTENTION}|.*connector\.modality_projection\.proj",
    "qwen2_audio": rf".*language_model\..*\.{_ATTENTION}|.*multi_modal_projector\.linear",
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
    "t5": ["q", "v"],
}


class _Saved(msgspec.Struct, frozen=True):
    """What decides whether an adapter folder is one that can be loaded here."""

    peft_type: str
    init_lora_weights: bool | str = True
    use_dora: bool = False


def add_lora(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    generator: torch.Generator,
    dropout: float = 0.0,
    targets: str | list[str] | None = None,
) -> Any:
    """Freeze ``model`` and put trainable float32 adapters beside some of its linear layers.

    Before any step the adapted model computes what the base does. A classifier's head is random
    and is trained whole.

    Args:
        model: Of transformers; its layers are changed in place.
        rank: Of A and B.
        alpha: The adapters' product is scaled by alpha / rank.
        generator: Source of A; torch's global generator is left as it was.
        dropout: Of the adapters' input.
        targets: Names or, as one string, a regular expression of layers' whole names;
            ``"all-linear"``: all linear layers but the output head, towers included. By default
            the attention of the language model, or what of it is customary (GPT-2's fused query,
            key and value; query and value of BERT and T5), and the multimodal projector.

    Returns:
        A ``PeftModel``.

    Raises:
        ModelError: If ``peft`` is missing, ``targets`` fit no layer, the model's kind has no
            default, or the model has adapters already.
        ValueError: If a number is out of range.
    """
    if rank < 1 or alpha <= 0 or not 0 <= dropout < 1:
        raise ValueError(
            "rank and alpha must be positive and dropout in [0, 1), "
            f"got {rank}, {alpha} and {dropout}"
        )
    if hasattr(model, "peft_config"):
        raise ModelError("the model has adapters already; merge them with merge_and_unload first")
    peft = _require_peft()
    base: Any = model
    kind = base.config.model_type
    if targets is None and kind not in _DEFAULT_TARGETS:
        raise ModelError(
            f"no layers are customary for a {kind!r} model; name targets, or {ALL_LINEAR!r}"
        )
    classifies = type(model).__name__.endswith("ForSequenceClassification")
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=_DEFAULT_TARGETS[kind] if targets is None else targets,
        task_type="SEQ_CLS" if classifies else None,
        fan_in_fan_out=kind == "gpt2",  # its layers store (in, out)
    )
    try:
        with borrowed_randomness(generator):
            return peft.get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"adapters do not fit the model: {error}") from error


def save_adapters(model: Any, path: str | Path) -> None:
    """Write the adapters alone, as safetensors in peft's own format.

    Raises:
        ModelError: If the model has none.
    """
    if not hasattr(model, "peft_config"):
        raise ModelError("the model has no adapters; save the whole model")
    # "auto" would ask the hub whether the base's vocabulary has grown.
    model.save_pretrained(Path(path), save_embedding_layers=False)


def load_adapters(model: nn.Module, path: str | Path, *, is_trainable: bool = True) -> Any:
    """Put adapters from a local folder on the base they were trained on.

    Args:
        model: The base.
        path: What :func:`save_adapters` or peft wrote.
        is_trainable: False for use as it is.

    Returns:
        A ``PeftModel``.

    Raises:
        ModelError: If ``peft`` is missing, the folder holds no LoRA adapters as safetensors, ones
            whose start is computed from the base, or ones that do not fit the model.
    """
    folder = Path(path)
    if not (folder / WEIGHTS).is_file() or not (folder / CONFIG).is_file():
        raise ModelError(
            f"{folder} holds no {CONFIG} and {WEIGHTS}; save_adapters writes them, and a pickle "
            "is never opened"
        )
    try:
        saved = msgspec.json.decode((folder / CONFIG).read_bytes(), type=_Saved)
    except (OSError, msgspec.MsgspecError) as error:
        raise ModelError(f"{folder / CONFIG} cannot be read ({error}); save it again") from error
    if saved.peft_type != "LORA" or saved.use_dora or not isinstance(saved.init_lora_weights, bool):
        raise ModelError(
            f"{folder} holds adapters of another kind than plain LoRA; train such ones anew"
        )
    if hasattr(model, "peft_config"):
        raise ModelError("the model has adapters already; merge them with merge_and_unload first")
    peft = _require_peft()
    try:
        return peft.PeftModel.from_pretrained(
            model, str(folder), is_trainable=is_trainable, local_files_only=True
        )
    except Exception as error:  # peft raises whatever a folder of another model makes it trip over
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"adapters in {folder} do not fit the model: {reason}") from error


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that training changes, by name; a tied one once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _require_peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ModelError("adapters need peft, pip install 'privlm[hf]'") from None
    return peft
