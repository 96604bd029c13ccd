"""Messages survive the wire; nothing else does, and refusing it costs little."""

import random
import tracemalloc
from enum import Enum
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta

from protocols.errors import (
    LocalProtocolError,
    MalformedMessage,
    NonCanonicalElement,
    OversizedMessage,
    ProtocolError,
    RemoteProtocolError,
    UnexpectedMessage,
    WrongVersion,
)
from protocols.randomness import Stream
from protocols.ring import FIELD_61, Z_2_32, Z_2_64
from protocols.wire import (
    HEADER_BYTES,
    Message,
    Record,
    RingVector,
    decode,
    encode,
    pack_vector,
    unpack_vector,
)

LIMIT = 1 << 16
Key = Annotated[bytes, Meta(min_length=32, max_length=32)]


class Entry(Record, frozen=True):
    index: Annotated[int, Meta(ge=0, le=1000)]
    name: Annotated[str, Meta(max_length=40)]


class Hello(Message, frozen=True, tag="test/hello"):
    key: Key
    entries: Annotated[list[Entry], Meta(max_length=50)] = []  # noqa: RUF012
    weights: Annotated[dict[Annotated[str, Meta(max_length=9)], float], Meta(max_length=9)] = {}  # noqa: RUF012
    pair: tuple[int, bool] | None = None


class Bye(Message, frozen=True):
    vector: RingVector


entries = st.builds(Entry, index=st.integers(0, 1000), name=st.text(max_size=40))
hellos = st.builds(
    Hello,
    key=st.binary(min_size=32, max_size=32),
    entries=st.lists(entries, max_size=5),
    weights=st.dictionaries(st.text(max_size=9), st.floats(allow_nan=False), max_size=9),
    pair=st.none() | st.tuples(st.integers(-(2**63), 2**63), st.booleans()),
)
vectors = st.integers(0, 9).map(
    lambda n: Bye(vector=pack_vector(Z_2_64, Z_2_64.random(n, Stream(bytes(32), "v"))))
)


@given(hellos | vectors)
def test_messages_come_back(message):
    data = encode(message)
    assert decode(data, Hello, Bye, max_bytes=LIMIT) == message
    assert encode(decode(data, Hello, Bye, max_bytes=len(data))) == data
    for prefix in (0, 3, HEADER_BYTES - 1, HEADER_BYTES, len(data) - 1):
        with pytest.raises(MalformedMessage):
            decode(data[:prefix], Hello, Bye, max_bytes=LIMIT)
    with pytest.raises(MalformedMessage):
        decode(data + b"\0", Hello, Bye, max_bytes=LIMIT)
    with pytest.raises(OversizedMessage):
        decode(data, Hello, Bye, max_bytes=len(data) - 1)
    with pytest.raises(WrongVersion):
        decode(data[:4] + b"\2" + data[5:], Hello, Bye, max_bytes=LIMIT)
    with pytest.raises(UnexpectedMessage):
        decode(data, max_bytes=LIMIT)


def test_the_header_is_as_documented():
    data = encode(Hello(key=bytes(32)))
    assert data[:5] == b"plm\x00\x01"
    assert int.from_bytes(data[13:21], "big") == len(data) - 21
    assert HEADER_BYTES == 21


def test_another_message_is_unexpected_even_with_the_same_fields():
    class Twin(Message, frozen=True, tag="test/twin"):
        key: Key

    class Other(Message, frozen=True, tag="test/other"):
        key: Key

    data = encode(Twin(key=bytes(32)))
    with pytest.raises(UnexpectedMessage):
        decode(data, Other, max_bytes=LIMIT)
    # The type in the header is changed to fit: the tag in the body gives it away.
    forged = encode(Other(key=bytes(32)))[:13] + data[13:]
    with pytest.raises(MalformedMessage):
        decode(forged, Other, max_bytes=LIMIT)


