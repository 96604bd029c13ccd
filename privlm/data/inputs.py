"""What a multimodal model wants to see beside its text: one image or one sound an example.

Shapes: N = examples, T = tokens, C = channels, S x S = pixels, M = mel bands, F = frames.
"""

from dataclasses import dataclass

from torch import Tensor

from privlm.data.errors import DataError


@dataclass(frozen=True)
class ImageInput:
    """An image of a vision-language model.

    Args:
        token_id: The placeholder in the text that an image's features replace. No text may
            encode to it.
        tokens: Placeholders an image.
        size: S, the side of the square image in pixels.
        mean: Subtracted from each channel of pixels in [0, 1].
        std: Divides each channel then.
        stacked: ``pixel_values`` has shape (N, 1, C, S, S) (Idefics3, SmolVLM), not (N, C, S, S).
    """

    token_id: int
    tokens: int
    size: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    stacked: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example's ``pixel_values``."""
        return (1, 3, self.size, self.size) if self.stacked else (3, self.size, self.size)


@dataclass(frozen=True)
class AudioInput:
    """A sound of an audio-language model, as Whisper's log-mel frames: 16 kHz, one every 10 ms.

    Args:
        token_id: The placeholder in the text that the sound's features replace. No text may
            encode to it.
        tokens: Placeholders a sound.
        n_mels: M.
        frames: F; shorter sounds are followed by silence.
    """

    token_id: int
    tokens: int
    n_mels: int
    frames: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example's ``input_features``."""
        return (self.n_mels, self.frames)


def require_placeholders(ids_NT: Tensor, media: ImageInput | AudioInput) -> None:
    """Refuse examples that do not have exactly their own image's or sound's placeholders.

    transformers counts placeholders over the whole batch and fills them in order: one too many
    here and one too few there would move one example's features into another's text, and no
    clipping could then bound what one example adds.

    Raises:
        DataError: Naming the first such example.
    """
    found_N = (ids_NT == media.token_id).sum(dim=1)
    wrong = (found_N != media.tokens).nonzero().flatten().tolist()
    if wrong:
        raise DataError(
            f"example {wrong[0]} has {int(found_N[wrong[0]])} tokens {media.token_id}, which stand "
            f"for its image or sound; it must have exactly {media.tokens}, or features of one "
            "example would flow into another"
        )
