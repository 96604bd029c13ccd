"""Configuration files: YAML into frozen structs, with errors that name the key.

The structs are the schema: an unknown key, a wrong type or a value out of range
is refused with its path (``privacy.target_epsilon``) before any work begins.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import yaml

from privlm.data import DEFAULT_CORPUS
from privlm.dp.clipping import MAX_MICROBATCH
from privlm.dp.training import OptimizerConfig
from privlm.privacy import AtLeastOne, Positive, PrivacyConfig, Probability

__all__ = [
    "AUDIO_KINDS",
    "IMAGE_KINDS",
    "NO_PUBLIC_TEXT",
    "AtLeastOne",
    "BudgetConfig",
    "ConfigError",
    "CorpusConfig",
    "LanguageModelConfig",
    "LoraConfig",
    "ModelConfig",
    "NotNegative",
    "PrivacyConfig",
    "PublicTraining",
    "TokenizerConfig",
    "TrainConfig",
    "decode_config",
    "load_config",
]

MAX_CONFIG_BYTES = 1 << 20
NO_PUBLIC_TEXT = "none"

NotNegative = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says which key and how to mend it."""


class CorpusConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which documents, and what one record is.

    ``unit: block`` cuts documents into records of ``context`` tokens, and privacy
    protects one block; ``unit: document`` makes a document one record and refuses
    those that do not fit, unless ``truncate`` is set.

    Public documents train tokenizer and base model, *without protection*; test
    documents measure utility; only the private ones are protected. Name public
    text by ``public_source`` (``pydoc-topics`` will do) and ``source`` is private
    throughout; or write ``public_share`` out, and that part of ``source`` counts as
    public. The same holds for ``test_source`` and ``test_share``. Relative paths
    start at the working directory.

    For a model that sees or hears, every source is a ``.jsonl`` of texts with images or sounds
    (:func:`privlm.data.multimodal.load_media_records`), and a line of it is one record.
    """

    source: Annotated[str, msgspec.Meta(min_length=1)] = DEFAULT_CORPUS
    unit: Literal["block", "document"] = "block"
    context: Annotated[int, msgspec.Meta(ge=2, le=2**20)] = 32
    truncate: bool = False
    public_source: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    test_source: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    public_share: Positive | None = None
    private_share: Positive = 0.4
    test_share: Positive = 0.3

    def __post_init__(self) -> None:
        if self.public_source is not None and self.public_share is not None:
            raise ValueError("give public_source or public_share, and not both")
        if self.public_source is None and self.public_share is None:
            if self.source != DEFAULT_CORPUS:
                raise ValueError(
                    "public_source: say which text trains tokenizer and base model without "
                    f"protection; `public_source: {DEFAULT_CORPUS}` keeps all of source private, "
                    "`public_share: 0.3` gives up that share of its documents"
                )
            msgspec.structs.force_setattr(self, "public_share", 0.3)


class TokenizerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``byte``, or ``bpe`` trained on the public documents."""

    kind: Literal["byte", "bpe"] = "bpe"
    vocab_size: Annotated[int, msgspec.Meta(ge=257, le=2**20)] = 512


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Sizes of the tiny decoder; see :class:`privlm.models.TinyConfig`."""

    width: Annotated[int, msgspec.Meta(ge=2, le=2**16)] = 64
    layers: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 2
    heads: Annotated[int, msgspec.Meta(ge=1, le=2**15)] = 4

    def __post_init__(self) -> None:
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width must be a multiple of 2 * heads, got width {self.width} and "
                f"{self.heads} heads"
            )


IMAGE_KINDS = ("llava", "smolvlm")
AUDIO_KINDS = ("qwen2_audio",)


class LanguageModelConfig(ModelConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which model: ``kind``, built small from random weights, or ``path``, a pre-trained one.

    ``tiny`` is the toolkit's own; the others are those of
    :func:`privlm.models.architectures.build`, which need ``transformers``. ``path`` is a folder
    that ``save_pretrained`` wrote: a model that predicts the next token, with its tokenizer.
    ``image_size`` and ``image_patch`` (pixels) belong to models that see, ``n_mels`` and ``frames``
    (10 ms each) to one that hears.
    """

    kind: Literal["tiny", "gpt2", "llama", "qwen2", "qwen3", "llava", "smolvlm", "qwen2_audio"] = (
        "tiny"
    )
    path: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    image_size: Annotated[int, msgspec.Meta(ge=4, le=4096)] = 32
    image_patch: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 8
    n_mels: Annotated[int, msgspec.Meta(ge=1, le=256)] = 32
    frames: Annotated[int, msgspec.Meta(ge=8, le=2**20)] = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        default = msgspec.structs.asdict(_DEFAULT_MODEL) if self.path else {}
        changed = [k for k, v in default.items() if k != "path" and getattr(self, k) != v]
        if changed:
            raise ValueError(
                f"path names a model that has its own {', '.join(changed)}; leave them out"
            )


_DEFAULT_MODEL = LanguageModelConfig()