def framed(body: bytes, like: Message) -> bytes:
    return encode(like)[:13] + len(body).to_bytes(8, "big") + body


HELLO = Hello(key=bytes(32))
TAG = msgspec.msgpack.encode("test/hello")
KEY = msgspec.msgpack.encode(bytes(32))
BOMBS = {
    "nested arrays": b"\x95" + TAG + KEY + b"\x91" * 60_000,
    "nested in place of the key": b"\x95" + TAG + b"\x91" * 60_000,
    "nested maps": b"\x95" + TAG + KEY + b"\x90" + b"\x81\xa1a" * 20_000,
    "nested in place of everything": b"\x91" * 60_000,
    "2^32 entries declared": b"\x95" + TAG + KEY + b"\xdd\xff\xff\xff\xff",
    "2^26 entries declared": b"\x95" + TAG + KEY + b"\xdd\x03\xff\xff\xff",
    "2^32 weights declared": b"\x95" + TAG + KEY + b"\x90\xdf\xff\xff\xff\xff",
    "2^32 bytes declared": b"\x95" + TAG + b"\xc6\xff\xff\xff\xff",
    "2^32 characters declared": b"\x95" + TAG + KEY + b"\x91\x92\x01\xdb\xff\xff\xff\xff",
    "2^32 fields declared": b"\xdd\xff\xff\xff\xff" + TAG + KEY,
    "extension type": b"\x95" + TAG + b"\xc9\x00\x00\x00\x20\x01" + bytes(32),
    "not UTF-8": b"\x95" + TAG + KEY + b"\x91\x92\x01\xa1\xff\x80\xc0",
    "entries over their bound": b"\x95" + TAG + KEY + b"\xdc\x00\x33" + b"\x92\x01\xa0" * 51,
    "unknown field": b"\x96" + TAG + KEY + b"\x90\x80\xc0\xc0",
    "short key": b"\x95" + TAG + b"\xc4\x1f" + bytes(31) + b"\x90\x80\xc0",
    "index out of range": b"\x95" + TAG + KEY + b"\x91\x92\xff\xa0\x80\xc0",
    "nothing": b"",
    "trailing": b"\x95" + TAG + KEY + b"\x90\x80\xc0" + b"\xc0",
    "reserved byte": b"\xc1",
}


@pytest.mark.parametrize("body", BOMBS.values(), ids=BOMBS)
def test_bombs_are_refused_cheaply(body):
    data = framed(body, HELLO)
    tracemalloc.start()
    with pytest.raises(MalformedMessage):
        decode(data, Hello, max_bytes=LIMIT)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 17


ALIASES = {
    "longer length of bytes": b"\x95" + TAG + b"\xc6\x00\x00\x00\x20" + bytes(32) + b"\x90\x80\xc0",
    "longer count of fields": b"\xdd\x00\x00\x00\x05" + TAG + KEY + b"\x90\x80\xc0",
    "longer tag": b"\x95\xdb\x00\x00\x00\x0atest/hello" + KEY + b"\x90\x80\xc0",
    "fields left out": b"\x92" + TAG + KEY,
    "repeated key": b"\x95"
    + TAG
    + KEY
    + b"\x90\x82\xa1a\xcb"
    + bytes(8)
    + b"\xa1a\xcb"
    + bytes(8)
    + b"\xc0",
    "unsorted keys": b"\x95"
    + TAG
    + KEY
    + b"\x90\x82\xa1b\xcb"
    + bytes(8)
    + b"\xa1a\xcb"
    + bytes(8)
    + b"\xc0",
    "integer for a float": b"\x95" + TAG + KEY + b"\x90\x81\xa1a\x00\xc0",
    "float of 32 bits": b"\x95" + TAG + KEY + b"\x90\x81\xa1a\xca" + bytes(4) + b"\xc0",
    "longer integer": b"\x95" + TAG + KEY + b"\x90\x80\x92\xd3" + bytes(7) + b"\x01\xc3",
}


