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
from privlm.dp.clipping import MAX_MICROBATCH, MIN_GRAD_NORM
from privlm.dp.training import OptimizerConfig

MAX_CONFIG_BYTES = 1 << 20

# Upper ends keep infinity out, and what would not end in an error but in a swapping machine.
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e9)]
Probability = Annotated[float, msgspec.Meta(gt=0, lt=1)]
AtLeastOne = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
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
    noise_multiplier: Annotated[float, msgspec.Meta(ge=1e-6, le=1e9)] | None = None
    delta: Probability = 1e-5
    max_grad_norm: Annotated[float, msgspec.Meta(ge=MIN_GRAD_NORM, le=1e9)] = 1.0

    def __post_init__(self) -> None:
        if (self.target_epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("give either target_epsilon or noise_multiplier, and not both")


class TrainConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``privlm train``: a base model from public text, fine-tuned on private text.

    ``privacy: null`` trains without protection and has to be written out.
    ``seed`` chooses split, initialisation and order of public batches; it never
    reaches the secret randomness of sampling and noise. ``ledger`` may be shared
    by all runs on one data set; by default it stands in the output folder, and a
    relative path starts at the working directory of the run's first start.
    ``microbatch_size`` and ``checkpoint_every`` change nothing about the result.
    """

    privacy: PrivacyConfig | None
    corpus: CorpusConfig = CorpusConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    public: PublicTraining = PublicTraining()
    optimizer: OptimizerConfig = OptimizerConfig(kind="sgd", learning_rate=2.0)
    epochs: Annotated[float, msgspec.Meta(gt=0, le=1e6)] = 10.0
    batch_size: AtLeastOne = 256
    microbatch_size: Annotated[int, msgspec.Meta(ge=1, le=MAX_MICROBATCH)] = 64
    checkpoint_every: AtLeastOne = 20
    seed: NotNegative = 0
    ledger: Annotated[str, msgspec.Meta(min_length=1)] | None = None


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
