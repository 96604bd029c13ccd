"""Batches of random examples, and two offline data sets: scanned digits and synthetic tones."""

import json
import math
import wave

import numpy as np
import torch

from privlm.data import IGNORE_INDEX

CAPTIONS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PITCHES = {"low": 220.0, "middle": 880.0, "high": 3520.0}


def batch_for(built, task, generator, *, count=3, length=32):
    """Examples of which the second is shorter than the others."""
    inputs = built.inputs
    ids = torch.randint(1, inputs.vocab_size - 1, (count, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, length - 8 :] = 0
    ids[1, length - 8 :] = 0
    labels = ids.masked_fill(mask == 0, IGNORE_INDEX)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    media = inputs.image or inputs.audio
    if media is not None:
        ids[:, : media.tokens] = media.token_id
        labels[:, : media.tokens] = IGNORE_INDEX
        values = torch.randn(count, *media.shape, generator=generator)
        batch["pixel_values" if inputs.image else "input_features"] = values
    if inputs.audio:
        batch["feature_attention_mask"] = torch.ones(count, media.frames, dtype=torch.int64)
    if task == "sequence_classification":
        batch["labels"] = torch.tensor([0, 1, 1])
    if task == "masked_lm":
        chosen = torch.rand(ids.shape, generator=generator) < 0.3
        batch["labels"] = labels.masked_fill(~chosen, IGNORE_INDEX)
    return batch


def loud(model, generator):
    """Weights far from their small start, so that one example's influence on another would show."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2, generator=generator)
    return model


def write_digits(folder, count):
    """Scans of handwritten digits (scikit-learn's, 8 x 8, enlarged) with their names."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    lines = []
    for n in range(count):
        pixels = np.kron(digits.images[n], np.ones((4, 4))) * 15.9
        Image.fromarray(pixels.astype("u1")).save(folder / f"{n}.png")
        lines.append(
            {
                "image": f"{n}.png",
                "text": CAPTIONS[digits.target[n]],
                "prompt": "digit: ",
                "user": f"writer {n % 3}",
            }
        )
    return _write(folder, lines)


def write_tones(folder, count, *, seconds=0.2, rate=16_000):
    """Sines at three pitches, each of another loudness, with their names."""
    names = tuple(PITCHES)
    lines = []
    for n in range(count):
        name = names[n % len(names)]
        time = np.arange(int(seconds * rate)) / rate
        samples = (0.1 + 0.8 * n / count) * np.sin(2 * math.pi * PITCHES[name] * time)
        write_wave(folder / f"{n}.wav", samples, rate)
        lines.append({"audio": f"{n}.wav", "text": name})
    return _write(folder, lines)


def write_wave(path, samples, rate=16_000, width=2, channels=1):
    full = {1: 127, 2: 32767, 4: 2**31 - 1}[width]
    values = np.rint(np.asarray(samples) * full)
    data = (values + 128).astype("u1") if width == 1 else values.astype(f"<i{width}")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(np.repeat(data, channels).tobytes())


def _write(folder, lines):
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
