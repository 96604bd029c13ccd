# ruff: noqa: D102  (documented by Decoder)
"""The door to ``transformers``: no other module imports it.

Shapes: B = examples, T = positions of this call, A = positions attended, D = width, H = heads,
E = D / H.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from privlm.models.decoder import Cache, Decoder, ParameterRoles, Weight

_INDEX = "model.safetensors.index.json"
_ARCHITECTURE = "GPT2LMHeadModel"
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model")
# Causal masks that older checkpoints carry; no weights.
_MASKS = re.compile(r"(^|\.)attn\.(masked_)?bias$")


class ModelError(ValueError):
    """A model folder that cannot be read, or that would be run as something it is not."""


class _Index(msgspec.Struct, frozen=True):
    """Which shard holds which weight."""

    weight_map: dict[str, str]


@dataclass(frozen=True)
class CausalLM:
    """A model and its tokenizer, a ``PreTrainedTokenizer``; None where the folder holds none."""

    model: "Gpt2Decoder" = field(repr=False)
    tokenizer: Any = field(repr=False)


class _CountedFrom:
    """What a ``GPT2Block`` asks of a cache, with layers counted from ``first``."""

    def __init__(self, cache: Cache, first: int) -> None:
        self._cache = cache
        self._first = first

    def update(self, key_BHTE: Tensor, value_BHTE: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        return self._cache.extend(layer - self._first, key_BHTE, value_BHTE)


class Gpt2Decoder(Decoder):
    """A ``GPT2LMHeadModel``, its modules and weights shared with the original.

    Args:
        model: In any mode; blocks run as they are, dropout included.
    """

    def __init__(self, model: Any) -> None:
        config, body = model.config, model.transformer
        super().__init__(
            vocab_size=config.vocab_size,
            width=config.n_embd,
            layers=config.n_layer,
            context=config.n_positions,
            tied_head=model.lm_head.weight is body.wte.weight,
            positional=True,
        )
        self.embed: nn.Embedding = body.wte
        self.position: nn.Embedding = body.wpe
        self.drop: nn.Module = body.drop
        self.blocks = body.h
        self.norm = body.ln_f
        self.head = model.lm_head
        self.train(model.training)

    def embed_tokens(self, ids_BT: Tensor, start: int = 0) -> Tensor:
        if ids_BT.dim() != 2 or ids_BT.shape[1] < 1:
            raise ValueError(f"ids have shape (B, T) with T >= 1, got {tuple(ids_BT.shape)}")
        self._require_context(start, ids_BT.shape[1])
        position_T = torch.arange(start, start + ids_BT.shape[1], device=ids_BT.device)
        x_BTD: Tensor = self.drop(self.embed(ids_BT) + self.position(position_T))
        return x_BTD

    def run_blocks(
        self, x_BTD: Tensor, cache: Cache | None = None, first: int = 0, last: int | None = None
    ) -> Tensor:
        cached, new = 0 if cache is None else cache.length, x_BTD.shape[1]
        self._require_context(cached, new)
        # One new position sees all others. Minus infinity, because eager attention adds the mask.
        hidden_TA = x_BTD.new_full((new, cached + new), float("-inf")).triu(cached + 1)
        layers = None if cache is None else _CountedFrom(cache, first)
        for block in self.blocks[first:last]:
            x_BTD = block(
                x_BTD,
                past_key_values=layers,
                attention_mask=None if new == 1 else hidden_TA[None, None],
            )
        return x_BTD

    def attention_input(self, x_BTD: Tensor, layer: int) -> Tensor:
        rows_BTD: Tensor = self.get_submodule(f"blocks.{layer}.ln_1")(x_BTD)
        return rows_BTD

    def parameter_roles(self) -> ParameterRoles:
        # transformers' Conv1D keeps (in, out); query, key and value are one matrix.
        values = (Weight(f"blocks.{i}.attn.c_attn.weight", True) for i in range(self.layers))
        head = "embed.weight" if self.tied_head else "head.weight"
        return ParameterRoles(tuple(values), head, "embed.weight")

    def _require_context(self, cached: int, new: int) -> None:
        if cached + new > self.context:
            raise ValueError(
                f"{cached} cached and {new} new positions exceed the context of {self.context}"
            )


def require_transformers(purpose: str) -> Any:
    """The library.

    Raises:
        ModelError: If it is missing.
    """
    try:
        import transformers
    except ImportError:
        raise ModelError(f"{purpose}, pip install 'privlm[hf]'") from None
    return transformers


def load_causal_lm(path: str | Path) -> CausalLM:
    """Load a GPT-2 and its tokenizer, if there is one, from a local folder.

    As :func:`load_folder`; the model is in eval mode.

    Raises:
        ModelError: As :func:`load_folder`, and if the folder holds another architecture.
    """

    def check(config: Any, folder: Path) -> str:
        if config.model_type != "gpt2":
            raise ModelError(
                f"{folder} holds a {config.model_type!r} model; only 'gpt2' can be loaded so far"
            )
        named = config.architectures or [_ARCHITECTURE]
        if list(named) != [_ARCHITECTURE]:
            raise ModelError(
                f"{folder} holds a {', '.join(map(str, named))}; only a {_ARCHITECTURE} can be "
                "loaded, as its head is what gives the logits"
            )
        return _ARCHITECTURE

    model, tokenizer = load_folder(path, check)
    return CausalLM(Gpt2Decoder(model.eval()), tokenizer)


def load_folder(path: str | Path, architecture: Callable[[Any, Path], str]) -> tuple[Any, Any]:
    """Load a model and its tokenizer, None where there is none, from a local folder.

    Weights come from safetensors alone and become float32. No code in the folder is run, and
    nothing is fetched.

    Args:
        path: A folder that ``save_pretrained`` wrote.
        architecture: Names the class of the model, given its configuration and the folder.

    Raises:
        ModelError: If ``transformers`` is missing, the folder is missing or cannot be read or
            holds an adapter, names weights that are no safetensors file of its own, or has more
            or fewer weights than the model.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ModelError(
            f"{folder} is no folder; give the local folder that save_pretrained wrote, "
            "names on the hub are not looked up"
        )
    transformers = require_transformers(f"{folder} is a transformers model; to load it")
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{folder} holds an adapter; merge it with peft's merge_and_unload and save the result"
        )
    _require_safe_index(folder)
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **local)
        kind = architecture(config, folder)
        if getattr(config, "transformers_weights", None) is not None:
            raise ModelError(
                f"{folder} names a weights file in config.json; take transformers_weights out of "
                "it, and keep the weights in model.safetensors"
            )
        model, info = getattr(transformers, kind).from_pretrained(
            folder,
            config=config,
            use_safetensors=True,  # the other format is a pickle, which runs code
            dtype=torch.float32,
            attn_implementation="sdpa",
            output_loading_info=True,
            local_files_only=True,
        )
        tokenizer = None
        if any((folder / name).exists() for name in _TOKENIZER_FILES):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
    except ModelError:
        raise
    except Exception as error:  # the loaders raise whatever a broken file makes them trip over
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(
            f"{folder} cannot be loaded ({reason}); it needs a "
            "config.json and model.safetensors as save_pretrained writes them"
        ) from error
    if info["missing_keys"]:
        # transformers would put random numbers in their place.
        raise ModelError(
            f"{folder} lacks weights of a {kind}, such as {min(info['missing_keys'])}; "
            "save the whole model again"
        )
    unexpected = [name for name in info["unexpected_keys"] if not _MASKS.search(name)]
    if unexpected:
        # Without them it would be another model than the one that was saved.
        raise ModelError(
            f"{folder} holds weights that its config.json has no place for, such as "
            f"{min(unexpected)}; merge adapters, mend the config, or save the whole model again"
        )
    return model, tokenizer


def _require_safe_index(folder: Path) -> None:
    """Refuse an index of shards that leads out of the folder or to a pickle: it would be opened."""
    index = folder / _INDEX
    if not index.is_file():
        return
    try:
        shards = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map.values()
    except msgspec.MsgspecError as error:
        raise ModelError(f"{index} cannot be read ({error}); save the model again") from error
    for name in sorted(set(shards)):
        bare = re.fullmatch(r"[\w.-]+\.safetensors", name)
        if not bare or not (folder / name).is_file():
            raise ModelError(
                f"{index} names {name!r}, which is no safetensors file in the folder; save the "
                "model again, as safetensors"
            )
