"""Who a party is: X25519 agreement, Ed25519 signatures, and the store of keys that are trusted.

Private keys never print. They are read from files of mode 0600 and no other.
"""

import os
import stat
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Annotated, Generic, NoReturn, Self, TypeVar

import msgspec
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from msgspec import Meta

from protocols.errors import BadSignature, ConflictingKey, UntrustedKey, UnusableKey
from protocols.files import sync_directory, write_atomically
from protocols.randomness import Stream, hkdf_sha256

KEY_BYTES = 32
SIGNATURE_BYTES = 64
_AGREEMENT_INFO = b"privlm/protocols/agreement/v1\x00"
_SIGNATURE_PREFIX = b"privlm/protocols/signature/v1\x00"
_MAX_KEY_FILE_BYTES = 1 << 14
_MAX_STORE_BYTES = 1 << 26
_P = (1 << 255) - 19  # coordinates of both curves are integers modulo p

K = TypeVar("K", X25519PrivateKey, Ed25519PrivateKey)


class _PrivateKey(ABC, Generic[K]):
    """A private key of 32 bytes and its files."""

    def __init__(self, key: K) -> None:
        self._key: K = key
        self.public = key.public_key().public_bytes_raw()

    @classmethod
    @abstractmethod
    def from_raw(cls, raw: bytes) -> Self:
        """Take the 32 bytes of a private key; raise ValueError for another length."""

    @classmethod
    @abstractmethod
    def _from_key(cls, key: object) -> Self:
        """Take a key that was loaded; raise ValueError for one of another algorithm."""

    @classmethod
    def draw(cls, stream: Stream) -> Self:
        """Make the key that is the next 32 bytes of `stream`."""
        return cls.from_raw(stream.bytes(KEY_BYTES))

    @classmethod
    def fresh(cls) -> Self:
        """Make a key that nobody can reproduce."""
        return cls.draw(Stream.fresh(f"{cls.__name__}.fresh"))

    def to_raw(self) -> bytes:
        """Return the 32 secret bytes."""
        return self._key.private_bytes_raw()

    def save_pem(self, path: Path, passphrase: bytes | None = None) -> None:
        """Write a new PKCS #8 PEM file of mode 0600, encrypted if there is a passphrase.

        Salt and IV of the encryption are drawn by OpenSSL.

        Raises:
            FileExistsError: there is a file already; a key is never overwritten.

        """
        encryption = NoEncryption() if passphrase is None else BestAvailableEncryption(passphrase)
        _write_new(path, self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))

    def save_raw(self, path: Path) -> None:
        """Write a new file of mode 0600 with the 32 secret bytes; FileExistsError as `save_pem`."""
        _write_new(path, self.to_raw())

    @classmethod
    def load(cls, path: Path, passphrase: bytes | None = None) -> Self:
        """Read what `save_pem` or `save_raw` wrote.

        Raises:
            PermissionError: others than the owner may read or write the file.
            ValueError: no key of this kind, or the wrong passphrase.

        """
        with path.open("rb") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise PermissionError(f"{path} is open to others: chmod 600 it")
            data = file.read(_MAX_KEY_FILE_BYTES + 1)
        if len(data) == KEY_BYTES and passphrase is None:
            return cls.from_raw(data)
        try:
            return cls._from_key(load_pem_private_key(data, passphrase))
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise ValueError(f"{path} holds no {cls.__name__} under this passphrase") from None

    def __repr__(self) -> str:
        return f"{type(self).__name__}(public={self.public.hex()})"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a private key is saved with save_pem, never pickled or copied")


class AgreementKey(_PrivateKey[X25519PrivateKey]):
    """An X25519 private key (RFC 7748); `public` is its public key of 32 bytes."""

    @classmethod
    def from_raw(cls, raw: bytes) -> Self:
        """Take the 32 bytes of a private key; raise ValueError for another length."""
        return cls(X25519PrivateKey.from_private_bytes(raw))

    @classmethod
    def _from_key(cls, key: object) -> Self:
        if not isinstance(key, X25519PrivateKey):
            raise ValueError(f"not an X25519 key: {type(key).__name__}")  # noqa: TRY004
        return cls(key)

    def agree(self, peer: bytes, context: bytes) -> bytes:
        """Return the 32 secret bytes that only the two holders of these keys can compute.

        HKDF-SHA256(X25519(own, peer), salt = "", info = prefix ‖ lower ‖ higher public key ‖
        context), so both sides get the same, and another pair of keys or context gives another.

        Args:
            peer: the peer's public key, 32 bytes.
            context: what the secret is for, such as the session; not empty.

        Raises:
            UnusableKey: the peer's key is of low order (RFC 7748, section 6.1), is this key
                reflected, or is no key. RFC 7748 takes several strings for one point (top bit
                set, coordinate of p or more); here only the one that `public` gives is a key, or
                this key could be reflected in disguise.

        """
        if not context:
            raise ValueError("an agreement needs a context that says what it is for")
        if peer == self.public:
            raise UnusableKey("the peer's key is our own")
        if not _is_agreement_key(peer):
            raise UnusableKey("the peer's key is of low order, or no key at all")
        first, second = sorted((self.public, peer))
        info = _AGREEMENT_INFO + first + second + context
        return hkdf_sha256(self._exchange(peer), salt=b"", info=info, length=32)

    def _exchange(self, peer: bytes) -> bytes:
        """Return the raw X25519 output: not uniform, and bound to nothing."""
        try:
            return self._key.exchange(X25519PublicKey.from_public_bytes(peer))
        except ValueError:
            raise UnusableKey("the peer's key is of low order, or no key at all") from None


