"""Pre-trained models from local folders, to be fine-tuned."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from privlm.models.architectures import LanguageModel, describe
from privlm.models.huggingface import ModelError, load_folder, require_transformers

_HEADS = re.compile(
    r"\w+(LMHeadModel|ForCausalLM|ForMaskedLM|ForSequenceClassification|ForConditionalGeneration)"
)


class _Preprocessor(msgspec.Struct, frozen=True):
    """What a folder says of its images."""

    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)


class _Processor(msgspec.Struct, frozen=True):
    """The newer file, which holds the older one."""

    image_processor: _Preprocessor = _Preprocessor()


@dataclass(frozen=True)
class FolderTokenizer:
    """A tokenizer of transformers as :class:`privlm.data.Encoder`.

    Args:
        library: A ``PreTrainedTokenizer``.
        end_id: The token that ends a text and pads it.
    """

    library: Any = field(repr=False)
    end_id: int

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; names of special tokens in it, such as ``<image>``, are plain text."""
        ids = self.library(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return list(ids)

    def decode(self, ids: list[int]) -> str:
        """Text of ``ids`` without special tokens."""
        return str(self.library.decode(ids, skip_special_tokens=True))


def load(path: str | Path) -> LanguageModel:
    """Load any model with a head for language, in training mode, from a local folder.

    Weights come from safetensors alone and become float32. No code in the folder is run, and
    nothing is fetched. The tokenizer, a :class:`FolderTokenizer`, is None where the folder has
    none. Dropout is what the folder's configuration says.

    Args:
        path: A folder that ``save_pretrained`` wrote.

    Raises:
        ModelError: As :func:`privlm.models.huggingface.load_folder`; or if the folder names no
            single such model, one that takes inputs not known here, or a tokenizer without an
            end of text.
    """
    model, tokenizer = load_folder(path, _architecture)
    inputs = describe(model.config)
    if inputs.image is not None:
        seen = _preprocessor(Path(path))
        inputs = replace(
            inputs, image=replace(inputs.image, mean=seen.image_mean, std=seen.image_std)
        )
    wrapped = None
    if tokenizer is not None:
        end = next(
            (i for i in (tokenizer.eos_token_id, tokenizer.sep_token_id) if i is not None),
            getattr(model.config.get_text_config(), "eos_token_id", None),
        )
        if not isinstance(end, int):
            raise ModelError(f"{path} has a tokenizer without an end of text; set its eos_token")
        wrapped = FolderTokenizer(tokenizer, end)
    return LanguageModel(model.train(), inputs, wrapped)


def save(loaded: LanguageModel, path: str | Path) -> None:
    """Write configuration, weights as safetensors, and the tokenizer if there is one."""
    loaded.model.save_pretrained(Path(path))
    if loaded.tokenizer is not None:
        loaded.tokenizer.library.save_pretrained(Path(path))


def _architecture(config: Any, folder: Path) -> str:
    named = list(config.architectures or ())
    if len(named) != 1 or not _HEADS.fullmatch(str(named[0])):
        raise ModelError(
            f"{folder} holds {', '.join(map(str, named)) or 'a model without a head'}; it must "
            "name one class that ends in LMHeadModel, ForCausalLM, ForMaskedLM, "
            "ForSequenceClassification or ForConditionalGeneration"
        )
    library = require_transformers(f"{folder} is a transformers model; to load it")
    kind = getattr(library, named[0], None)
    if not (isinstance(kind, type) and issubclass(kind, library.PreTrainedModel)):
        raise ModelError(
            f"{folder} holds a {named[0]}, which this version of transformers does not have; "
            "code in the folder is not run"
        )
    known: Any = kind
    if not isinstance(config, known.config_class):
        raise ModelError(
            f"{folder} names a {named[0]} beside a {config.model_type!r} configuration; mend "
            "config.json"
        )
    describe(config)
    return str(named[0])


def _preprocessor(folder: Path) -> _Preprocessor:
    try:
        for name in ("processor_config.json", "preprocessor_config.json"):
            if not (folder / name).is_file():
                continue
            data = (folder / name).read_bytes()
            if name == "preprocessor_config.json":
                return msgspec.json.decode(data, type=_Preprocessor)
            if "image_processor" in msgspec.json.decode(data, type=dict[str, Any]):
                return msgspec.json.decode(data, type=_Processor).image_processor
    except (OSError, msgspec.MsgspecError) as error:
        raise ModelError(f"{folder / name} cannot be read ({error}); save it again") from error
    return _Preprocessor()
