import math

import pytest
import torch

from privlm.models import log_mel, mel_filterbank, patchify, whisper_mel

SAMPLE_RATE = 8000


def tone(hertz, seconds=0.2, amplitude=0.5):
    time = torch.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return amplitude * torch.sin(2 * math.pi * hertz * time)[None]


def test_patches_tile_the_image_row_by_row():
    image = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6).float()
    patches = patchify(image, 2)
    assert patches.shape == (2, 6, 12)
    assert torch.equal(patches[1, 4].reshape(3, 2, 2), image[1, :, 2:4, 2:4])


def test_images_that_do_not_tile_are_refused():
    with pytest.raises(ValueError, match="3 pixels do not tile an image of 8 x 8"):
        patchify(torch.zeros(1, 1, 8, 8), 3)
    with pytest.raises(ValueError, match=r"\(B, C, H, W\)"):
        patchify(torch.zeros(1, 8, 8), 2)


def test_log_mel_finds_the_frequency_of_a_tone():
    n_mels = 20
    top = 2595 * math.log10(1 + SAMPLE_RATE / 2 / 700)
    for hertz in (300, 800, 1500, 3000):
        frames = log_mel(tone(hertz), SAMPLE_RATE, n_mels)
        assert frames.shape == (1, 1 + (1600 - 200) // 80, n_mels)
        expected = 2595 * math.log10(1 + hertz / 700) / top * (n_mels + 1) - 1
        assert abs(frames.mean(1).argmax().item() - expected) <= 1


def test_log_mel_units():
    # Ten times the amplitude is 20 dB: two decades of power, half a unit after (x + 4) / 4.
    quiet, loud = (log_mel(tone(800, amplitude=a), SAMPLE_RATE, 20) for a in (0.05, 0.5))
    assert (loud.max() - quiet.max()).item() == pytest.approx(0.5, abs=1e-3)
    assert (loud.max() - loud.min()).item() <= 2.0 + 1e-6  # the floor lies eight decades below


def test_log_mel_shares_nothing_between_examples():
    alone = log_mel(tone(300, amplitude=0.01), SAMPLE_RATE, 20)
    batch = torch.cat([tone(300, amplitude=0.01), tone(2000, amplitude=1.0)])
    assert torch.allclose(log_mel(batch, SAMPLE_RATE, 20)[:1], alone, atol=1e-5)
    assert torch.isfinite(log_mel(torch.zeros(1, 1600), SAMPLE_RATE, 20)).all()


def test_filters_overlap_into_a_partition():
    bank = mel_filterbank(400, 16_000, 20)
    assert bank.shape == (201, 20)
    first, last = bank[:, 0].argmax() + 1, bank[:, -1].argmax()
    assert torch.allclose(bank[first:last].sum(1), torch.ones(int(last - first)), atol=1e-5)


def test_audio_errors_give_the_numbers():
    with pytest.raises(ValueError, match="199 samples at 8000 Hz is shorter than the 25 ms"):
        log_mel(torch.zeros(1, 199), SAMPLE_RATE, 20)
    with pytest.raises(ValueError, match="200 mel bands are too many for 101 frequencies"):
        log_mel(torch.zeros(1, 1600), SAMPLE_RATE, 200)
    with pytest.raises(ValueError, match=r"\(B, L\)"):
        log_mel(torch.zeros(1600), SAMPLE_RATE, 20)
    with pytest.raises(ValueError, match="n_mels must be positive"):
        mel_filterbank(200, SAMPLE_RATE, 0)


def test_whisper_mel_is_what_transformers_extracts():
    transformers = pytest.importorskip("transformers")
    wave = 0.1 * torch.randn(2, 16_000, generator=torch.Generator().manual_seed(0))
    for n_mels in (80, 128):
        extract = transformers.WhisperFeatureExtractor(feature_size=n_mels, chunk_length=1)
        theirs = extract([row.numpy() for row in wave], sampling_rate=16_000, return_tensors="pt")
        ours = whisper_mel(wave, n_mels)
        assert torch.allclose(ours, theirs["input_features"], atol=1e-5)
        # A change of a thousandth in loudness shows, so 1e-5 is no idle tolerance.
        assert not torch.allclose(
            whisper_mel(1.001 * wave, n_mels), theirs["input_features"], atol=1e-5
        )


def test_whisper_mel_shares_nothing_between_examples():
    quiet = torch.cat([tone(300, amplitude=0.01), torch.zeros(1, 14_400)], dim=1)
    loud = torch.cat([tone(2000, amplitude=1.0), torch.zeros(1, 14_400)], dim=1)
    alone = whisper_mel(quiet, 20)
    assert torch.allclose(whisper_mel(torch.cat([quiet, loud]), 20)[:1], alone, atol=1e-5)
    with pytest.raises(ValueError, match="L >= 400"):
        whisper_mel(torch.zeros(1, 399), 20)
