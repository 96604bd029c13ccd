"""Language models by transformers: built small from random weights, or described from their config.

Nothing is fetched. Dropout is 0: in differentially private training the noise is regularisation
enough, and it would make an example's gradient depend on more than the example.

Shapes: N = examples, T = tokens, C = channels, S x S = pixels, M = mel bands, F = frames.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from privlm.data.inputs import AudioInput, ImageInput
from privlm.models.huggingface import ModelError, require_transformers
from privlm.models.loss import BatchLoss, loss_for

Task = Literal["causal_lm", "masked_lm", "sequence_classification", "seq2seq"]


@dataclass(frozen=True)
class ModelInputs:
    """What a model's examples must look like.

    Args:
        vocab_size: Token ids lie below it.
        context: Positions at most; None if the model has no bound of its own.
        image: Of a vision-language model; ``pixel_values`` beside the text.
        audio: Of an audio-language model; ``input_features`` and ``feature_attention_mask``.
    """

    vocab_size: int
    context: int | None
    image: ImageInput | None = None
    audio: AudioInput | None = None


@dataclass(frozen=True)
class LanguageModel:
    """A model of transformers, the inputs it takes, and its tokenizer where a folder held one."""

    model: Any = field(repr=False)
    inputs: ModelInputs
    tokenizer: Any = field(default=None, repr=False)

    @property
    def loss(self) -> BatchLoss:
        """:func:`privlm.models.loss.loss_for` the model."""
        return loss_for(self.model)


@dataclass(frozen=True)
class Sizes:
    """Sizes of a small model; both towers of a multimodal one have the same.

    Args:
        vocab_size: Reserved ids included.
        width: Of the residual stream; a multiple of ``2 * heads``.
        layers: Blocks of each tower.
        heads: Attention heads.
        context: Positions at most, placeholders of images and sounds included.
        tied_head: Input embedding and output head share their weights; None leaves it to the
            kind, as its family has it.
        end_id: The token that ends a text and pads it.
        placeholder_id: Where features of an image or sound go; by default the last id. No text
            may encode to it: :meth:`privlm.data.Tokenizer.reserve` one.
        image_size: Side of the square image in pixels.
        image_patch: Side of a patch, a divisor of it.
        n_mels: Mel bands of sound.
        frames: Frames of sound, 10 ms each; a multiple of 4.
        classes: Of a classifier.

    Raises:
        ValueError: If a size is out of range or does not divide.
    """

    vocab_size: int
    width: int = 64
    layers: int = 2
    heads: int = 4
    context: int = 128
    tied_head: bool | None = None
    end_id: int = 0
    placeholder_id: int | None = None
    image_size: int = 32
    image_patch: int = 8
    n_mels: int = 32
    frames: int = 64
    classes: int = 2

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "layers", "heads", "context", "image_patch", "n_mels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width must be a multiple of 2 * heads, got {self.width} and {self.heads} heads"
            )
        if self.placeholder_id is None:
            object.__setattr__(self, "placeholder_id", self.vocab_size - 1)
        for name in ("end_id", "placeholder_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(
                    f"{name} must lie below vocab_size {self.vocab_size}, got {getattr(self, name)}"
                )
        if self.image_size % (2 * self.image_patch) or self.image_size < 4 * self.image_patch:
            raise ValueError(
                f"image_size must be an even multiple of image_patch, and at least 4 times it; "
                f"got {self.image_size} and {self.image_patch}"
            )
        # At one token a sound, Qwen2-Audio takes another path, which makes the text longer.
        if self.frames % 4 or self.frames < 8:
            raise ValueError(f"frames must be a multiple of 4 and at least 8, got {self.frames}")
        if self.classes < 2:
            raise ValueError(f"a classifier needs at least 2 classes, got {self.classes}")


def build(
    kind: str, sizes: Sizes, generator: torch.Generator, *, task: Task | None = None
) -> LanguageModel:
    """A model with random weights.

    ================  ============================================================  ============
    ``gpt2``          learned positions, LayerNorm, tied head                       causal_lm, *
    ``llama``         rotary positions, RMSNorm, SwiGLU                             causal_lm, *
    ``qwen2``         as llama with biases at query, key and value, tied head       causal_lm, *
    ``qwen3``         as llama with RMSNorm of queries and keys by head, tied head  causal_lm, *
    ``llava``         CLIP tower, two-layer projector, Llama                        causal_lm
    ``smolvlm``       SigLIP tower, pixel shuffle and projection, Llama             causal_lm
    ``qwen2_audio``   Whisper's tower, projector, Qwen2                             causal_lm
    ``bert``          encoder                                                       masked_lm, *
    ``t5``            encoder-decoder, relative positions                           seq2seq
    ================  ============================================================  ============

    ``*``: or sequence_classification.

    Args:
        kind: From the table.
        sizes: The sizes.
        generator: Source of the weights; torch's global generator is left as it was.
        task: From the table; the first by default.

    Raises:
        ModelError: If ``transformers`` is missing, kind or task is unknown, or the kind cannot
            have the head that is asked for.
    """
    transformers = require_transformers(f"{kind} is a transformers model; to build it")
    if kind not in _KINDS:
        raise ModelError(f"unknown kind {kind!r}; known are {', '.join(_KINDS)}")
    configure, classes = _KINDS[kind]
    task = task or next(iter(classes))
    if task not in classes:
        raise ModelError(f"{kind} is built for {' or '.join(classes)}, not for {task!r}")
    config = configure(transformers, sizes)
    if task == "sequence_classification":
        config.num_labels = sizes.classes
    with borrowed_randomness(generator):
        model = getattr(transformers, classes[task])(config)
    if task == "sequence_classification":
        # A decoder's classifier looks for the end of the text. It is told only now, because an
        # embedding made with a padding token would never train that token.
        model.config.pad_token_id = sizes.end_id
    return LanguageModel(model.train(), describe(model.config))


def describe(config: Any) -> ModelInputs:
    """The inputs of a model with this configuration of transformers.

    Images are normalised by 0.5 and 0.5; a folder may say otherwise (:func:`pretrained.load`).

    Raises:
        ModelError: If it sees or hears in a way not known here.
    """
    text = config.get_text_config()
    context = getattr(text, "max_position_embeddings", None)
    image, audio = None, None
    if config.model_type in ("llava", "smolvlm", "idefics3"):
        image = _image_input(config)
    elif config.model_type == "qwen2_audio":
        frames = 2 * config.audio_config.max_source_positions
        audio = AudioInput(
            token_id=config.audio_token_id,
            tokens=frames // 4,
            n_mels=config.audio_config.num_mel_bins,
            frames=frames,
        )
    elif any(hasattr(config, name) for name in ("vision_config", "audio_config")):
        raise ModelError(
            f"a {config.model_type!r} model sees or hears in a way that is not known here; known "
            "are llava, smolvlm, idefics3 and qwen2_audio"
        )
    return ModelInputs(text.vocab_size, context, image, audio)


def _image_input(config: Any) -> ImageInput:
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    if config.model_type == "llava":
        extra = 1 if vision.model_type == "clip_vision_model" else 0  # the class token
        dropped = 1 if config.vision_feature_select_strategy == "default" else 0
        tokens = side**2 + extra - dropped
    else:
        tokens = side**2 // config.scale_factor**2
    return ImageInput(
        token_id=config.image_token_id,
        tokens=tokens,
        size=vision.image_size,
        stacked=config.model_type != "llava",
    )


@contextmanager
def borrowed_randomness(generator: torch.Generator) -> Iterator[None]:
    """Libraries that draw from torch's global generator draw what ``generator`` decides."""
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _common(sizes: Sizes) -> dict[str, Any]:
    return {
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
    }


