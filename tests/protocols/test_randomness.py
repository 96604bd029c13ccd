"""The keystream, its derivation and everything drawn from it.

Statistical tests run under a fixed seed; the stated false-alarm probability is that of the choice
of the seed. Each rejects a wrong generator with the statistic that accepts the right one.
"""

import contextlib
import copy
import hashlib
import hmac
import inspect
import json
import math
import os
import pickle
import re
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from protocols.errors import KeystreamReused
from protocols.randomness import NORMAL_CUT, NORMAL_DENSE, Keystream, Stream, hkdf_sha256

ROOT = Path(__file__).parents[2]
VECTORS = ROOT / "tests" / "vectors"
FIELD = (1 << 61) - 1
NIST = json.loads((VECTORS / "nist_sp800_38a_aes_ctr.json").read_text())["cases"]
HKDF = json.loads((VECTORS / "rfc5869_hkdf_sha256.json").read_text())["cases"]
OWN = json.loads((VECTORS / "stream_v1.json").read_text())

seeds = st.binary(min_size=32, max_size=32)
labels = st.text(min_size=1, max_size=20)


@pytest.fixture
def stream() -> Stream:
    return Stream(bytes(range(32)), "test")


# Vectors


@pytest.mark.parametrize("case", NIST, ids=lambda case: case["name"])
def test_keystream_gives_the_nist_ciphertexts(case):
    plaintext = bytes.fromhex(case["plaintext"])
    mask = bytearray(len(plaintext))
    Keystream(bytes.fromhex(case["key"]), bytes.fromhex(case["counter"])).write_into(
        memoryview(mask)
    )
    assert bytes(a ^ b for a, b in zip(mask, plaintext, strict=True)).hex() == case["ciphertext"]


@pytest.mark.parametrize("case", HKDF, ids=lambda case: case["name"])
def test_hkdf_gives_the_rfc_5869_keys(case):
    ikm, salt, info = (bytes.fromhex(case[name]) for name in ("ikm", "salt", "info"))
    assert hkdf_sha256(ikm, salt=salt, info=info, length=case["length"]).hex() == case["okm"]


def test_stream_outputs_are_frozen():
    def fresh() -> Stream:
        return Stream(bytes.fromhex(OWN["seed"]), OWN["label"])

    later = fresh()
    later.bytes(65531)
    assert fresh().bytes(64).hex() == OWN["first_64_bytes"]
    assert later.bytes(16).hex() == OWN["bytes_65531_to_65547"]
    assert fresh().child("a").bytes(32).hex() == OWN["child_a_first_32_bytes"]
    grandchild = fresh().child("a").child("b")
    assert grandchild.bytes(32).hex() == OWN["grandchild_a_b_first_32_bytes"]
    assert fresh().integers(10, 12).tolist() == OWN["integers_bound_10"]
    large = fresh().integers((1 << 62) + 1, 6).tolist()
    assert large == OWN["integers_bound_2_62_plus_1"]
    assert fresh().ring_elements(32, 4).tolist() == OWN["ring_32"]
    assert fresh().ring_elements(64, 4).tolist() == OWN["ring_64"]
    assert fresh().field_elements(FIELD, 4).tolist() == OWN["field_61"]
    assert fresh().bernoulli(0.3, 16).astype(int).tolist() == OWN["bernoulli_0.3"]
    assert fresh().permutation(10).tolist() == OWN["permutation_10"]
    normals = fresh().standard_normal(5)
    np.testing.assert_allclose(normals, OWN["standard_normal"], rtol=1e-12)


