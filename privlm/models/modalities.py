"""Images and sound as rows of numbers that a linear layer can turn into token embeddings.

Shapes: B = examples, C = channels, H x W = pixels, P = patches, K = numbers a patch,
L = samples, F = frames, M = mel bands, S = frequencies.
"""

import math
from functools import cache

import torch
from torch import Tensor

WINDOW_SECONDS = 0.025
HOP_SECONDS = 0.010


def patchify(image_BCHW: Tensor, patch: int) -> Tensor:
    """Cut images into square patches, row by row (Dosovitskiy et al. 2021, "ViT").

    Args:
        image_BCHW: float pixels.
        patch: Side of a patch in pixels; divides height and width.

    Returns:
        patch_BPK: P = (H / patch)(W / patch), K = C * patch^2.

    Raises:
        ValueError: If the shape is not (B, C, H, W) or ``patch`` does not divide it.
    """
    if image_BCHW.dim() != 4:
        raise ValueError(f"images have shape (B, C, H, W), got {tuple(image_BCHW.shape)}")
    B, C, H, W = image_BCHW.shape
    if patch < 1 or H % patch or W % patch:
        raise ValueError(f"patches of {patch} pixels do not tile an image of {H} x {W}")
    grid = image_BCHW.reshape(B, C, H // patch, patch, W // patch, patch)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(B, (H // patch) * (W // patch), C * patch * patch)


def log_mel(wave_BL: Tensor, sample_rate: int, n_mels: int) -> Tensor:
    """Log-mel spectrogram: 25 ms Hann windows every 10 ms, scaled as Whisper's (Radford 2022).

    Power is summed into mel bands, taken to log10, floored eight decades below the example's own
    maximum and shifted to about [-1, 1]. No statistic is shared between examples.

    Args:
        wave_BL: float samples in [-1, 1].
        sample_rate: In hertz.
        n_mels: M.

    Returns:
        frames_BFM: F = 1 + (L - window) // hop.

    Raises:
        ValueError: If the shape is not (B, L), the wave is shorter than one window, or the
            window resolves too few frequencies for ``n_mels`` bands.
    """
    if wave_BL.dim() != 2:
        raise ValueError(f"waves have shape (B, L), got {tuple(wave_BL.shape)}")
    window = round(WINDOW_SECONDS * sample_rate)
    hop = round(HOP_SECONDS * sample_rate)
    if hop < 1 or wave_BL.shape[1] < window:
        raise ValueError(
            f"a wave of {wave_BL.shape[1]} samples at {sample_rate} Hz is shorter than the "
            f"{WINDOW_SECONDS * 1000:.0f} ms window"
        )
    hann = torch.hann_window(window, dtype=wave_BL.dtype, device=wave_BL.device)
    spectrum_BSF = torch.stft(wave_BL, window, hop, window=hann, center=False, return_complex=True)
    bank_SM = mel_filterbank(window, sample_rate, n_mels).to(wave_BL)
    power_BFM = spectrum_BSF.abs().square().transpose(1, 2) @ bank_SM
    log_BFM = power_BFM.clamp(min=1e-10).log10()
    loudest_B11 = log_BFM.amax(dim=(1, 2), keepdim=True)
    return (torch.maximum(log_BFM, loudest_B11 - 8.0) + 4.0) / 4.0


WHISPER_RATE = 16_000
WHISPER_HOP = 160
_WHISPER_FFT = 400


def whisper_mel(wave_BL: Tensor, n_mels: int) -> Tensor:
    """Log-mel spectrogram exactly as Whisper's (Radford 2022), and so Qwen2-Audio's, hear it.

    As :func:`log_mel`, with Slaney's mel scale, filters of equal area, and frames centred on
    multiples of 10 ms. No statistic is shared between examples.

    Args:
        wave_BL: float samples in [-1, 1], 16,000 a second.
        n_mels: M.

    Returns:
        frames_BMF: F = L // 160.

    Raises:
        ValueError: If the shape is not (B, L) or the wave is shorter than 25 ms.
    """
    if wave_BL.dim() != 2 or wave_BL.shape[1] < _WHISPER_FFT:
        raise ValueError(
            f"waves have shape (B, L) with L >= {_WHISPER_FFT}, got {tuple(wave_BL.shape)}"
        )
    hann = torch.hann_window(_WHISPER_FFT, dtype=wave_BL.dtype, device=wave_BL.device)
    spectrum_BSF = torch.stft(
        wave_BL, _WHISPER_FFT, WHISPER_HOP, window=hann, center=True, return_complex=True
    )
    bank_SM = slaney_filterbank(n_mels).to(wave_BL)
    power_BMF = bank_SM.T @ spectrum_BSF[..., :-1].abs().square()
    log_BMF = power_BMF.clamp(min=1e-10).log10()
    loudest_B11 = log_BMF.amax(dim=(1, 2), keepdim=True)
    return (torch.maximum(log_BMF, loudest_B11 - 8.0) + 4.0) / 4.0


@cache
def slaney_filterbank(n_mels: int) -> Tensor:
    """Triangles of equal area up to 8 kHz, linear below 1 kHz and logarithmic above (Slaney 1998).

    Returns:
        bank_SM: float32, S = 201 frequencies 40 Hz apart. Cached: do not write to it.
    """
    if n_mels < 1:
        raise ValueError(f"n_mels must be positive, got {n_mels}")
    step = math.log(6.4) / 27.0  # one mel above 1 kHz
    top = 15.0 + math.log(WHISPER_RATE / 2 / 1000.0) / step
    mel = torch.linspace(0.0, top, n_mels + 2, dtype=torch.float64)
    edge = torch.where(mel < 15.0, 200.0 / 3.0 * mel, 1000.0 * ((mel - 15.0) * step).exp())
    left_M, centre_M, right_M = edge[:-2], edge[1:-1], edge[2:]
    hertz_S1 = torch.arange(_WHISPER_FFT // 2 + 1, dtype=torch.float64)[:, None] * (
        WHISPER_RATE / _WHISPER_FFT
    )
    rising_SM = (hertz_S1 - left_M) / (centre_M - left_M)
    falling_SM = (right_M - hertz_S1) / (right_M - centre_M)
    triangle_SM = torch.minimum(rising_SM, falling_SM).clamp(min=0.0)
    return (triangle_SM * 2.0 / (right_M - left_M)).float()


@cache
def mel_filterbank(n_fft: int, sample_rate: int, n_mels: int) -> Tensor:
    """Triangular filters spaced evenly in mel = 2595 log10(1 + f / 700) (O'Shaughnessy 1987).

    Returns:
        bank_SM: float32, S = n_fft // 2 + 1 frequencies, multiples of sample_rate / n_fft. Cached:
            do not write to it.

    Raises:
        ValueError: If a band is so narrow that no frequency falls into it.
    """
    if n_mels < 1:
        raise ValueError(f"n_mels must be positive, got {n_mels}")
    top = 2595.0 * math.log10(1.0 + sample_rate / 2 / 700.0)
    edge = 700.0 * (
        10.0 ** (torch.linspace(0.0, top, n_mels + 2, dtype=torch.float64) / 2595.0) - 1
    )
    left_M, centre_M, right_M = edge[:-2], edge[1:-1], edge[2:]
    hertz_S1 = torch.arange(n_fft // 2 + 1, dtype=torch.float64)[:, None] * sample_rate / n_fft
    rising_SM = (hertz_S1 - left_M) / (centre_M - left_M)
    falling_SM = (right_M - hertz_S1) / (right_M - centre_M)
    bank_SM = torch.minimum(rising_SM, falling_SM).clamp(min=0.0)
    if not bool(bank_SM.any(dim=0).all()):
        raise ValueError(
            f"{n_mels} mel bands are too many for {n_fft // 2 + 1} frequencies at {sample_rate} Hz"
        )
    return bank_SM.float()
