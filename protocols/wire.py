r"""Frozen messages to bytes and back.

    offset  bytes  content
         0      4  magic "plm\x00"
         4      1  version of this layout, 1
         5      8  type: the first 8 bytes of SHA-256 of the message's tag
        13      8  length of the body, big-endian; exactly the rest of the message
        21      …  body: MessagePack array of the tag and the fields in order

Every bound is checked before anything is parsed, and the parser (msgspec) grows what it builds
with the bytes it has read, never with a length that the bytes merely declare.

A message has one encoding: the shortest form of each part, maps and sets sorted by key. Whatever
else MessagePack would allow (longer forms, repeated keys, left-out fields) is refused, so that what
parties compare, hash or sign is the same to all of them.
"""

import hashlib
import struct
from functools import cache
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta
from msgspec.inspect import (
    BoolType,
    BytesType,
    CollectionType,
    CustomType,
    DictType,
    EnumType,
    Field,
    FloatType,
    IntType,
    LiteralType,
    NoneType,
    StrType,
    StructType,
    TupleType,
    Type,
    UnionType,
    type_info,
)

from protocols.errors import MalformedMessage, OversizedMessage, UnexpectedMessage, WrongVersion
from protocols.ring import Ring

MAGIC = b"plm\x00"
VERSION = 1
_HEADER = struct.Struct(">4sB8sQ")
HEADER_BYTES = _HEADER.size

# Maps and sets are sorted, so that equal messages have equal bytes.
_ENCODER = msgspec.msgpack.Encoder(order="deterministic")

A = TypeVar("A")


class Record(
    msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True
):
    """A frozen part of a message. Every field of variable length states its greatest length.

    Printing shows the names of the fields and no content: most of it is secret.
    """

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {', '.join(self.__struct_fields__)}>"

    def __rich_repr__(self) -> list[tuple[str, str]]:
        return [(name, "…") for name in self.__struct_fields__]


class Message(Record, frozen=True, tag=True):
    """What parties send each other; one class for each kind, told apart by `tag`.

        class Hello(Message, tag="example/hello"):
            key: Annotated[bytes, Meta(min_length=32, max_length=32)]

    The tag is the name of the class unless one is given.
    """


M = TypeVar("M", bound=Message)


def encode(message: Message) -> bytes:
    """Return the bytes of `message`.

    Raises:
        TypeError: its class has a field without a bound.

    """
    type_id, _ = _layout(type(message))
    out = bytearray(HEADER_BYTES)
    _ENCODER.encode_into(message, out, HEADER_BYTES)
    _HEADER.pack_into(out, 0, MAGIC, VERSION, type_id, len(out) - HEADER_BYTES)
    return bytes(out)


def decode(data: bytes, *allowed: type[M], max_bytes: int) -> M:
    """Return the message in `data`, which must be of one of the `allowed` types.

    Args:
        data: header and body, nothing after them.
        allowed: the messages that the protocol expects here.
        max_bytes: greatest `len(data)`; the memory used is at most proportional to it.

    Raises:
        OversizedMessage: longer than `max_bytes`.
        WrongVersion: of another version of this layout.
        UnexpectedMessage: of a type not allowed here.
        MalformedMessage: anything else that `encode` would not have written.
        TypeError: an allowed class has a field without a bound, or two have one tag.

    """
    layouts = dict(_layout(message_type) for message_type in allowed)
    if len(layouts) < len(set(allowed)):
        raise TypeError("two of the allowed messages have one tag and cannot be told apart")
    if len(data) > max_bytes:
        raise OversizedMessage(f"message of {len(data)} bytes where at most {max_bytes} may come")
    if len(data) < HEADER_BYTES:
        raise MalformedMessage(f"message of {len(data)} bytes is shorter than its header")
    magic, version, type_id, body_bytes = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise MalformedMessage("not a message: wrong magic")
    if version != VERSION:
        raise WrongVersion(f"message of version {version}, this is version {VERSION}")
    if type_id not in layouts:
        names = ", ".join(message_type.__name__ for message_type in allowed)
        raise UnexpectedMessage(f"unexpected type of message; expected one of: {names}")
    if body_bytes != len(data) - HEADER_BYTES:
        raise MalformedMessage(f"header declares {body_bytes} bytes, {len(data)} came in all")
    decoder = layouts[type_id]
    try:
        message: M = decoder.decode(memoryview(data)[HEADER_BYTES:])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessage(f"malformed {decoder.type.__name__}: {_reason(error)}") from None
    canonical = _ENCODER.encode(message)
    # `endswith` compares without the copy of a slice, and far faster than a memoryview does.
    if len(canonical) != body_bytes or not data.endswith(canonical):
        raise MalformedMessage(f"malformed {decoder.type.__name__}: not its one encoding")
    return message