class SigningKey(_PrivateKey[Ed25519PrivateKey]):
    """An Ed25519 private key (RFC 8032); `public` is its public key of 32 bytes."""

    @classmethod
    def from_raw(cls, raw: bytes) -> Self:
        """Take the 32 bytes of a private key; raise ValueError for another length."""
        return cls(Ed25519PrivateKey.from_private_bytes(raw))

    @classmethod
    def _from_key(cls, key: object) -> Self:
        if not isinstance(key, Ed25519PrivateKey):
            raise ValueError(f"not an Ed25519 key: {type(key).__name__}")  # noqa: TRY004
        return cls(key)

    def sign(self, message: bytes, context: bytes) -> bytes:
        """Return 64 bytes that `verify` accepts for this message in this context and no other."""
        return self._sign(_framed(message, context))

    def _sign(self, data: bytes) -> bytes:
        """Return the plain Ed25519 signature, separated from no other use."""
        return self._key.sign(data)


def verify(public: bytes, signature: bytes, message: bytes, context: bytes) -> bytes:
    """Return `message` if `signature` is its signature in `context` under the key `public`.

    Raises:
        BadSignature: it is not, for whatever reason. Keys of low order are refused: under those one
            signature would hold for many messages, or all.

    """
    if not _is_signing_key(public):
        raise BadSignature("the signature is not valid")
    _verify(public, signature, _framed(message, context))
    return message


def _verify(public: bytes, signature: bytes, data: bytes) -> None:
    """Raise BadSignature unless `signature` is the plain Ed25519 signature of `data`."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, data)
    except (InvalidSignature, ValueError):
        raise BadSignature("the signature is not valid") from None


def _framed(message: bytes, context: bytes) -> bytes:
    if not 1 <= len(context) <= 255:
        raise ValueError(f"a signature's context has 1 to 255 bytes, not {len(context)}")
    return _SIGNATURE_PREFIX + bytes([len(context)]) + context + message


def _coordinate(public: bytes) -> int:
    return int.from_bytes(public, "little")


# u-coordinates of the points whose order divides 8, and y-coordinates likewise: RFC 7748, section
# 6.1, and RFC 8032, section 5.1.7, leave it to the protocol to refuse them.
_X25519_ORDER_8 = _coordinate(
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800")
)
_X25519_ORDER_8_TWIST = _coordinate(
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157")
)
_ED25519_ORDER_8 = _coordinate(
    bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05")
)
_LOW_ORDER_U = frozenset({0, 1, _P - 1, _X25519_ORDER_8, _X25519_ORDER_8_TWIST})
_LOW_ORDER_Y = frozenset({0, 1, _P - 1, _ED25519_ORDER_8, _P - _ED25519_ORDER_8})


def _is_agreement_key(public: bytes) -> bool:
    """Whether `public` is the one encoding of a point that is not of low order."""
    u = _coordinate(public)
    return len(public) == KEY_BYTES and u < _P and u not in _LOW_ORDER_U


def _is_signing_key(public: bytes) -> bool:
    """Whether `public` is a sign and the one encoding of a y that no point of low order has."""
    y = _coordinate(public) & ((1 << 255) - 1)
    return len(public) == KEY_BYTES and y < _P and y not in _LOW_ORDER_Y


PublicKey = Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
_MAX_NAME = 128
_MAX_TIME = 1 << 40
_MAX_TRUSTED = 100_000
_MAX_RETIRED = 1_000_000
Name = Annotated[str, Meta(min_length=1, max_length=_MAX_NAME)]
Time = Annotated[int, Meta(ge=0, le=_MAX_TIME)]


class Identity(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A name and its public keys, to be trusted from `not_before` to `not_after`, both included.

    Times are seconds since 1970-01-01 UTC. ValueError if a name is empty or longer than 128
    characters, a time is no whole number from 0 to 2^40, or a key is of low order or not in its one
    encoding: a second encoding would let a key that is known, or was revoked, pass for a new one.
    """

    name: Name
    signing_key: PublicKey
    agreement_key: PublicKey
    not_before: Time
    not_after: Time

    def __post_init__(self) -> None:
        # msgspec checks the bounds above when it decodes, not when Python makes an identity.
        if not isinstance(self.name, str) or not 1 <= len(self.name) <= _MAX_NAME:
            raise ValueError(f"a name has 1 to {_MAX_NAME} characters")
        if not self.name.isprintable():
            raise ValueError("a name is printable")
        if not _is_signing_key(self.signing_key) or not _is_agreement_key(self.agreement_key):
            raise ValueError(f"a key of {self.name!r} is of low order, or no key at all")
        for time in (self.not_before, self.not_after):
            if not isinstance(time, int) or not 0 <= time <= _MAX_TIME:
                raise ValueError(f"a time lies in [0, 2^40], got {time}")
        if self.not_before > self.not_after:
            raise ValueError("not_before lies after not_after")


