"""Records of text with one image or sound each, and the examples a model is trained on.

Shapes: N = examples, T = tokens, C = channels, S x S = pixels, M = mel bands, F = frames.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec
import torch
from torch import Tensor
from torch.nn import functional as F

from privlm.data.blocks import IGNORE_INDEX
from privlm.data.documents import MAX_LINE_BYTES
from privlm.data.errors import DataError
from privlm.data.examples import Examples
from privlm.data.inputs import AudioInput, ImageInput, require_placeholders
from privlm.data.media import read_image, read_wave
from privlm.data.tokenization import Encoder
from privlm.models.modalities import WHISPER_HOP, WHISPER_RATE, whisper_mel

MAX_TENSOR_BYTES = 32 * 2**30  # all images or sounds of a data set stand in memory together


@dataclass(frozen=True)
class MediaRecord:
    """A text about an image or a sound.

    Args:
        id: Unique within a data set.
        media: The image or sound file.
        text: What the model learns to say.
        prompt: What it is told before; no target.
        user: Whose record it is; by default every record is its own user.
        where: File and line it stands in, for errors.
    """

    id: str
    media: Path = field(repr=False)
    text: str = field(repr=False)
    prompt: str = field(default="", repr=False)
    user: str = ""
    where: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        if not self.id:
            raise DataError(f"{self.where}: a record has an empty id; give each a unique one")
        if not self.user:
            object.__setattr__(self, "user", self.id)


class _Row(msgspec.Struct, frozen=True):
    text: str
    image: str | None = None
    audio: str | None = None
    prompt: str = ""
    id: str | Annotated[int, msgspec.Meta(ge=0)] | None = None
    user: str | Annotated[int, msgspec.Meta(ge=0)] | None = None


def load_media_records(path: str | Path) -> tuple[MediaRecord, ...]:
    r"""Read JSON lines, each an object with ``text`` and either ``image`` or ``audio``.

    ``image`` (PNG or JPEG) and ``audio`` (WAV) are paths below the file's own folder; ``prompt``,
    ``id`` and ``user`` may follow. The default id is ``<name>:<line>``; blank lines are skipped.

    Raises:
        DataError: Naming file, line and the way out: missing or empty file, no JSON object, both
            or none of image and audio or a change between them, a path out of the folder, blank
            text, a repeated id.
    """
    path = Path(path)
    records = tuple(_read(path))
    if not records:
        raise DataError(f"{path} holds no records")
    first_at: dict[str, str] = {}
    for record in records:
        if record.id in first_at:
            raise DataError(
                f"{record.where}: the id {record.id!r} stands in {first_at[record.id]} already; "
                "make ids unique"
            )
        first_at[record.id] = record.where
    return records


def encode_media(
    records: Sequence[MediaRecord],
    tokenizer: Encoder,
    media: ImageInput | AudioInput,
    *,
    context: int,
) -> Examples:
    """Examples for a vision-language or audio-language model.

    The placeholders of the image or sound come first, then prompt, text and ``end_id``; text and
    ``end_id`` are the targets. Padding stands on the right.

    Args:
        records: All with images, or all with sounds, as ``media`` says.
        tokenizer: Never encodes a text to the placeholder.
        media: What the model wants.
        context: T, placeholders included.

    Returns:
        ``input_ids``, ``attention_mask``, ``labels`` (N, T) and ``pixel_values`` (N, C, S, S), or
        (N, 1, C, S, S) if stacked; or ``input_features`` (N, M, F) and ``feature_attention_mask``
        (N, F), all ones, as silence is heard.

    Raises:
        DataError: Naming the record: a file that cannot be used, a text that does not fit or
            encodes to the placeholder. Or if there are no records, or too many for the memory.
    """
    if not records:
        raise DataError("there are no records to encode")
    size = 4 * len(records) * math.prod(media.shape)
    if size > MAX_TENSOR_BYTES:
        raise DataError(
            f"{len(records)} records need {size} bytes of memory, more than {MAX_TENSOR_BYTES}; "
            "train on fewer records or smaller images"
        )
    ids_NT = torch.full((len(records), context), tokenizer.end_id, dtype=torch.int64)
    mask_NT = torch.zeros_like(ids_NT)
    labels_NT = torch.full_like(ids_NT, IGNORE_INDEX)
    values = torch.empty((len(records), *media.shape))
    for n, record in enumerate(records):
        prompt = [media.token_id] * media.tokens + tokenizer.encode(record.prompt)
        ids = [*prompt, *tokenizer.encode(record.text), tokenizer.end_id]
        if len(ids) > context:
            raise DataError(
                f"{_named(record)} has {len(ids)} tokens, {media.tokens} of them for its image or "
                f"sound; the context holds {context}. Shorten it, or use a longer context"
            )
        ids_NT[n, : len(ids)] = torch.tensor(ids)
        mask_NT[n, : len(ids)] = 1
        labels_NT[n, len(prompt) : len(ids)] = ids_NT[n, len(prompt) : len(ids)]
        try:
            values[n] = _values(record.media, media)
            require_placeholders(ids_NT[n : n + 1], media)
        except DataError as error:
            raise DataError(f"{_named(record)}: {error}") from error
    tensors = {"input_ids": ids_NT, "attention_mask": mask_NT, "labels": labels_NT}
    if isinstance(media, ImageInput):
        tensors["pixel_values"] = values
    else:
        tensors["input_features"] = values
        tensors["feature_attention_mask"] = torch.ones(
            (len(records), media.frames), dtype=torch.int64
        )
    return Examples(tensors, tuple(r.id for r in records), tuple(r.user for r in records))


def pixel_values(image_CSS: Tensor, media: ImageInput) -> Tensor:
    """Pixels in [0, 1] normalised as the model wants them, of ``media.shape``.

    Raises:
        DataError: If nothing but zeros is left and the model is a stacked one, which drops such
            an image as padding and moves all later ones to other examples.
    """
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (media.mean, media.std))
    normal_CSS = (image_CSS - mean) / std
    if media.stacked and not bool(normal_CSS.any()):
        raise DataError("the image is all zeros once normalised; the model takes it for padding")
    return normal_CSS.reshape(media.shape)


def input_features(wave_L: Tensor, media: AudioInput) -> Tensor:
    """Whisper's log-mel frames (M, F) of a sound at 16 kHz, with silence after it."""
    padded_1L = F.pad(wave_L, (0, media.frames * WHISPER_HOP - len(wave_L)))[None]
    return whisper_mel(padded_1L, media.n_mels)[0]


