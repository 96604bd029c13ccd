"""What a run is made from: examples by who may see them, and a model that fits them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from privlm.config import AUDIO_KINDS, IMAGE_KINDS, LanguageModelConfig, LoraConfig, TrainConfig
from privlm.data import (
    DataError,
    Document,
    Encoder,
    Examples,
    Split,
    TokenBlocks,
    Tokenizer,
    cut_blocks,
    deduplicate,
    load_documents,
)
from privlm.data.inputs import AudioInput, ImageInput
from privlm.data.multimodal import MediaRecord, encode_media, load_media_records
from privlm.dp.clipping import PerExampleLoss
from privlm.dp.plan import Plan
from privlm.dp.records import InMemory, OfContributors, OfUsers, Records, per_user
from privlm.dp.users import ExampleLevelSampling, bound_contributions
from privlm.evaluation import HeldOut
from privlm.finetuning import cut_corpus, naming, new_tokenizer, split_sources
from privlm.models import TinyConfig, TinyDecoder, causal_lm, decoder_lm, loss_for
from privlm.models.adapters import add_lora
from privlm.models.architectures import LanguageModel, ModelInputs, Sizes, build
from privlm.models.huggingface import ModelError
from privlm.models.pretrained import FolderTokenizer, load
from privlm.privacy import PrivacyConfig
from protocols.randomness import Stream


@dataclass(frozen=True, eq=False)
class Materials:
    """All that a run needs besides its plan.

    Attributes:
        public: trained on without protection; None if nothing is.
        private: what is protected.
        held_out: what utility is measured on.
        public_documents: how many trained tokenizer or base model.
        model: before any training; every use trains the same one.
        tokenizer: ours, trained on public text, or the one of the model's folder.
    """

    public: Examples | None = field(repr=False)
    private: Examples = field(repr=False)
    held_out: HeldOut = field(repr=False)
    public_documents: int
    model: nn.Module = field(repr=False)
    tokenizer: Tokenizer | FolderTokenizer = field(repr=False)

    @property
    def context(self) -> int:
        """Tokens of an example, padding included."""
        return int(self.private.tensors["input_ids"].shape[1])


@dataclass(frozen=True)
class _Described(Document):
    """The text of a record, and the record."""

    record: MediaRecord | None = field(default=None, repr=False)


def prepare(config: TrainConfig) -> Materials:
    """Read the documents, and build or load the model.

    Raises:
        DataError: the documents cannot be used.
        ModelError: the model cannot be built or loaded, or is not trained to predict the next
            token.
    """
    loaded = None if config.model.path is None else _from_folder(config.model.path, config)
    if loaded is None:
        media = config.model.kind in IMAGE_KINDS + AUDIO_KINDS
    else:
        media = _media_of(loaded.inputs) is not None
    by_user = config.privacy is not None and config.privacy.unit == "user"
    split = split_sources(
        config.corpus,
        _load_media if media else load_documents,
        seed=config.seed,
        by="user" if by_user else "document",
    )
    if loaded is not None:
        tokenizer, model, inputs = loaded.tokenizer, loaded.model, loaded.inputs
    else:
        tokenizer = new_tokenizer(config.tokenizer, [d.text for d in split.public])
        tokenizer = tokenizer.reserve(1) if media else tokenizer
        model, inputs = new_model(config.model, tokenizer, config.corpus.context, seed=config.seed)
    parts = (
        _media_parts(config, split, tokenizer, _media_of(inputs))
        if media
        else _text_parts(config, split, tokenizer)
    )
    trains = loaded is None or config.public_training.epochs > 0
    return Materials(*parts, len(split.public) if trains else 0, model, tokenizer)


def new_model(
    config: LanguageModelConfig, tokenizer: Tokenizer, context: int, *, seed: int
) -> tuple[nn.Module, ModelInputs]:
    """A model with random weights for texts of this tokenizer, and the inputs that it takes."""
    generator = torch.Generator().manual_seed(seed)
    if config.kind == "tiny":
        sizes = TinyConfig(
            vocab_size=tokenizer.vocab_size,
            context=context,
            width=config.width,
            layers=config.layers,
            heads=config.heads,
        )
        return TinyDecoder(sizes, generator), ModelInputs(tokenizer.vocab_size, context)
    built = build(
        config.kind,
        Sizes(
            vocab_size=tokenizer.vocab_size,
            width=config.width,
            layers=config.layers,
            heads=config.heads,
            context=context,
            end_id=tokenizer.end_id,
            image_size=config.image_size,
            image_patch=config.image_patch,
            n_mels=config.n_mels,
            frames=config.frames,
        ),
        generator,
    )
    return built.model, built.inputs


def adapted(model: nn.Module, lora: LoraConfig | None, *, seed: int) -> nn.Module:
    """The model with adapters, its own weights frozen; or as it is."""
    if lora is None:
        return model
    generator = torch.Generator().manual_seed(seed)
    adapted_model: nn.Module = add_lora(
        model, rank=lora.rank, alpha=lora.alpha, generator=generator, targets=lora.targets
    )
    return adapted_model


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What an optimiser is over."""
    return [p for p in model.parameters() if p.requires_grad]