@pytest.mark.parametrize("body", ALIASES.values(), ids=ALIASES)
def test_a_message_has_one_encoding(body):
    msgspec.msgpack.decode(body, type=Hello)  # the parser alone takes it
    with pytest.raises(MalformedMessage, match="one encoding"):
        decode(framed(body, HELLO), Hello, max_bytes=LIMIT)


def test_equal_messages_have_equal_bytes():
    first = Hello(key=bytes(32), weights={"a": 1.0, "b": 2.0})
    second = Hello(key=bytes(32), weights={"b": 2.0, "a": 1.0})
    assert encode(first) == encode(second)
    nan = Hello(key=bytes(32), weights={"a": float("nan")})
    assert encode(decode(encode(nan), Hello, max_bytes=LIMIT)) == encode(nan)


class Colour(Enum):
    RED = "red"


class Choice(Message, frozen=True, tag="test/choice"):
    colour: Colour
    kind: Literal["x"]


def test_errors_name_the_field_and_never_its_content():
    good = Choice(colour=Colour.RED, kind="x")
    for place, fields in enumerate(
        (
            ("s3cret", "red", "x"),
            ("test/choice", "s3cret - at `$`", "x"),
            ("test/choice", "red", "s3cret"),
        )
    ):
        body = msgspec.msgpack.encode(fields)
        with pytest.raises(MalformedMessage) as error:
            decode(framed(body, good), Choice, max_bytes=LIMIT)
        assert "s3cret" not in str(error.value)
        assert f"$[{place}]" in str(error.value)


def test_messages_that_share_a_tag_are_refused():
    class Twin(Message, frozen=True, tag="test/hello"):
        key: Key

    with pytest.raises(TypeError, match="one tag"):
        decode(encode(HELLO), Hello, Twin, max_bytes=LIMIT)
    assert decode(encode(HELLO), Hello, Hello, max_bytes=LIMIT) == HELLO


def test_a_part_that_would_print_is_refused():
    class Loud(msgspec.Struct, frozen=True):
        secret: Key

    loud = msgspec.defstruct("Holder", [("part", Loud)], bases=(Message,), frozen=True)
    with pytest.raises(TypeError, match=r"Holder\.part would print"):
        decode(encode(HELLO), loud, max_bytes=LIMIT)


def test_the_bombs_are_framed_as_a_good_message_would_be():
    good = framed(b"\x95" + TAG + KEY + b"\x90\x80\xc0", HELLO)
    assert decode(good, Hello, max_bytes=LIMIT) == HELLO


def test_a_declared_length_is_not_believed():
    good = encode(HELLO)
    for length in (0, 1, 1 << 40, 2**64 - 1):
        with pytest.raises(MalformedMessage):
            decode(good[:13] + length.to_bytes(8, "big") + good[21:], Hello, max_bytes=1 << 62)


def test_ten_thousand_mutants_raise_protocol_errors_only():
    rng = random.Random(7)
    hello = Hello(
        key=bytes(range(32)),
        entries=[Entry(index=i, name="é" * i) for i in range(20)],
        weights={"a": 1.5, "b": -2.0},
        pair=(-5, True),
    )
    bye = Bye(vector=pack_vector(FIELD_61, np.arange(40, dtype=np.uint64)))
    originals = [encode(hello), encode(bye)]
    accepted = 0
    decode(originals[0], Hello, Bye, max_bytes=LIMIT)
    tracemalloc.start()
    for _ in range(10_000):
        data = bytearray(rng.choice(originals))
        for _ in range(rng.randint(1, 4)):
            where = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(21, len(data))
            match rng.randrange(4):
                case 0:
                    data[where] = rng.choice([0x00, 0x7F, 0x80, 0xC0, 0xC6, 0xDB, 0xDD, 0xDF, 0xFF])
                case 1:
                    data[where] ^= 1 << rng.randrange(8)
                case 2:
                    data[where:where] = rng.randbytes(rng.randint(1, 8))
                case 3:
                    del data[where : where + rng.randint(1, 8)]
            if len(data) < 22:
                break
        if rng.random() < 0.7 and len(data) >= 21:  # let most mutants past the header
            data[13:21] = (len(data) - 21).to_bytes(8, "big")
        try:
            message = decode(bytes(data), Hello, Bye, max_bytes=LIMIT)
            if isinstance(message, Bye):
                unpack_vector(FIELD_61, message.vector, 40)
            assert encode(message) == data
            accepted += 1
        except RemoteProtocolError:
            pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 18
    assert 100 < accepted < 9_000  # the mutants probe both sides


