"""ChaCha20 on tensors: the published vectors, a second implementation, misuse, and the normals.

Statistical tests run under a fixed seed; the stated false-alarm probability is that of the choice
of the seed.
"""

import copy
import json
import math
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from protocols import chacha20
from protocols.chacha20 import MAX_BLOCKS, ChaCha20, DeviceStream
from protocols.errors import KeystreamReused
from protocols.randomness import NORMAL_CUT, Stream

VECTORS = Path(__file__).parents[1] / "vectors" / "rfc8439_chacha20.json"
CASES = json.loads(VECTORS.read_text())["cases"]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request) -> torch.device:
    return torch.empty(0, device=request.param).device


@pytest.fixture
def stream(device) -> DeviceStream:
    return DeviceStream(bytes(range(32)), "test", device)


def keystream(key: bytes, nonce: bytes, counter: int, count: int, device: torch.device) -> bytes:
    words = torch.empty(-(-count // 4), dtype=torch.int32, device=device)
    ChaCha20(key, nonce, counter, device).fill(words)
    return words.cpu().numpy().tobytes()[:count]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_ciphertexts_of_rfc_8439(case, device):
    plaintext = bytes.fromhex(case["plaintext"])
    key, nonce = bytes.fromhex(case["key"]), bytes.fromhex(case["nonce"])
    mask = keystream(key, nonce, case["counter"], len(plaintext), device)
    assert bytes(a ^ b for a, b in zip(plaintext, mask, strict=True)).hex() == case["ciphertext"]


@settings(deadline=None, max_examples=30)
@given(
    st.binary(min_size=32, max_size=32),
    st.binary(min_size=12, max_size=12),
    st.sampled_from([0, 1, (1 << 31) - 2, 1 << 31, (1 << 32) - 40]),
    st.integers(1, 2000),
)
def test_openssl_gives_the_same_keystream(key, nonce, counter, count):
    """Across the sign of the counter's word too."""
    cipher = Cipher(algorithms.ChaCha20(key, counter.to_bytes(4, "little") + nonce), None)
    expected = cipher.encryptor().update(bytes(count))
    assert keystream(key, nonce, counter, count, torch.device("cpu")) == expected


def test_chunks_join_without_gap_or_repetition(device, monkeypatch):
    whole = keystream(bytes(32), bytes(12), 5, 64 * 40 + 12, device)
    for blocks in (1, 3, 40):
        monkeypatch.setattr(chacha20, "_CPU_BLOCKS", blocks)
        monkeypatch.setattr(chacha20, "_DEVICE_BLOCKS", blocks)
        assert keystream(bytes(32), bytes(12), 5, 64 * 40 + 12, device) == whole


def test_no_block_serves_two_calls(device):
    whole = keystream(bytes(32), bytes(12), 0, 192, device)
    source = ChaCha20(bytes(32), bytes(12), 0, device)
    first, second = (torch.empty(n, dtype=torch.int64, device=device) for n in (9, 8))
    source.fill(first)
    source.fill(second)
    assert first.cpu().numpy().tobytes() == whole[:72]
    assert second.cpu().numpy().tobytes() == whole[128:]


def test_the_counter_never_begins_anew(device):
    source = ChaCha20(bytes(32), bytes(12), MAX_BLOCKS - 2, device)
    two, one = (torch.empty(n, dtype=torch.int32, device=device) for n in (32, 1))
    source.fill(two)
    with pytest.raises(KeystreamReused, match="2\\^32 blocks"):
        source.fill(one)
    late = ChaCha20(bytes(32), bytes(12), MAX_BLOCKS - 1, device)
    before = two.clone()
    with pytest.raises(KeystreamReused):
        late.fill(two)
    assert torch.equal(two, before)


@pytest.mark.parametrize(
    ("key", "nonce", "counter"),
    [(31, 12, 0), (33, 12, 0), (32, 8, 0), (32, 12, -1), (32, 12, 1 << 32)],
)
def test_keys_nonces_and_counters_of_other_sizes_are_refused(key, nonce, counter, device):
    with pytest.raises(ValueError, match="needs a key|counter must lie"):
        ChaCha20(bytes(key), bytes(nonce), counter, device)


def test_fills_refuse_what_they_cannot_fill(stream, device):
    for out in (
        torch.zeros(4, device=device),
        torch.zeros((4, 4), dtype=torch.int64, device=device)[:, 1],
        torch.zeros(4, dtype=torch.int64, device="meta"),
    ):
        with pytest.raises(ValueError, match="fill"):
            stream.fill(out)
    for out in (
        torch.zeros(4, device=device),
        torch.zeros((4, 4), dtype=torch.float64, device=device)[:, 1],
        torch.zeros(4, dtype=torch.float64, device="meta"),
    ):
        with pytest.raises(ValueError, match="fill"):
            stream.fill_normal(out)


def first_words(stream: DeviceStream) -> list[int]:
    out = torch.empty(4, dtype=torch.int64, device=stream.device)
    stream.fill(out)
    return out.tolist()


def test_children_depend_on_labels_alone_and_differ(device):
    def fresh() -> DeviceStream:
        return DeviceStream(bytes(32), "a", device)

    read = fresh()
    first_words(read)
    assert first_words(read.child("x")) == first_words(fresh().child("x"))
    streams = [fresh(), fresh().child("x"), fresh().child("y"), fresh().child("x").child("x")]
    streams += [DeviceStream(bytes(32), "b", device), DeviceStream(bytes([1] * 32), "a", device)]
    assert len({tuple(first_words(stream)) for stream in streams}) == len(streams)


def test_a_stream_seeds_a_new_one_each_time(device):
    source = Stream(bytes(32), "noise")
    words = [tuple(first_words(DeviceStream.of(source, device))) for _ in range(3)]
    assert len(set(words)) == 3
    again = Stream(bytes(32), "noise")
    assert tuple(first_words(DeviceStream.of(again, device))) == words[0]


def test_copies_are_refused_and_printing_shows_the_label_alone(stream):
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps, lambda s: s.__getstate__()):
        with pytest.raises(KeystreamReused):
            attempt(stream)
    assert repr(stream) == "DeviceStream(label='test')"
    assert not hasattr(stream, "__dict__")


@pytest.mark.parametrize("use", [first_words, lambda s: s.child("a")])
def test_a_forked_process_cannot_repeat_the_keystream(use):
    stream = DeviceStream(bytes(32), "fork", torch.device("cpu"))
    child = os.fork()
    if child == 0:
        try:
            use(stream)
        except KeystreamReused:
            os._exit(42)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
    use(stream)


@pytest.mark.parametrize("seed", [b"", bytes(31), bytearray(32), "0" * 32])
def test_seeds_and_labels_have_no_default(seed, device):
    with pytest.raises(ValueError, match="32 bytes"):
        DeviceStream(seed, "label", device)
    with pytest.raises(ValueError, match="label"):
        DeviceStream(bytes(32), "", device)


def test_normals_are_standard_and_independent(stream, device):
    """KS and correlations at 10^-4 each; 2/3 and 3/2 are rejected."""
    out = torch.empty(200_001, dtype=torch.float64, device=device)
    stream.fill_normal(out)
    drawn = out.cpu().numpy()
    assert len(np.unique(drawn)) == len(drawn)
    assert stats.kstest(drawn, "norm").pvalue > 1e-4
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(drawn * wrong, "norm").pvalue < 1e-10
    half = len(drawn) // 2 + 1
    cosines, sines = drawn[: half - 1], drawn[half:]
    assert stats.pearsonr(cosines, sines).pvalue > 1e-4
    assert stats.pearsonr(cosines**2, sines**2).pvalue > 1e-4
    beyond = int((abs(drawn) > 4).sum())
    assert stats.binomtest(beyond, len(drawn), 2 * stats.norm.sf(4)).pvalue > 1e-4


@pytest.mark.parametrize(
    ("word", "following", "radius"),
    [
        (0, 0, NORMAL_CUT),
        (-1, 1 << 62, math.sqrt(-2 * math.log(0.75 * 2**-63))),
        (3, 1 << 62, math.sqrt(-2 * math.log(3.25 * 2**-63))),
        (-(1 << 63), 0, 0.0),
    ],
)
def test_short_words_are_continued(stream, device, monkeypatch, word, following, radius):
    def fill(self, out):
        out[:] = word if len(out) > 1 else following

    monkeypatch.setattr(DeviceStream, "fill", fill)
    out = torch.empty(2, dtype=torch.float64, device=device)
    stream.fill_normal(out)
    assert float(out.norm()) == pytest.approx(radius, rel=1e-14, abs=1e-7)