def candidates(private: Examples, privacy: PrivacyConfig | None) -> int:
    """What a batch is drawn from: examples, users, or the examples that users contribute."""
    if privacy is None or privacy.examples_per_user is None:
        return len(private)
    counts = Counter(private.users)
    if privacy.user_sampling == "uls":
        return len(counts)
    return sum(min(count, privacy.examples_per_user) for count in counts.values())


def records_of(
    private: Examples, plan: Plan, loss: PerExampleLoss, stream: Stream
) -> tuple[Records, PerExampleLoss]:
    """What the plan's sampler draws from, and the loss of one of it."""
    if plan.users is None:
        return InMemory(private.tensors), loss
    chosen = bound_contributions(
        private.users, plan.users.examples_per_user, stream.child("contributions")
    )
    if isinstance(plan.users, ExampleLevelSampling):
        return OfContributors(InMemory(private.tensors), chosen), loss
    return OfUsers(InMemory(private.tensors), chosen), per_user(loss)


def _from_folder(path: str, config: TrainConfig) -> LanguageModel:
    loaded = load(path)
    if loss_for(loaded.model) not in (causal_lm, decoder_lm):
        raise ModelError(
            f"{path} holds a {type(loaded.model).__name__}; only models that predict the next "
            "token can be trained here"
        )
    if loaded.tokenizer is None:
        raise ModelError(f"{path} has no tokenizer; save the model's own beside it")
    if loaded.inputs.context is not None and loaded.inputs.context < config.corpus.context:
        raise ModelError(
            f"{path} takes {loaded.inputs.context} tokens at most; lower corpus.context from "
            f"{config.corpus.context}"
        )
    return loaded


def _media_of(inputs: ModelInputs) -> ImageInput | AudioInput | None:
    return inputs.image or inputs.audio


def _load_media(source: str) -> tuple[Document, ...]:
    if Path(source).suffix != ".jsonl":
        raise DataError(
            f"{source}: a model that sees or hears is trained on a .jsonl of texts with images or "
            "sounds; name one as corpus.source, public_source and test_source"
        )
    records = load_media_records(source)
    return tuple(_Described(r.id, r.text, r.user, record=r) for r in records)


def _media_parts(
    config: TrainConfig, split: Split, tokenizer: Encoder, media: ImageInput | AudioInput | None
) -> tuple[Examples | None, Examples, HeldOut]:
    assert media is not None  # the model takes images or sounds
    context = config.corpus.context

    def encoded(documents: Sequence[Document]) -> Examples:
        records = [d.record for d in documents if isinstance(d, _Described) and d.record]
        return encode_media(records, tokenizer, media, context=context)

    with naming(config.corpus.source):
        public = encoded(split.public) if split.public else None
        private, test = encoded(split.private), encoded(split.test)
    sizes = [float(len(d.text.encode())) for d in split.test]
    held_out = HeldOut(test, torch.arange(len(test)), torch.tensor(sizes, dtype=torch.float64))
    return public, private, held_out


def _text_parts(
    config: TrainConfig, split: Split, tokenizer: Tokenizer | FolderTokenizer
) -> tuple[Examples | None, Examples, HeldOut]:
    if split.public:
        blocks = cut_corpus(config.corpus, split, tokenizer)
        public, private, test = blocks.public.as_examples(), blocks.private, blocks.test
    else:
        public = None
        private, test = _cut_without_public(config, split, tokenizer)
    held_out = HeldOut(test.as_examples(), test.document_N, _bytes_N(test, tokenizer))
    return public, private.as_examples(), held_out


def _cut_without_public(
    config: TrainConfig, split: Split, tokenizer: Encoder
) -> tuple[TokenBlocks, TokenBlocks]:
    corpus = config.corpus
    with naming(corpus.source):
        private, test = (
            cut_blocks(
                documents, tokenizer, corpus.context, unit=corpus.unit, truncate=corpus.truncate
            )
            for documents in (split.private, split.test)
        )
        test, _ = deduplicate(test)
        private, _ = deduplicate(private, [test])
    return private, test


def _bytes_N(blocks: TokenBlocks, tokenizer: Tokenizer | FolderTokenizer) -> Tensor:
    """Bytes that each record's targets stand for; the first token is none."""
    target_NS, ids_NS = blocks.mask_NT[:, 1:], blocks.ids_NT[:, 1:]
    if isinstance(tokenizer, FolderTokenizer):
        sizes = [
            len(tokenizer.decode(ids_S[target_S].tolist()).encode())
            for ids_S, target_S in zip(ids_NS, target_NS, strict=True)
        ]
        return torch.tensor(sizes, dtype=torch.float64)
    byte_V = torch.from_numpy(tokenizer.n_bytes_V)
    return (byte_V[ids_NS] * target_NS).sum(1).double()