def _values(path: Path, media: ImageInput | AudioInput) -> Tensor:
    if isinstance(media, ImageInput):
        return pixel_values(read_image(path, media.size), media)
    return input_features(read_wave(path, WHISPER_RATE, media.frames * WHISPER_HOP), media)


def _named(record: MediaRecord) -> str:
    return f"{record.where}, record {record.id!r}" if record.where else f"record {record.id!r}"


def _read(path: Path) -> Iterator[MediaRecord]:
    decoder, kind = msgspec.json.Decoder(_Row), ""
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; give a .jsonl file") from error
    with file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{path}, line {number}"
            if len(line) > MAX_LINE_BYTES:
                raise DataError(f"{where} is longer than {MAX_LINE_BYTES} bytes; shorten it")
            if not line.strip():
                continue
            try:
                row = decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise DataError(
                    f'{where}: {error}; every line is an object like {{"text": "...", '
                    '"image": "one.png"}'
                ) from None
            if (row.image is None) == (row.audio is None):
                raise DataError(f"{where}: name either an image or an audio file")
            here = "audio" if row.image is None else "image"
            if kind not in ("", here):
                raise DataError(f"{where}: {here} after lines with {kind}; make two files of it")
            kind = here
            if not row.text.strip():
                raise DataError(f"{where}: the text is empty or all whitespace; leave it out")
            yield MediaRecord(
                f"{path.stem}:{number}" if row.id in (None, "") else str(row.id),
                _below(path.parent, row.image or row.audio or "", where),
                row.text,
                row.prompt,
                "" if row.user is None else str(row.user),
                where,
            )


def _below(folder: Path, name: str, where: str) -> Path:
    """A path below ``folder``; a record from elsewhere must not name any file of the machine."""
    try:
        path = (folder / name).resolve()
        inside = path.is_relative_to(folder.resolve())
    except (OSError, ValueError) as error:  # ValueError: a null byte
        raise DataError(f"{where}: {name!r} is no path ({error})") from None
    if not name or not inside:
        raise DataError(
            f"{where}: {name!r} leads out of {folder}; paths are relative to the file and stay "
            "in its folder"
        )
    return path
