"""Images and sounds beside text: from files to examples, and what is refused on the way."""

import json
import struct
import zlib

import numpy as np
import pytest
import torch
from made_up_examples import CAPTIONS, write_digits, write_tones, write_wave

from privlm.data import IGNORE_INDEX, AudioInput, ByteTokenizer, DataError, ImageInput
from privlm.data import media as media_files
from privlm.data.media import read_image, read_wave
from privlm.data.multimodal import (
    encode_media,
    input_features,
    load_media_records,
    pixel_values,
)
from privlm.models import whisper_mel

TOKENIZER = ByteTokenizer().reserve(1)
PLACEHOLDER = TOKENIZER.reserved_ids[0]
IMAGE = ImageInput(PLACEHOLDER, tokens=4, size=16)
SOUND = AudioInput(PLACEHOLDER, tokens=8, n_mels=16, frames=32)


def test_a_digit_becomes_placeholders_prompt_and_caption(tmp_path):
    records = load_media_records(write_digits(tmp_path, 10))
    examples = encode_media(records, TOKENIZER, IMAGE, context=24)
    assert len(examples) == 10
    ids, labels, mask = (
        examples.tensors[name][7] for name in ("input_ids", "labels", "attention_mask")
    )
    text = [*b"digit: ", *CAPTIONS[7].encode(), TOKENIZER.end_id]
    assert ids.tolist() == [PLACEHOLDER] * 4 + text + [TOKENIZER.end_id] * (20 - len(text))
    assert mask.tolist() == [1] * (4 + len(text)) + [0] * (20 - len(text))
    targets = [*CAPTIONS[7].encode(), TOKENIZER.end_id]
    assert labels[11 : 11 + len(targets)].tolist() == targets
    assert int((labels != IGNORE_INDEX).sum()) == len(targets)
    assert examples.tensors["pixel_values"].shape == (10, 3, 16, 16)
    assert examples.users[:4] == ("writer 0", "writer 1", "writer 2", "writer 0")
    assert examples.record_ids[0] == "records:1"


def test_pixels_are_the_files(tmp_path):
    """Corners of one digit, exact where nothing is resized."""
    from PIL import Image

    write_digits(tmp_path, 1)
    values = read_image(tmp_path / "0.png", 32)
    expected = torch.from_numpy(np.array(Image.open(tmp_path / "0.png")) / 255.0).float()
    assert torch.allclose(values, expected.expand(3, 32, 32))
    assert values.max() > 0.5
    normal = pixel_values(values, ImageInput(0, 1, 32, (0.1, 0.2, 0.3), (0.5, 0.25, 1.0)))
    assert torch.allclose(normal[1], (values[1] - 0.2) / 0.25)


def test_a_stacked_model_gets_one_image_in_a_row_and_never_an_empty_one(tmp_path):
    stacked = ImageInput(PLACEHOLDER, 4, 16, mean=(0.0, 0.0, 0.0), std=(1.0,) * 3, stacked=True)
    assert pixel_values(torch.ones(3, 16, 16), stacked).shape == (1, 3, 16, 16)
    with pytest.raises(DataError, match="takes it for padding"):
        pixel_values(torch.zeros(3, 16, 16), stacked)
    from PIL import Image

    Image.new("RGB", (4, 4)).save(tmp_path / "black.png")
    path = tmp_path / "r.jsonl"
    path.write_text('{"image": "black.png", "text": "night"}\n')
    with pytest.raises(DataError, match=r"r\.jsonl, line 1, record 'r:1': the image is all zeros"):
        encode_media(load_media_records(path), TOKENIZER, stacked, context=24)


def test_a_tone_becomes_frames_with_silence_after_it(tmp_path):
    records = load_media_records(write_tones(tmp_path, 3))
    examples = encode_media(records, TOKENIZER, SOUND, context=24)
    features = examples.tensors["input_features"]
    assert features.shape == (3, 16, 32)
    assert examples.tensors["feature_attention_mask"].tolist() == [[1] * 32] * 3
    loudest = features[:, :, 5].argmax(dim=1).tolist()
    assert loudest == sorted(set(loudest))  # low, middle, high
    assert (features[:, :, 25:] < features.amax(dim=(1, 2), keepdim=True) - 1).all()
    wave = read_wave(tmp_path / "0.wav", 16_000, 5120)
    padded = torch.cat([wave, torch.zeros(5120 - len(wave))])[None]
    assert torch.equal(features[0], whisper_mel(padded, 16)[0])
    assert torch.equal(features[0], input_features(wave, SOUND))


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_samples_are_the_files(width, channels, tmp_path):
    samples = np.sin(np.arange(300) / 7) * 0.9
    write_wave(tmp_path / "a.wav", samples, width=width, channels=channels)
    wave = read_wave(tmp_path / "a.wav", 16_000, 300)
    assert wave.dtype == torch.float32
    assert np.abs(wave.numpy() - samples).max() < 1.5 * 2.0 ** (1 - min(8 * width, 24))