@pytest.mark.parametrize(
    "field",
    [
        bytes,
        str,
        list[int],
        dict[str, int],
        Annotated[list[bytes], Meta(max_length=5)],
        tuple[int, ...],
        set[int],
        Any,
        msgspec.Raw,
        bytes | None,
        tuple[int, bytes],
        complex,
    ],
    ids=str,
)
def test_fields_without_a_bound_are_refused(field):
    unbounded = msgspec.defstruct("Unbounded", [("field", field)], bases=(Message,), frozen=True)
    with pytest.raises(TypeError, match=r"Unbounded\.field"):
        decode(encode(HELLO), unbounded, max_bytes=LIMIT)


class Endless(Message, frozen=True):
    inner: "Endless | None" = None


def test_messages_that_contain_themselves_are_refused():
    with pytest.raises(TypeError, match=r"Endless\.inner"):
        encode(Endless())


def test_printing_shows_no_content():
    text = repr(Hello(key=b"s3cret-s3cret-s3cret-s3cret-s3cr", pair=(424242, True)))
    assert text == "<Hello: key, entries, weights, pair>"
    assert "s3cret" not in repr(Bye(vector=pack_vector(Z_2_32, torch.zeros(2).int())))


def test_messages_are_frozen():
    with pytest.raises(AttributeError):
        HELLO.key = bytes(32)


def test_errors_say_whose_fault_it_is():
    assert issubclass(MalformedMessage, RemoteProtocolError)
    assert issubclass(RemoteProtocolError, ProtocolError)
    assert not issubclass(RemoteProtocolError, LocalProtocolError)


# Ring vectors


@pytest.mark.parametrize("ring", [Z_2_32, Z_2_64, FIELD_61], ids=str)
def test_vectors_come_back_flat(ring):
    x = ring.random((2, 3), Stream(bytes(32), "x"))
    vector = pack_vector(ring, x)
    assert ring.equal(unpack_vector(ring, vector, 6), x.reshape(6))
    for other in (Z_2_32, Z_2_64, FIELD_61):
        if other is not ring:
            with pytest.raises(MalformedMessage):
                unpack_vector(other, vector, 6)
    for count in (0, 5, 7):
        with pytest.raises(MalformedMessage):
            unpack_vector(ring, vector, count)
    cut = RingVector(modulus=vector.modulus, count=6, data=vector.data[:-1])
    lying = RingVector(modulus=vector.modulus, count=5, data=vector.data)
    for wrong in (cut, lying):
        with pytest.raises(MalformedMessage):
            unpack_vector(ring, wrong, 6)


def test_vectors_with_non_canonical_elements_are_refused():
    vector = pack_vector(FIELD_61, np.zeros(1, np.uint64))
    forged = RingVector(modulus=vector.modulus, count=1, data=b"\xff" * 8)
    with pytest.raises(NonCanonicalElement):
        unpack_vector(FIELD_61, forged, 1)
    other = RingVector(modulus=vector.modulus[:-1] + b"\x0f", count=1, data=vector.data)
    with pytest.raises(MalformedMessage, match="modulus"):
        unpack_vector(FIELD_61, other, 1)
