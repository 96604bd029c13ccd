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

from privlm.dp.training import OptimizerConfig

MAX_CONFIG_BYTES = 1 << 20

Positive = Annotated[float, msgspec.Meta(gt=0)]
Probability = Annotated[float, msgspec.Meta(gt=0, lt=1)]
AtLeastOne = Annotated[int, msgspec.Meta(ge=1)]
NotNegative = Annotated[int, msgspec.Meta(ge=0)]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says which key and how to mend it."""


class CorpusConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which documents, and what one record is.

    ``unit: block`` cuts documents into records of ``context`` tokens, and privacy
    protects one block; ``unit: document`` makes a document one record and refuses
    those that do not fit, unless ``truncate`` is set. The shares divide the
    documents: public ones train tokenizer and base model, test ones measure utility.
    """

    source: str = "pydoc-topics"
    unit: Literal["block", "document"] = "block"
    context: Annotated[int, msgspec.Meta(ge=2)] = 32
    truncate: bool = False
    public_share: Positive = 0.25
    private_share: Positive = 0.6
    test_share: Positive = 0.15


class TokenizerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``byte``, or ``bpe`` trained on the public documents."""

    kind: Literal["byte", "bpe"] = "bpe"
    vocab_size: Annotated[int, msgspec.Meta(ge=257)] = 512


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Sizes of the tiny decoder; see :class:`privlm.models.TinyConfig`."""

    width: AtLeastOne = 64
    layers: AtLeastOne = 2
    heads: AtLeastOne = 4


class PublicTraining(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How the base model is trained on the public documents; ``epochs: 0`` leaves it random."""

    epochs: NotNegative = 10
    batch_size: AtLeastOne = 64
    optimizer: OptimizerConfig = OptimizerConfig(kind="adamw", learning_rate=3e-3)


class PrivacyConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A budget, or a noise multiplier; exactly one of the two.

    ``delta`` belongs to both. ``max_grad_norm`` is the clipping bound.
    """

    target_epsilon: Positive | None = None
    noise_multiplier: Positive | None = None
    delta: Probability = 1e-5
    max_grad_norm: Positive = 1.0

    def __post_init__(self) -> None:
        if (self.target_epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("give either target_epsilon or noise_multiplier, and not both")


class TrainConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``privlm train``: a base model from public text, fine-tuned on private text.

    ``privacy: null`` trains without protection and has to be written out.
    ``seed`` chooses split, initialisation and order of public batches; it never
    reaches the secret randomness of sampling and noise. ``ledger`` may be shared
    by all runs on one data set; by default it stands in the output folder.
    """

    privacy: PrivacyConfig | None
    corpus: CorpusConfig = CorpusConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    public: PublicTraining = PublicTraining()
    optimizer: OptimizerConfig = OptimizerConfig(kind="sgd", learning_rate=2.0)
    epochs: Positive = 10.0
    batch_size: AtLeastOne = 256
    microbatch_size: AtLeastOne = 64
    checkpoint_every: AtLeastOne = 20
    seed: NotNegative = 0
    ledger: str | None = None


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
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: not valid YAML: {_one_line(error)}") from error
    try:
        return msgspec.convert({} if loaded is None else loaded, schema)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {_named_key(str(error))}") from error


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without its traps: ``1e-5`` is a number, and a repeated key is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
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


def _named_key(message: str) -> str:
    """``Expected `int`, got `str` - at `$.a.b``` with the key first."""
    unknown = re.fullmatch(r"Object contains unknown field `(.*?)`(?: - at `\$\.?(.*)`)?", message)
    if unknown:
        key = ".".join(part for part in (unknown[2], unknown[1]) if part)
        return f"{key}: unknown key; check its spelling"
    placed = re.fullmatch(r"(.*) - at `\$\.?(.*)`", message, re.DOTALL)
    if placed and placed[2]:
        return f"{placed[2]}: {placed[1]}"
    return placed[1] if placed else message


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