def refused(tmp_path, *lines):
    path = tmp_path / "r.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(DataError) as caught:
        load_media_records(path)
    return str(caught.value)


def test_each_bad_line_is_named(tmp_path):
    good = '{"image": "a.png", "text": "a", "id": "x"}'
    assert "line 2: name either" in refused(tmp_path, good, '{"text": "a"}')
    assert "line 1: name either" in refused(tmp_path, '{"image": "a", "audio": "b", "text": "c"}')
    assert "audio after lines with image" in refused(
        tmp_path, good, '{"audio": "b.wav", "text": "c"}'
    )
    assert "line 3: the id 'x' stands in" in refused(tmp_path, good, "", good)
    assert "line 1: the text is empty" in refused(tmp_path, '{"image": "a.png", "text": " "}')
    assert "every line is an object" in refused(tmp_path, "[1]")
    assert "every line is an object" in refused(tmp_path, '{"image": "a.png"}')
    assert "holds no records" in refused(tmp_path)
    with pytest.raises(DataError, match=r"cannot be read.*give a \.jsonl"):
        load_media_records(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize("name", ["../a.png", "/etc/passwd", "", "sub/../../a.png", "a\\u0000"])
def test_a_record_names_no_file_outside_its_folder(name, tmp_path):
    message = refused(tmp_path, f'{{"image": "{name}", "text": "a"}}')
    assert "line 1" in message
    assert "leads out of" in message or "is no path" in message


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    assert "leads out of" in refused(folder, '{"image": "link.png", "text": "a"}')


def png(width, height):
    """A header that promises this size, and nothing else."""

    def chunk(kind, data):
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))


def test_images_are_bounded_and_of_two_formats(tmp_path, monkeypatch):
    from PIL import Image

    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png(8001, 8001))
    with pytest.raises(DataError, match="8001 x 8001 pixels, more than"):
        read_image(bomb, 16)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.gif")
    with pytest.raises(DataError, match="no PNG or JPEG image"):
        read_image(tmp_path / "a.gif", 16)
    (tmp_path / "cut.png").write_bytes(png(8, 8))
    with pytest.raises(DataError, match="no PNG or JPEG image"):
        read_image(tmp_path / "cut.png", 16)
    with pytest.raises(DataError, match="cannot be read"):
        read_image(tmp_path / "nowhere.png", 16)
    with pytest.raises(DataError, match="is no file"):
        read_image(tmp_path, 16)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", 16).shape == (3, 16, 16)
    monkeypatch.setattr(media_files, "MAX_FILE_BYTES", 10)
    with pytest.raises(DataError, match="more than 10"):
        read_image(tmp_path / "a.png", 16)


def test_sounds_are_bounded_and_of_the_models_rate(tmp_path):
    path = tmp_path / "a.wav"
    write_wave(path, np.zeros(301))
    with pytest.raises(DataError, match="301 samples, the model hears 1 to 300"):
        read_wave(path, 16_000, 300)
    with pytest.raises(DataError, match="ffmpeg -i in.wav -ar 8000"):
        read_wave(path, 8000, 400)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match="ends before its 301 samples"):
        read_wave(path, 16_000, 400)
    write_wave(path, np.zeros(0))
    with pytest.raises(DataError, match="0 samples"):
        read_wave(path, 16_000, 400)
    path.write_bytes(b"no wave")
    with pytest.raises(DataError, match="no WAV file"):
        read_wave(path, 16_000, 400)


def test_texts_that_do_not_fit_or_forge_a_placeholder_are_refused(tmp_path, monkeypatch):
    records = load_media_records(write_digits(tmp_path, 2))
    with pytest.raises(DataError, match=r"line 1, record 'records:1' has 16 tokens, 4 of them"):
        encode_media(records, TOKENIZER, IMAGE, context=15)
    forgeable = ImageInput(ord("z"), tokens=4, size=16)
    with pytest.raises(DataError, match="has 5 tokens 122, which stand for its image"):
        encode_media(records, TOKENIZER, forgeable, context=24)
    with pytest.raises(DataError, match="no records to encode"):
        encode_media([], TOKENIZER, IMAGE, context=24)
    monkeypatch.setattr("privlm.data.multimodal.MAX_TENSOR_BYTES", 1000)
    with pytest.raises(DataError, match="2 records need 6144 bytes"):
        encode_media(records, TOKENIZER, IMAGE, context=24)


def test_a_file_that_cannot_be_used_is_named_with_its_line(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({"image": "gone.png", "text": "a"}))
    with pytest.raises(
        DataError, match=r"r\.jsonl, line 1, record 'r:1'.*gone\.png cannot be read"
    ):
        encode_media(load_media_records(path), TOKENIZER, IMAGE, context=24)
