"""Documents, users, token blocks, splits and canaries; ``multimodal`` for images and sound."""

from privlm.data.blocks import (
    IGNORE_INDEX,
    TokenBlocks,
    concatenate,
    cut_blocks,
    fingerprint,
)
from privlm.data.canaries import Canary, new_token_canaries, plant, secret_canaries
from privlm.data.documents import DEFAULT_CORPUS, Document, load_documents
from privlm.data.errors import DataError
from privlm.data.examples import Examples
from privlm.data.inputs import AudioInput, ImageInput
from privlm.data.splits import (
    BlockSplit,
    Duplicate,
    Split,
    cut_split,
    deduplicate,
    draw_membership,
    split_documents,
)
from privlm.data.tokenization import (
    BpeTokenizer,
    ByteTokenizer,
    Encoder,
    Tokenizer,
    load_tokenizer,
    train_bpe,
)

__all__ = [
    "DEFAULT_CORPUS",
    "IGNORE_INDEX",
    "AudioInput",
    "BlockSplit",
    "BpeTokenizer",
    "ByteTokenizer",
    "Canary",
    "DataError",
    "Document",
    "Duplicate",
    "Encoder",
    "Examples",
    "ImageInput",
    "Split",
    "TokenBlocks",
    "Tokenizer",
    "concatenate",
    "cut_blocks",
    "cut_split",
    "deduplicate",
    "draw_membership",
    "fingerprint",
    "load_documents",
    "load_tokenizer",
    "new_token_canaries",
    "plant",
    "secret_canaries",
    "split_documents",
    "train_bpe",
]