class PublicTraining(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How the base model is trained on the public documents; ``epochs: 0`` leaves it random."""

    epochs: NotNegative = 10
    batch_size: AtLeastOne = 64
    optimizer: OptimizerConfig = OptimizerConfig(kind="adamw", learning_rate=3e-3)


class LoraConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Adapters that are trained in place of the model; see :func:`privlm.models.adapters.add_lora`.

    They are put beside the layers of the public base model, which is trained whole before. The
    private data moves nothing but them.
    """

    rank: Annotated[int, msgspec.Meta(ge=1, le=2**16)] = 8
    alpha: Positive = 16.0
    targets: str | list[str] | None = None


class BudgetConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What all runs on the ledger together may spend.

    A run ends before the step that would exceed it.
    """

    epsilon: Positive
    delta: Probability = 1e-5


class TrainConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``privlm train``: a base model from public text, fine-tuned on private text.

    ``privacy: null`` trains without protection and has to be written out.
    ``seed`` chooses split, initialisation and order of public batches; it never
    reaches the secret randomness of sampling and noise. ``ledger`` may be shared
    by all runs on one data set; by default it stands in the output folder, and a
    relative path starts at the working directory of the run's first start.
    ``budget`` bounds what all of them spend. ``public: null``, the default, trains a new model
    for ten epochs and leaves one from a folder as it is; the latter needs no public text, which
    ``corpus: {public_source: none}`` says. ``microbatch_size`` and ``checkpoint_every`` change
    nothing about the result.
    """

    privacy: PrivacyConfig | None
    corpus: CorpusConfig = CorpusConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: LanguageModelConfig = LanguageModelConfig()
    lora: LoraConfig | None = None
    public: PublicTraining | None = None
    optimizer: OptimizerConfig = OptimizerConfig(kind="sgd", learning_rate=2.0)
    epochs: Annotated[float, msgspec.Meta(gt=0, le=1e6)] = 10.0
    batch_size: AtLeastOne = 256
    microbatch_size: Annotated[int, msgspec.Meta(ge=1, le=MAX_MICROBATCH)] = 64
    checkpoint_every: AtLeastOne = 20
    seed: NotNegative = 0
    ledger: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    budget: BudgetConfig | None = None

    def __post_init__(self) -> None:
        if self.lora is not None and self.model.kind == "tiny" and self.model.path is None:
            raise ValueError(
                "lora: adapters go beside the layers of a transformers model; choose "
                "another model.kind, or a model.path"
            )
        if self.model.path is not None and self.tokenizer != TokenizerConfig():
            raise ValueError("tokenizer: a model from a folder has its own; leave it out")
        if self.budget is not None and self.privacy is None:
            raise ValueError("budget: a run without protection spends without bound; set privacy")
        if self.corpus.public_source == NO_PUBLIC_TEXT and (
            self.model.path is None or self.public_training.epochs
        ):
            raise ValueError(
                "corpus.public_source: public text trains tokenizer and base model; only a "
                "model.path that is not trained on it does without"
            )

    @property
    def public_training(self) -> PublicTraining:
        """``public``, or its default for this model."""
        if self.public is not None:
            return self.public
        return PublicTraining() if self.model.path is None else PublicTraining(epochs=0)


T = TypeVar("T")


def load_config(path: Path, schema: type[T]) -> T:
    """Decode a YAML file into ``schema``.

    Raises:
        ConfigError: unreadable, no YAML, a repeated or unknown key, a wrong type
            or a value out of range; the message names file and key.
    """
    try:
        with Path(path).open("rb") as file:
            text = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    if len(text) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes; is it a config file?")
    return decode_config(text, schema, where=str(path))


def decode_config(text: str | bytes, schema: type[T], *, where: str) -> T:
    """:func:`load_config` on text that ``where`` names in errors."""
    try:
        loaded = yaml.load(text, Loader=_Loader)  # noqa: S506  (a SafeLoader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-01
        raise ConfigError(f"{where}: not valid YAML: {_one_line(error)}") from error
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply; is it a config file?") from None
    if not isinstance(loaded, dict | None):
        raise ConfigError(f"{where}: not a list of keys; write lines like `epochs: 10`")
    try:
        return msgspec.convert(loaded or {}, schema)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {_named_key(str(error))}") from error


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without its traps: ``1e-5`` is a number, and a repeated key is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is not text", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


_HINTS = {
    "privacy": "write a budget, such as `privacy: {target_epsilon: 8}`, or `privacy: null` to "
    "train without protection",
}


def _named_key(message: str) -> str:
    """``Expected `int`, got `str` - at `$.a.b``` with the key first."""
    unknown = re.fullmatch(r"Object contains unknown field `(.*?)`(?: - at `\$\.?(.*)`)?", message)
    if unknown:
        key = ".".join(part for part in (unknown[2], unknown[1]) if part)
        return f"{key}: unknown key; check its spelling"
    missing = re.fullmatch(r"Object missing required field `(.*?)`(?: - at `\$\.?(.*)`)?", message)
    if missing:
        key = ".".join(part for part in (missing[2], missing[1]) if part)
        return f"{key}: missing, and there is no default; {_HINTS.get(key, 'write it')}"
    placed = re.fullmatch(r"(.*) - at `\$\.?(.*)`", message, re.DOTALL)
    if placed and placed[2]:
        return f"{placed[2]}: {placed[1]}"
    return placed[1] if placed else message


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
