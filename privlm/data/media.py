"""Image and sound files as tensors, within bounds that keep one bad file from filling the memory.

Shapes: C = 3 channels, H x W = pixels, S = side of the model's square image, L = samples.
"""

import warnings
import wave
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from privlm.data.errors import DataError

MAX_FILE_BYTES = 64 * 2**20
MAX_PIXELS = 64 * 10**6
_FORMATS = ("PNG", "JPEG")
_SAMPLE_SCALE = {1: 2.0**7, 2: 2.0**15, 4: 2.0**31}  # by bytes a sample


def read_image(path: Path, size: int) -> Tensor:
    """A PNG or JPEG as an RGB square, resized with antialiasing; its aspect ratio is not kept.

    Transparency is dropped, a palette resolved.

    Args:
        path: The file.
        size: S, in pixels.

    Returns:
        image_CSS: float32 in [0, 1].

    Raises:
        DataError: If the file is missing, too large, or not such an image.
    """
    _require_small(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound is ours
            with Image.open(path, formats=_FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise DataError(
                        f"{path} has {image.width} x {image.height} pixels, more than "
                        f"{MAX_PIXELS}; scale it down"
                    )
                small = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    except DataError:
        raise
    except Exception as error:  # a decoder trips over whatever a broken file makes it trip over
        raise DataError(
            f"{path} is no {' or '.join(_FORMATS)} image ({error}); convert or remove it"
        ) from error
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255.0


def read_wave(path: Path, sample_rate: int, max_samples: int) -> Tensor:
    """A WAV file of 8, 16 or 32-bit PCM; several channels are averaged.

    Args:
        path: The file.
        sample_rate: In hertz; other rates are refused, not resampled.
        max_samples: Longer files are refused.

    Returns:
        wave_L: float32 in [-1, 1).

    Raises:
        DataError: If the file is missing, too large or long, of another rate, or no such WAV.
    """
    _require_small(path)
    try:
        with wave.open(str(path), "rb") as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            frames = file.getnframes()
            if width not in _SAMPLE_SCALE:
                raise DataError(f"{path} has {8 * width}-bit samples; convert it to 16-bit PCM")
            if rate != sample_rate:
                raise DataError(
                    f"{path} has {rate} samples a second, the model hears {sample_rate}; convert "
                    f"it, as with `ffmpeg -i in.wav -ar {sample_rate} out.wav`"
                )
            if not 0 < frames <= max_samples:
                raise DataError(
                    f"{path} has {frames} samples, the model hears 1 to {max_samples} "
                    f"({max_samples / sample_rate:g} s); cut it into shorter sounds"
                )
            data = file.readframes(frames)
    except DataError:
        raise
    except (wave.Error, EOFError, OSError) as error:
        raise DataError(f"{path} is no WAV file of PCM ({error}); convert or remove it") from error
    if len(data) < frames * channels * width:
        raise DataError(f"{path} ends before its {frames} samples; copy it again")
    samples = np.frombuffer(data, dtype="u1" if width == 1 else f"<i{width}").astype(np.float32)
    if width == 1:
        samples -= 128.0  # 8-bit WAV is unsigned
    return torch.from_numpy(samples.reshape(-1, channels).mean(axis=1) / _SAMPLE_SCALE[width])


def _require_small(path: Path) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if not path.is_file():
        raise DataError(f"{path} is no file")
    if size > MAX_FILE_BYTES:
        raise DataError(f"{path} has {size} bytes, more than {MAX_FILE_BYTES}; make it smaller")