def _decoder(sizes: Sizes, *, tied: bool) -> dict[str, Any]:
    return _common(sizes) | {
        "intermediate_size": 8 * sizes.width // 3,
        "num_key_value_heads": sizes.heads,
        "max_position_embeddings": sizes.context,
        "tie_word_embeddings": tied if sizes.tied_head is None else sizes.tied_head,
        "bos_token_id": None,
        "eos_token_id": sizes.end_id,
        "use_cache": False,
    }


def _vision(sizes: Sizes) -> dict[str, Any]:
    return {
        "hidden_size": sizes.width,
        "intermediate_size": 4 * sizes.width,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "image_size": sizes.image_size,
        "patch_size": sizes.image_patch,
    }


def _gpt2(transformers: Any, sizes: Sizes) -> Any:
    return transformers.GPT2Config(
        vocab_size=sizes.vocab_size,
        n_embd=sizes.width,
        n_layer=sizes.layers,
        n_head=sizes.heads,
        n_positions=sizes.context,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=sizes.tied_head is not False,
        bos_token_id=None,
        eos_token_id=sizes.end_id,
        use_cache=False,
    )


def _llama(transformers: Any, sizes: Sizes) -> Any:
    return transformers.LlamaConfig(**_decoder(sizes, tied=False))


def _qwen2(transformers: Any, sizes: Sizes) -> Any:
    return transformers.Qwen2Config(**_decoder(sizes, tied=True))