def test_frozen_outputs_follow_from_the_documented_derivation():
    def expand(secret: bytes, label: str) -> bytes:
        key = hmac.new(bytes(32), secret, hashlib.sha256).digest()
        info, out, block = b"privlm/protocols/stream/v1\x00" + label.encode(), b"", b""
        for index in (1, 2, 3):
            block = hmac.new(key, block + info + bytes([index]), hashlib.sha256).digest()
            out += block
        return out[:80]

    def keystream(derived: bytes, count: int) -> bytes:
        ecb = Cipher(algorithms.AES(derived[:32]), modes.ECB()).encryptor()
        start = int.from_bytes(derived[32:48], "big")
        blocks = (((start + i) % (1 << 128)).to_bytes(16, "big") for i in range(count // 16))
        return b"".join(ecb.update(block) for block in blocks)

    derived = expand(bytes.fromhex(OWN["seed"]), OWN["label"])
    assert keystream(derived, 64).hex() == OWN["first_64_bytes"]
    child = expand(derived[48:], "a")
    assert keystream(child, 32).hex() == OWN["child_a_first_32_bytes"]


def test_frozen_normals_follow_from_the_documented_transform():
    words = np.frombuffer(bytes.fromhex(OWN["first_64_bytes"])[:48], "<i8")
    radii = [math.sqrt(-2 * math.log(abs(int(word)) / 2**63)) for word in words[:3]]
    angles = [2 * math.pi * int(word) / 2**64 for word in words[3:]]
    cosines = [r * math.cos(angle) for r, angle in zip(radii, angles, strict=True)]
    sines = [r * math.sin(angle) for r, angle in zip(radii, angles, strict=True)]
    np.testing.assert_allclose(OWN["standard_normal"], [*cosines, *sines[:2]], rtol=1e-12)


# Misuse


def test_nothing_but_stream_fresh_asks_the_operating_system():
    asks = re.compile(
        r"urandom\(|getrandom|SystemRandom|/dev/u?random|uuid[14]\(|PrivateKey\.generate"
        r"|^\s*(?:import|from)\s+secrets\b|(?:default_rng|SeedSequence|RandomState)\(\s*\)",
        re.MULTILINE,
    )
    found = [
        (path.relative_to(ROOT).as_posix(), match.group())
        for package in ("protocols", "privlm", "attacks")
        for path in sorted((ROOT / package).rglob("*.py"))
        for match in asks.finditer(path.read_text())
    ]
    assert found == [("protocols/randomness.py", "urandom(")]
    assert "urandom" in inspect.getsource(Stream.fresh)


def test_neither_seed_nor_label_has_a_default():
    parameters = inspect.signature(Stream).parameters.values()
    assert all(p.default is inspect.Parameter.empty for p in parameters)
    assert inspect.signature(Stream.fresh).parameters["label"].default is inspect.Parameter.empty


@pytest.mark.parametrize("seed", [b"", bytes(31), bytes(33), bytearray(32), "0" * 32, 7])
def test_a_seed_has_32_bytes(seed):
    with pytest.raises(ValueError, match="32 bytes"):
        Stream(seed, "label")


def test_a_label_is_not_empty():
    with pytest.raises(ValueError, match="label"):
        Stream(bytes(32), "")
    with pytest.raises(ValueError, match="label"):
        Stream(bytes(32), "a").child("")


def test_copies_are_refused(stream):
    for attempt in (
        copy.copy,
        copy.deepcopy,
        pickle.dumps,
        lambda s: pickle.dumps(s, 0),
        lambda s: s.__getstate__(),
    ):
        with pytest.raises(KeystreamReused):
            attempt(stream)


def test_printing_shows_the_label_alone():
    seed = bytes(range(100, 132))
    stream = Stream(seed, "visible")
    for text in (repr(stream), str(stream), f"{stream}"):
        assert text == "Stream(label='visible')"
    assert not hasattr(stream, "__dict__")


@pytest.mark.parametrize(
    "use",
    [
        lambda s: s.bytes(1),
        lambda s: s.child("a"),
        lambda s: s.integers(3, 1),
        lambda s: s.standard_normal(1),
    ],
)
def test_a_forked_process_cannot_repeat_the_keystream(stream, use):
    child = os.fork()
    if child == 0:
        try:
            use(stream)
        except KeystreamReused:
            os._exit(42)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
    use(stream)


def test_a_seed_drawn_before_forking_serves_the_fork(stream):
    seed = stream.bytes(32)
    child = os.fork()
    if child == 0:
        os._exit(42 if len(Stream(seed, "worker").bytes(1)) == 1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42


def test_threads_that_share_a_stream_never_get_the_same_bytes(stream):
    # Which bytes they get is left to chance, and one of them may be refused.
    def read(_):
        with contextlib.suppress(RuntimeError):
            return stream.bytes(100_000)
        return b""

    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(read, range(60)))
    blocks = [part[i : i + 16] for part in parts for i in range(0, len(part) - 15, 16)]
    assert len(blocks) > 6000
    assert len(set(blocks)) == len(blocks)


def test_fresh_streams_differ():
    assert Stream.fresh("a").bytes(32) != Stream.fresh("a").bytes(32)


def test_fill_refuses_what_it_cannot_fill_uniformly(stream):
    frozen = np.zeros(4, np.uint8)
    frozen.flags.writeable = False
    for array in (
        np.zeros(4),
        np.zeros((4, 4), np.int64)[:, 1],
        frozen,
        np.zeros(3, np.bool_),
        torch.zeros(4),
        torch.zeros((4, 4), dtype=torch.int64).t()[1:],
        torch.zeros(4, dtype=torch.int64, device="meta"),
    ):
        with pytest.raises(ValueError, match="fill"):
            stream.fill(array)


@pytest.mark.parametrize(
    "draw",
    [
        lambda s: s.integers(0, 1),
        lambda s: s.integers((1 << 63) + 1, 1),
        lambda s: s.field_elements(1, 1),
        lambda s: s.field_elements(1 << 64, 1),
        lambda s: s.ring_elements(16, 1),
        lambda s: s.bernoulli(1.5, 1),
        lambda s: s.bernoulli(-0.1, 1),
        lambda s: s.bernoulli(math.nan, 1),
        lambda s: s.permutation(-1),
        lambda s: s.bytes(-1),
    ],
)
def test_arguments_out_of_range_are_refused(stream, draw):
    with pytest.raises(ValueError, match=r"must lie|must not|bits"):
        draw(stream)


# Properties


@given(seeds, labels, st.lists(st.integers(0, 70_000), max_size=6))
def test_how_a_keystream_is_cut_does_not_change_it(seed, label, cuts):
    whole = Stream(seed, label).bytes(sum(cuts))
    stream = Stream(seed, label)
    assert b"".join(stream.bytes(cut) for cut in cuts) == whole


@given(seeds, labels, labels, st.integers(0, 1000))
def test_a_child_depends_on_labels_alone(seed, label, child_label, read_before):
    stream = Stream(seed, label)
    expected = stream.child(child_label).bytes(32)
    stream.bytes(read_before)
    stream.child("other")
    assert stream.child(child_label).bytes(32) == expected
    assert Stream(seed, label).child(child_label).bytes(32) == expected


@given(seeds, labels, labels)
def test_labels_and_children_are_separate_domains(seed, first, second):
    stream = Stream(seed, first)
    outputs = [
        stream.bytes(32),
        Stream(seed, first).child(first).bytes(32),
        Stream(seed, first).child(first).child(first).bytes(32),
        Stream(seed, first + "/" + second).bytes(32),
        Stream(seed, first).child(second + "2").bytes(32),
    ]
    assert len(set(outputs)) == len(outputs)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_torch_and_numpy_are_filled_alike(dtype):
    tensor = torch.empty((3, 5), dtype=dtype)
    Stream(bytes(32), "x").fill(tensor)
    array = np.empty((3, 5), tensor.numpy().dtype)
    Stream(bytes(32), "x").fill(array)
    assert tensor.numpy().tobytes() == array.tobytes() == Stream(bytes(32), "x").bytes(array.nbytes)


@pytest.mark.parametrize("shape", [(), 0, 1, (2, 3), (0, 4), 8193])
def test_shapes(stream, shape):
    expected = np.empty(shape).shape
    for drawn in (
        stream.integers(7, shape),
        stream.integers(8, shape),
        stream.field_elements(FIELD, shape),
        stream.bernoulli(0.4, shape),
        stream.bernoulli(1.0, shape),
        stream.standard_normal(shape),
        stream.ring_elements(64, shape),
    ):
        assert tuple(drawn.shape) == expected


@given(st.integers(1, 1 << 63), st.integers(0, 40))
def test_integers_stay_below_the_bound(bound, count):
    drawn = Stream(bytes(32), "bound").integers(bound, count)
    assert drawn.dtype == np.int64
    assert all(0 <= value < bound for value in drawn.tolist())


@pytest.mark.parametrize("draw", ["field_elements", "integers"])
def test_rejection_does_not_depend_on_how_the_draw_is_cut(draw):
    # Half of the words are rejected at this bound.
    bound = (1 << 62) + (1 << 61) + 1
    whole = getattr(Stream(bytes(32), "cut"), draw)(bound, 20_000)
    stream = Stream(bytes(32), "cut")
    parts = [getattr(stream, draw)(bound, count) for count in (1, 9_000, 10_999)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


@given(st.integers(0, 300))
def test_permutations_permute(length):
    drawn = Stream(bytes(32), "order").permutation(length)
    np.testing.assert_array_equal(np.sort(drawn), np.arange(length))


@pytest.mark.parametrize("draw", ["integers", "field_elements"])
def test_a_bound_may_be_an_integer_of_numpy(draw):
    for kind in (np.int8, np.int64, np.uint64):
        drawn = getattr(Stream(bytes(32), "b"), draw)(kind(100), 50)
        expected = getattr(Stream(bytes(32), "b"), draw)(100, 50)
        np.testing.assert_array_equal(drawn, expected)
    with pytest.raises(TypeError):
        getattr(Stream(bytes(32), "b"), draw)(2.5, 1)


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
def test_every_byte_of_a_subclass_of_arrays_is_filled():
    matrix = np.asmatrix(np.zeros((4, 64), np.int64))
    Stream(bytes(32), "x").fill(matrix)
    assert matrix.tobytes() == Stream(bytes(32), "x").bytes(4 * 64 * 8)


@pytest.mark.parametrize(
    "draw",
    [
        lambda s, n: s.integers(10, n),
        lambda s, n: s.field_elements(FIELD, n),
        lambda s, n: s.bernoulli(0.3, n),
        lambda s, n: s.standard_normal(n),
    ],
    ids=["integers", "field_elements", "bernoulli", "standard_normal"],
)
def test_drawing_takes_constant_memory_beyond_the_output(stream, draw):
    tracemalloc.start()
    drawn = draw(stream, 1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < drawn.nbytes + (1 << 20)


def test_filling_takes_constant_memory(stream):
    array = np.empty(1 << 24, np.uint8)
    tracemalloc.start()
    stream.fill(array)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 16


# Statistics; every false-alarm probability is 10^-4 unless stated.


def uniformity_p_value(values: np.ndarray, cells: int) -> float:
    return float(stats.chisquare(np.bincount(values.astype(np.int64), minlength=cells)).pvalue)


def test_integers_are_unbiased_and_a_modulo_bias_is_seen(stream):
    # 2^63 mod 3 = 2: taking the top of a power of two modulo a large bound is where bias shows.
    bound = 3 << 61  # words modulo this hit the lower third twice as often as the others
    words = stream.child("biased").ring_elements(64, 3000).numpy().view(np.uint64)
    biased = words % np.uint64(bound)
    honest = stream.integers(bound, 3000)
    third = bound // 3
    assert uniformity_p_value(honest // third, 3) > 1e-4
    assert uniformity_p_value(biased // np.uint64(third), 3) < 1e-10
    assert uniformity_p_value(stream.integers(3, 30_000), 3) > 1e-4


def test_field_elements_are_unbiased_in_every_part(stream):
    drawn = stream.field_elements(FIELD, 64_000)
    assert int(drawn.max()) < FIELD
    for shift in (0, 29, 57):
        assert uniformity_p_value((drawn >> np.uint64(shift)) & np.uint64(15), 16) > 1e-4
    small = stream.field_elements(13, 26_000)
    assert uniformity_p_value(small, 13) > 1e-4
    # Four bits folded into 13 values, the bias that rejection averts.
    folded = (stream.integers(16, 26_000)) % 13
    assert uniformity_p_value(folded, 13) < 1e-10


@pytest.mark.parametrize("probability", [0.5, 0.01, 1 / 3, 0.999])
def test_coins_have_their_probability(stream, probability):
    n = 200_000
    heads = int(stream.bernoulli(probability, n).sum())
    assert stats.binomtest(heads, n, probability).pvalue > 1e-4
    wrong = probability + 6 * math.sqrt(probability * (1 - probability) / n)
    assert stats.binomtest(heads, n, min(wrong, 1.0)).pvalue < 1e-2


def test_coins_at_the_ends(stream):
    assert not stream.bernoulli(0.0, 1000).any()
    assert stream.bernoulli(1.0, 1000).all()
    assert not stream.bernoulli(5e-324, 1000).any()
    # 1 - 2^-53 has no digits beyond 64, and is not rounded up to certainty.
    assert stream.bernoulli(1 - 2.0**-53, 1000).all()


def test_ties_between_coin_and_probability_are_settled_by_the_digits_that_follow():
    class Zeros(Stream):
        """Words that tie with a probability below 2^-64, then words that decide."""

        __slots__ = ("calls",)

        def _words(self, count):
            self.calls = getattr(self, "calls", 0) + 1
            return np.full(count, 0 if self.calls == 1 else self.calls << 60, np.uint64)

    # 3/4 · 2^-64: the first word ties at 0, the second is compared with 3/4 · 2^64.
    assert Zeros(bytes(32), "tie").bernoulli(0.75 * 2.0**-64, 5).all()
    assert not Zeros(bytes(32), "tie").bernoulli(2.0**-67, 5).any()


def test_the_digits_that_follow_may_also_say_no():
    class Words(Stream):
        """A tie, then a word of 7/8 · 2^64."""

        __slots__ = ("calls",)

        def _words(self, count):
            self.calls = getattr(self, "calls", 0) + 1
            return np.full(count, 0 if self.calls == 1 else 7 << 61, np.uint64)

    assert not Words(bytes(32), "tie").bernoulli(0.75 * 2.0**-64, 5).any()


def test_the_last_whole_multiple_of_the_bound_is_where_rejection_begins():
    class Words(Stream):
        """The words around the limit for 3 (2^64 - 1 = 3k is rejected), then small ones."""

        __slots__ = ("calls",)

        def fill(self, array):
            top = [2**64 - 1, 2**64 - 2, 2**64 - 3, 2**64 - 4]
            self.calls = getattr(self, "calls", 0) + 1
            array[...] = np.array((top if self.calls == 1 else [5] * 4)[: array.size], np.uint64)

    assert Words(bytes(32), "limit").integers(3, 4).tolist() == [2, 1, 0, 2]


def test_permutations_are_uniform_and_a_biased_shuffle_is_seen(stream):
    def code(order) -> int:
        return int(np.dot(order, [1, 4, 16, 64]))

    n = 6000
    honest = np.array([code(stream.permutation(4)) for _ in range(n)])
    counts = np.unique(honest, return_counts=True)[1]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-4
    # The classic error: swap every place with any place.
    biased = []
    for swaps in stream.integers(4, (n, 4)):
        order = [0, 1, 2, 3]
        for i, j in enumerate(swaps):
            order[i], order[j] = order[j], order[i]
        biased.append(code(order))
    assert stats.chisquare(np.unique(biased, return_counts=True)[1]).pvalue < 1e-10


def test_a_permutation_with_equal_keys_is_drawn_anew():
    class Repeating(Stream):
        __slots__ = ("draws",)

        def _words(self, count):
            self.draws = getattr(self, "draws", 0) + 1
            return np.zeros(count, np.uint64) if self.draws < 3 else super()._words(count)

    stream = Repeating(bytes(32), "repeat")
    np.testing.assert_array_equal(np.sort(stream.permutation(50)), np.arange(50))
    assert stream.draws == 3


def test_normals_are_standard_and_another_scale_is_seen(stream):
    drawn = stream.standard_normal(50_001)
    assert stats.kstest(drawn, "norm").pvalue > 1e-4
    assert stats.kstest(drawn, "norm", args=(0.0, 1.1)).pvalue < 1e-10
    assert stats.kstest(drawn * 1.1, "norm").pvalue < 1e-10
    # The two halves of each pair are independent, as are their magnitudes. A block of 2^15 holds
    # the cosines of its pairs, then their sines.
    cosines, sines = drawn[: 1 << 14], drawn[1 << 14 : 1 << 15]
    assert stats.pearsonr(cosines, sines).pvalue > 1e-4
    assert stats.pearsonr(cosines**2, sines**2).pvalue > 1e-4
    assert stats.pearsonr(cosines**2, np.roll(cosines, 1) ** 2).pvalue > 1e-4
    # One word for radius and angle would pass every test of one coordinate.
    assert stats.pearsonr(cosines**2, cosines**2 + sines**2).pvalue < 1e-10


def test_moments_and_tails_of_normals(stream):
    """A million draws: each bound is five standard errors, false alarm below 10^-5 in all."""
    n = 1_000_000
    drawn = stream.standard_normal(n)
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((drawn**power).mean() - expected) < 5 * math.sqrt(variance / n)
    for wrong in (2 / 3, 3 / 2):
        assert abs(((wrong * drawn) ** 2).mean() - 1) > 5 * math.sqrt(2 / n)
    for cut in (3.0, 4.0, 4.5):
        beyond = int((abs(drawn) > cut).sum())
        assert stats.binomtest(beyond, n, 2 * stats.norm.sf(cut)).pvalue > 1e-6


class Given(Stream):
    """Gives the words it is told to: radii, angles, and what continues short words."""

    __slots__ = ()
    radii = angles = following = 0

    def fill(self, array):
        half = array.size // 2
        if array.size == 1:
            array[:] = type(self).following
        else:
            array[:half], array[half:] = type(self).radii, type(self).angles


@pytest.fixture
def given_words():
    return Given(bytes(32), "given")


@pytest.mark.parametrize(
    ("word", "radius"), [(0, NORMAL_CUT), (-(1 << 63), 0.0), ((1 << 63) - 1, 0.0)]
)
def test_normals_are_finite_at_the_extreme_words(given_words, word, radius):
    Given.radii, Given.following = word, 0
    for angle in (-(1 << 63), (1 << 63) - 1, 0, 1, 1 << 62, -(1 << 62)):
        Given.angles = angle
        drawn = given_words.standard_normal(2)
        assert math.hypot(*drawn) == pytest.approx(radius, rel=1e-15, abs=1e-7)


def test_a_short_word_is_continued_by_another(given_words):
    """u = |i + k 2^-64| 2^-63, against the logarithm in 40 digits; a long word is not continued."""
    Given.angles = 0
    for word in (0, 1, -1, 5, -5, 3**20, 1 - (1 << 44)):
        for following in (1, -1, 1 << 62, -(1 << 63), 12345678901234567):
            Given.radii, Given.following = word, following
            with mpmath.workdps(40):
                uniform = abs(word + mpmath.mpf(following) / 2**64) / 2**63
                expected = float(mpmath.sqrt(-2 * mpmath.log(uniform)))
            drawn = given_words.standard_normal(2)[0]
            assert drawn == pytest.approx(expected, rel=1e-14)
            assert drawn <= NORMAL_CUT
    Given.radii, Given.following = 1 << 44, 0
    long = given_words.standard_normal(2)[0]
    Given.following = 1 << 62
    assert given_words.standard_normal(2)[0] == long


def test_the_tails_of_normals_are_dense_to_where_the_constant_says(given_words):
    """Neighbouring words give radii less than 2^-43 apart; uniforms of 53 bits end at 8.57."""
    Given.angles = 0
    # |i + k 2^-64| 2^-63 = 2^-83 at i = 0 and k = 2^44.
    Given.radii, Given.following = 0, 1 << 44
    edge = given_words.standard_normal(2)[0]
    assert edge == pytest.approx(NORMAL_DENSE, rel=1e-15)
    Given.following = (1 << 44) - 1
    assert 0 < given_words.standard_normal(2)[0] - edge < 2.0**-43
    for word in (1 << 44, 1 << 50, 1 << 60):
        Given.radii = word
        near = given_words.standard_normal(2)[0]
        Given.radii = word + (1 << max(0, word.bit_length() - 53))
        assert 0 <= near - given_words.standard_normal(2)[0] < 2.0**-43


def test_short_words_keep_their_probability():
    """The continuation is uniform around its word: KS at 10^-4, and against [i, i + 1) it fails."""
    stream = Stream(bytes(range(32)), "short")
    words = np.full(20_000, 3, np.int64)
    uniforms = np.empty(words.size)
    stream._uniforms_into(uniforms, words)
    scaled = uniforms * 2.0**63
    assert stats.kstest(scaled, "uniform", args=(2.5, 1.0)).pvalue > 1e-4
    assert stats.kstest(scaled, "uniform", args=(3.0, 1.0)).pvalue < 1e-10


@pytest.mark.parametrize("odd", [1, 2, 3, 32767, 32768, 32769, 65537])
def test_every_place_of_an_array_gets_its_own_normal(odd):
    drawn = Stream(bytes(32), "places").standard_normal(odd)
    assert len(np.unique(drawn)) == odd
    filled = torch.full((odd,), torch.nan, dtype=torch.float64)
    Stream(bytes(32), "places").fill_normal(filled)
    np.testing.assert_array_equal(filled.numpy(), drawn)


def test_normals_fill_float64_only(stream):
    frozen = np.zeros(4)
    frozen.flags.writeable = False
    for array in (
        np.zeros(4, np.float32),
        np.zeros(4, np.int64),
        np.zeros((4, 4))[:, 1],
        frozen,
        torch.zeros(4),
        torch.zeros(4, dtype=torch.float64, device="meta"),
    ):
        with pytest.raises(ValueError, match="fill"):
            stream.fill_normal(array)


def test_streams_of_different_labels_are_independent(stream):
    streams = [stream, stream.child("a"), stream.child("b"), Stream(bytes(range(32)), "test2")]
    words = np.stack([s.ring_elements(64, 4096).numpy().view(np.uint8) for s in streams])
    bits = np.unpackbits(words, axis=1)
    for i in range(len(streams)):
        for j in range(i):
            agreeing = int((bits[i] == bits[j]).sum())
            assert stats.binomtest(agreeing, bits.shape[1]).pvalue > 1e-4
    same = Stream(bytes(range(32)), "test").ring_elements(64, 4096).numpy().view(np.uint8)
    agreeing = int((bits[0] == np.unpackbits(same)).sum())
    assert stats.binomtest(agreeing, bits.shape[1]).pvalue < 1e-10