class _StoreFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    version: Annotated[int, Meta(ge=1, le=1)] = 1
    trusted: Annotated[list[Identity], Meta(max_length=_MAX_TRUSTED)]
    retired: Annotated[list[Identity], Meta(max_length=_MAX_RETIRED)]


class TrustStore:
    """Which keys stand for which name: one pair for each name, one name for each key.

    Keys that were rotated out or revoked are kept, so that they can never come back.
    """

    def __init__(self) -> None:
        self._trusted: dict[str, Identity] = {}
        self._retired: list[Identity] = []
        self._owners: dict[bytes, str] = {}  # of every key ever trusted

    def add(self, identity: Identity) -> None:
        """Trust a name that is new. Adding what is there already changes nothing.

        Raises:
            ConflictingKey: the name has other keys or another validity period, was revoked, or a
                key is known already; a new key for a known name takes `rotate`.

        """
        if self._trusted.get(identity.name) == identity:
            return
        if self._known(identity.name):
            raise ConflictingKey(f"{identity.name!r} is known under other keys: rotate explicitly")
        self._trust(identity)

    def rotate(self, identity: Identity) -> None:
        """Replace the keys of a known name, revoked or not, by keys never seen before.

        Raises:
            UntrustedKey: the name is unknown.
            ConflictingKey: a key is known already, for this name or another.

        """
        if not self._known(identity.name):
            raise UntrustedKey(f"{identity.name!r} is unknown")
        old = self._trusted.get(identity.name)
        self._trust(identity)
        if old is not None:
            self._retired.append(old)

    def revoke(self, name: str) -> None:
        """Stop trusting the keys of `name` at all times; raise UntrustedKey if it has none."""
        if name not in self._trusted:
            raise UntrustedKey(f"{name!r} is unknown")
        self._retired.append(self._trusted.pop(name))

    def get(self, name: str, at: int) -> Identity:
        """Return the identity of `name` that is valid at the time `at`.

        Raises:
            UntrustedKey: unknown, revoked, not valid yet or not valid any more.

        """
        identity = self._trusted.get(name)
        if identity is None:
            state = "revoked" if self._known(name) else "unknown"
            raise UntrustedKey(f"{name!r} is {state}")
        if not identity.not_before <= at <= identity.not_after:
            raise UntrustedKey(
                f"{name!r} is valid from {identity.not_before} to {identity.not_after}, not at {at}"
            )
        return identity

    def save(self, path: Path) -> None:
        """Replace the JSON file at `path` whole or not at all.

        Raises:
            ValueError: the store has outgrown what `load` takes; the file is left as it is.

        """
        content = _StoreFile(trusted=list(self._trusted.values()), retired=self._retired)
        data = msgspec.json.format(msgspec.json.encode(content), indent=2)
        if (
            len(data) > _MAX_STORE_BYTES
            or len(self._trusted) > _MAX_TRUSTED
            or len(self._retired) > _MAX_RETIRED
        ):
            raise ValueError(f"{path} would be longer than a store that can be loaded")
        write_atomically(path, data)

    @classmethod
    def load(cls, path: Path) -> "TrustStore":
        """Read what `save` wrote.

        Raises:
            ValueError: too long, not what `save` writes, or contradictory.

        """
        with path.open("rb") as file:
            data = file.read(_MAX_STORE_BYTES + 1)
        if len(data) > _MAX_STORE_BYTES:
            raise ValueError(f"{path} is longer than {_MAX_STORE_BYTES} bytes")
        try:
            content = msgspec.json.decode(data, type=_StoreFile)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{path} is no trust store: {error}") from None
        store = cls()
        if len({identity.name for identity in content.trusted}) < len(content.trusted):
            raise ValueError(f"{path} trusts two pairs of keys for one name")
        try:
            for identity in content.retired:
                store._trust(identity)
                store._retired.append(store._trusted.pop(identity.name))
            for identity in content.trusted:
                store._trust(identity)
        except ConflictingKey as error:
            raise ValueError(f"{path} contradicts itself: {error}") from None
        return store

    def _known(self, name: str) -> bool:
        return name in self._trusted or any(old.name == name for old in self._retired)

    def _trust(self, identity: Identity) -> None:
        keys = (identity.signing_key, identity.agreement_key)
        for key in keys:
            if key in self._owners:
                raise ConflictingKey(
                    f"a key of {identity.name!r} is or was that of {self._owners[key]!r}"
                )
        self._owners.update(dict.fromkeys(keys, identity.name))
        self._trusted[identity.name] = identity


def _write_new(path: Path, data: bytes) -> None:
    """Create a file of mode 0600 and see it to the disk; leave none if that fails."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)