def _qwen3(transformers: Any, sizes: Sizes) -> Any:
    head_dim = sizes.width // sizes.heads
    return transformers.Qwen3Config(**_decoder(sizes, tied=True), head_dim=head_dim)


def _llava(transformers: Any, sizes: Sizes) -> Any:
    vision = transformers.CLIPVisionConfig(**_vision(sizes), projection_dim=sizes.width)
    return transformers.LlavaConfig(
        vision_config=vision,
        text_config=_llama(transformers, sizes),
        image_token_index=sizes.placeholder_id,
        image_seq_length=(sizes.image_size // sizes.image_patch) ** 2,
        tie_word_embeddings=bool(sizes.tied_head),
    )


def _smolvlm(transformers: Any, sizes: Sizes) -> Any:
    return transformers.SmolVLMConfig(
        vision_config=_vision(sizes),
        text_config=_llama(transformers, sizes),
        image_token_id=sizes.placeholder_id,
        scale_factor=2,
        tie_word_embeddings=bool(sizes.tied_head),
        use_cache=False,
    )


def _qwen2_audio(transformers: Any, sizes: Sizes) -> Any:
    audio = transformers.Qwen2AudioEncoderConfig(
        num_mel_bins=sizes.n_mels,
        encoder_layers=sizes.layers,
        encoder_attention_heads=sizes.heads,
        encoder_ffn_dim=4 * sizes.width,
        d_model=sizes.width,
        max_source_positions=sizes.frames // 2,
    )
    text = transformers.Qwen2Config(**_decoder(sizes, tied=False))
    return transformers.Qwen2AudioConfig(
        audio_config=audio, text_config=text, audio_token_index=sizes.placeholder_id
    )


def _bert(transformers: Any, sizes: Sizes) -> Any:
    return transformers.BertConfig(
        **_common(sizes),
        intermediate_size=4 * sizes.width,
        max_position_embeddings=sizes.context,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        classifier_dropout=0.0,
        pad_token_id=None,
        tie_word_embeddings=sizes.tied_head is not False,
    )


def _t5(transformers: Any, sizes: Sizes) -> Any:
    if sizes.tied_head is False:
        raise ModelError("transformers ties a T5's head whatever is asked; leave tied_head out")
    return transformers.T5Config(
        vocab_size=sizes.vocab_size,
        d_model=sizes.width,
        d_kv=sizes.width // sizes.heads,
        d_ff=4 * sizes.width,
        num_layers=sizes.layers,
        num_heads=sizes.heads,
        dropout_rate=0.0,
        classifier_dropout=0.0,
        pad_token_id=sizes.end_id,
        eos_token_id=sizes.end_id,
        decoder_start_token_id=sizes.end_id,
        use_cache=False,
    )


_Configure = Callable[[Any, Sizes], Any]
_CLASSIFIER: Task = "sequence_classification"
_KINDS: dict[str, tuple[_Configure, dict[Task, str]]] = {
    "gpt2": (_gpt2, {"causal_lm": "GPT2LMHeadModel", _CLASSIFIER: "GPT2ForSequenceClassification"}),
    "llama": (
        _llama,
        {"causal_lm": "LlamaForCausalLM", _CLASSIFIER: "LlamaForSequenceClassification"},
    ),
    "qwen2": (
        _qwen2,
        {"causal_lm": "Qwen2ForCausalLM", _CLASSIFIER: "Qwen2ForSequenceClassification"},
    ),
    "qwen3": (
        _qwen3,
        {"causal_lm": "Qwen3ForCausalLM", _CLASSIFIER: "Qwen3ForSequenceClassification"},
    ),
    "llava": (_llava, {"causal_lm": "LlavaForConditionalGeneration"}),
    "smolvlm": (_smolvlm, {"causal_lm": "SmolVLMForConditionalGeneration"}),
    "qwen2_audio": (_qwen2_audio, {"causal_lm": "Qwen2AudioForConditionalGeneration"}),
    "bert": (
        _bert,
        {"masked_lm": "BertForMaskedLM", _CLASSIFIER: "BertForSequenceClassification"},
    ),
    "t5": (_t5, {"seq2seq": "T5ForConditionalGeneration"}),
}
KINDS = tuple(_KINDS)