def _reason(error: Exception) -> str:
    """Say which field failed, never its content, which msgspec quotes for enumerations and tags."""
    text = str(error)
    if text.startswith("Invalid"):
        return f"invalid value at {text.rpartition(' - at ')[2]}"
    return "a text that is not UTF-8" if isinstance(error, UnicodeDecodeError) else text


@cache
def _layout(message_type: type[M]) -> tuple[bytes, msgspec.msgpack.Decoder[M]]:
    info = type_info(message_type)
    if not isinstance(info, StructType) or not isinstance(info.tag, str):
        raise TypeError(f"{message_type.__name__} is no Message with a tag")
    _require_bounds(info, message_type.__name__, ())
    type_id = hashlib.sha256(info.tag.encode()).digest()[:8]
    return type_id, msgspec.msgpack.Decoder(message_type)


def _require_bounds(info: Type | Field, path: str, outer: tuple[type, ...]) -> None:
    """Raise TypeError at the first part of a message that could grow without bound."""
    match info:
        case BoolType() | EnumType() | FloatType() | IntType() | LiteralType() | NoneType():
            pass
        case StructType() if not issubclass(info.cls, Record):
            raise TypeError(f"{path} would print its content: make {info.cls.__name__} a Record")
        case StructType() if info.cls not in outer:
            for field in info.fields:
                _require_bounds(field.type, f"{path}.{field.name}", (*outer, info.cls))
        case BytesType() | StrType() if info.max_length is not None:
            pass
        case CollectionType() if info.max_length is not None:
            _require_bounds(info.item_type, f"{path}[…]", outer)
        case DictType() if info.max_length is not None:
            _require_bounds(info.key_type, f"{path} (key)", outer)
            _require_bounds(info.value_type, f"{path}[…]", outer)
        case TupleType():
            for index, item in enumerate(info.item_types):
                _require_bounds(item, f"{path}[{index}]", outer)
        case UnionType():
            for item in info.types:
                _require_bounds(item, path, outer)
        case _:
            kind = info.cls.__name__ if isinstance(info, CustomType) else type(info).__name__
            raise TypeError(f"{path} ({kind}) has no bound: give it Meta(max_length=…)")


class RingVector(Record, frozen=True):
    """Elements of a ring on the wire: modulus, count and little-endian bytes."""

    modulus: Annotated[bytes, Meta(min_length=1, max_length=16)]
    count: Annotated[int, Meta(ge=0, le=1 << 40)]
    data: Annotated[bytes, Meta(max_length=1 << 43)]


def pack_vector(ring: Ring[A], elements: A) -> RingVector:
    """Put elements of `ring`, of any shape, on the wire as one vector."""
    data = ring.to_bytes(elements)
    return RingVector(
        modulus=_modulus_bytes(ring), count=len(data) // ring.element_bytes, data=data
    )


def unpack_vector(ring: Ring[A], vector: RingVector, count: int) -> A:
    """Return the `count` elements of `ring` in `vector`: (count,).

    Raises:
        MalformedMessage: another ring, another count, or not the bytes of so many elements.
        NonCanonicalElement: an encoded integer is not below the modulus.

    """
    if vector.modulus != _modulus_bytes(ring):
        raise MalformedMessage(f"expected a vector over {ring}, got another modulus")
    if vector.count != count:
        raise MalformedMessage(f"expected {count} elements, got {vector.count}")
    return ring.from_bytes(vector.data, count)


def _modulus_bytes(ring: Ring[A]) -> bytes:
    return ring.modulus.to_bytes((ring.modulus.bit_length() + 7) // 8, "little")
