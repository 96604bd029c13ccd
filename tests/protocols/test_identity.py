"""Keys, agreements, signatures and the trust store."""

import copy
import json
import os
import pickle
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols import identity as identity_module
from protocols.errors import BadSignature, ConflictingKey, UntrustedKey, UnusableKey
from protocols.files import write_atomically
from protocols.identity import (
    AgreementKey,
    Identity,
    SigningKey,
    TrustStore,
    _verify,
    verify,
)
from protocols.randomness import Stream, hkdf_sha256

VECTORS = Path(__file__).parents[1] / "vectors"
X25519 = json.loads((VECTORS / "rfc7748_x25519.json").read_text())
ED25519 = json.loads((VECTORS / "rfc8032_ed25519.json").read_text())["cases"]
KINDS = [AgreementKey, SigningKey]
raw_keys = st.binary(min_size=32, max_size=32)


def key(kind, label: str):
    return kind.draw(Stream(bytes(range(32)), label))


# Vectors


@pytest.mark.parametrize("case", X25519["single"])
def test_x25519_single(case):
    own = AgreementKey.from_raw(bytes.fromhex(case["scalar"]))
    assert own._exchange(bytes.fromhex(case["u"])).hex() == case["output"]


def test_x25519_iterated():
    iterated = X25519["iterated"]
    scalar = point = bytes.fromhex(iterated["start"])
    for step in range(1, 1001):
        scalar, point = AgreementKey.from_raw(scalar)._exchange(point), scalar
        if step == 1:
            assert scalar.hex() == iterated["after_1"]
    assert scalar.hex() == iterated["after_1000"]


def test_x25519_agreement():
    case = {name: bytes.fromhex(value) for name, value in X25519["agreement"].items()}
    alice = AgreementKey.from_raw(case["alice_private"])
    bob = AgreementKey.from_raw(case["bob_private"])
    assert alice.public == case["alice_public"]
    assert bob.public == case["bob_public"]
    assert alice._exchange(bob.public) == bob._exchange(alice.public) == case["shared"]
    # And what is made of it, spelt out.
    first, second = sorted((alice.public, bob.public))
    info = b"privlm/protocols/agreement/v1\x00" + first + second + b"round 7"
    expected = hkdf_sha256(case["shared"], salt=b"", info=info, length=32)
    assert alice.agree(bob.public, b"round 7") == expected


@pytest.mark.parametrize("case", ED25519, ids=lambda case: case["name"])
def test_ed25519(case):
    secret, public, message, signature = (
        bytes.fromhex(case[name]) for name in ("secret", "public", "message", "signature")
    )
    own = SigningKey.from_raw(secret)
    assert own.public == public
    assert own._sign(message) == signature
    _verify(public, signature, message)
    for place in (0, 31, 32, 63):
        wrong = bytearray(signature)
        wrong[place] ^= 1
        with pytest.raises(BadSignature):
            _verify(public, bytes(wrong), message)
    # Adding the group order to S makes a second encoding of the same signature (RFC 8032, 5.1.7).
    order = (1 << 252) + 27742317777372353535851937790883648493
    shifted = int.from_bytes(signature[32:], "little") + order
    with pytest.raises(BadSignature):
        _verify(public, signature[:32] + shifted.to_bytes(32, "little"), message)


# Agreement


@given(raw_keys, raw_keys, st.binary(min_size=1, max_size=30), st.binary(min_size=1, max_size=30))
def test_both_sides_agree_and_only_in_one_context(a, b, context, other):
    alice, bob = AgreementKey.from_raw(a), AgreementKey.from_raw(b)
    if alice.public == bob.public:
        return
    secret = alice.agree(bob.public, context)
    assert bob.agree(alice.public, context) == secret
    assert (alice.agree(bob.public, other) == secret) == (context == other)
    assert secret != alice._exchange(bob.public)


def test_the_agreement_is_bound_to_the_public_keys():
    alice, bob = key(AgreementKey, "alice"), key(AgreementKey, "bob")
    # The top bit of a u-coordinate is ignored (RFC 7748, section 5): one point, two encodings.
    twin = bob.public[:31] + bytes([bob.public[31] | 0x80])
    assert alice._exchange(twin) == alice._exchange(bob.public)
    with pytest.raises(UnusableKey):
        alice.agree(twin, b"c")
    # Both keys are in what is hashed: the raw output alone does not decide.
    raw = alice._exchange(bob.public)
    first, second = sorted((alice.public, bob.public))
    swapped = b"privlm/protocols/agreement/v1\x00" + second + first + b"c"
    assert alice.agree(bob.public, b"c") != hkdf_sha256(raw, salt=b"", info=swapped, length=32)


LOW_ORDER = [
    bytes(32),
    (1).to_bytes(32, "little"),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    ((1 << 255) - 20).to_bytes(32, "little"),
    ((1 << 255) - 19).to_bytes(32, "little"),
    ((1 << 255) - 18).to_bytes(32, "little"),
]


@pytest.mark.parametrize("point", LOW_ORDER, ids=lambda point: point.hex()[:8])
def test_low_order_points_are_refused(point):
    for top_bit in (0, 0x80):
        disguised = point[:31] + bytes([point[31] | top_bit])
        with pytest.raises(UnusableKey):
            key(AgreementKey, "alice").agree(disguised, b"context")
        with pytest.raises(UnusableKey):  # the library agrees that they are of low order
            key(AgreementKey, "alice")._exchange(disguised)


def test_reflected_and_malformed_keys_are_refused():
    alice = key(AgreementKey, "alice")
    disguised = alice.public[:31] + bytes([alice.public[31] | 0x80])
    beyond_p = ((1 << 255) - 19 + 9).to_bytes(32, "little")  # the base point's second encoding
    for peer in (alice.public, disguised, beyond_p, b"", bytes(31), alice.public + b"\0"):
        with pytest.raises(UnusableKey):
            alice.agree(peer, b"context")
    with pytest.raises(ValueError, match="context"):
        alice.agree(key(AgreementKey, "bob").public, b"")


# Signatures


@given(st.binary(max_size=50), st.binary(min_size=1, max_size=255))
def test_signatures_verify_in_their_context_alone(message, context):
    own = key(SigningKey, "alice")
    signature = own.sign(message, context)
    assert verify(own.public, signature, message, context) == message
    for wrong in (
        (own.public, signature, message + b"\0", context),
        (own.public, signature, message, context[:-1] + bytes([context[-1] ^ 1])),
        (key(SigningKey, "bob").public, signature, message, context),
        (own.public, own._sign(message), message, context),
        (own.public, own._sign(context + message), message, context),
    ):
        with pytest.raises(BadSignature):
            verify(*wrong)


def test_context_and_message_cannot_be_shifted_against_each_other():
    own = key(SigningKey, "alice")
    signature = own.sign(b"bc", b"a")
    with pytest.raises(BadSignature):
        verify(own.public, signature, b"c", b"ab")


def test_a_bad_signature_says_nothing_more():
    own = key(SigningKey, "alice")
    good = own.sign(b"m", b"c")
    texts = set()
    for public, signature in (
        (own.public, bytes(64)),
        (own.public, good[:-1]),
        (own.public, b""),
        (b"", good),
        (bytes(31), good),
        (b"\xff" * 32, good),
    ):
        with pytest.raises(BadSignature) as error:
            verify(public, signature, b"m", b"c")
        texts.add(str(error.value))
        assert error.value.__cause__ is None
    assert texts == {"the signature is not valid"}


ORDER_8 = "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc"
ED25519_LOW_ORDER = [
    (1).to_bytes(32, "little"),
    (1).to_bytes(31, "little") + b"\x80",
    ((1 << 255) - 20).to_bytes(32, "little"),
    ((1 << 255) - 18).to_bytes(32, "little"),  # 1, beyond p
    bytes(32),
    bytes(31) + b"\x80",
    bytes.fromhex(ORDER_8 + "05"),
    bytes.fromhex(ORDER_8 + "85"),
]


@pytest.mark.parametrize("public", ED25519_LOW_ORDER, ids=lambda point: point.hex()[-8:])
def test_keys_under_which_one_signature_holds_for_many_messages_are_refused(public):
    # R = A·(-k) for one of eight multiples, S = 0: at least one message in eight verifies.
    forged = (1).to_bytes(32, "little") + bytes(32)
    for i in range(64):
        with pytest.raises(BadSignature):
            verify(public, forged, b"%d" % i, b"context")
    with pytest.raises(ValueError, match="low order"):
        msgspec.structs.replace(person("mallory"), signing_key=public)


def test_the_library_alone_would_take_a_forgery():
    neutral = (1).to_bytes(32, "little")
    for message in (b"a", b"b"):
        _verify(neutral, neutral + bytes(32), message)


def test_a_signature_needs_a_context():
    own = key(SigningKey, "alice")
    for context in (b"", bytes(256)):
        with pytest.raises(ValueError, match="context"):
            own.sign(b"m", context)
        with pytest.raises(ValueError, match="context"):
            verify(own.public, bytes(64), b"m", context)


# Key files


@pytest.mark.parametrize("kind", KINDS)
def test_keys_come_back_from_files(kind, tmp_path):
    own = key(kind, "own")
    own.save_raw(tmp_path / "raw")
    own.save_pem(tmp_path / "plain.pem")
    own.save_pem(tmp_path / "locked.pem", b"passphrase")
    for name, passphrase in (("raw", None), ("plain.pem", None), ("locked.pem", b"passphrase")):
        path = tmp_path / name
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        loaded = kind.load(path, passphrase)
        assert loaded.to_raw() == own.to_raw()
        assert loaded.public == own.public
    assert own.to_raw() not in (tmp_path / "locked.pem").read_bytes()
    assert b"ENCRYPTED" in (tmp_path / "locked.pem").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_keys_are_private_whatever_the_umask(kind, tmp_path):
    before = os.umask(0)
    try:
        key(kind, "own").save_pem(tmp_path / "key")
        TrustStore().save(tmp_path / "trust.json")
    finally:
        os.umask(before)
    for name in ("key", "trust.json"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o620])
def test_key_files_open_to_others_are_refused(kind, mode, tmp_path):
    key(kind, "own").save_pem(tmp_path / "key")
    (tmp_path / "key").chmod(mode)
    with pytest.raises(PermissionError):
        kind.load(tmp_path / "key")


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_file_is_never_overwritten(kind, tmp_path):
    key(kind, "first").save_raw(tmp_path / "key")
    for save in (key(kind, "second").save_raw, key(kind, "second").save_pem):
        with pytest.raises(FileExistsError):
            save(tmp_path / "key")
    assert kind.load(tmp_path / "key").to_raw() == key(kind, "first").to_raw()


def test_wrong_key_files_are_refused(tmp_path):
    signing = key(SigningKey, "own")
    signing.save_pem(tmp_path / "signing.pem")
    signing.save_pem(tmp_path / "locked.pem", b"right")
    for name, content in (("empty", b""), ("short", bytes(31)), ("long", bytes(1 << 20))):
        identity_module._write_new(tmp_path / name, content)
    attempts = [
        (AgreementKey, "signing.pem", None),
        (SigningKey, "locked.pem", None),
        (SigningKey, "locked.pem", b"wrong"),
        (SigningKey, "signing.pem", b"needless"),
        (SigningKey, "empty", None),
        (SigningKey, "short", None),
        (SigningKey, "long", None),
    ]
    for kind, name, passphrase in attempts:
        with pytest.raises(ValueError, match=f"{name} holds no {kind.__name__}"):
            kind.load(tmp_path / name, passphrase)


@pytest.mark.parametrize("kind", KINDS)
def test_secrets_neither_print_nor_travel(kind):
    own = key(kind, "own")
    assert repr(own) == f"{kind.__name__}(public={own.public.hex()})"
    assert own.to_raw().hex() not in repr(own) + str(own)
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError):
            attempt(own)
    with pytest.raises(ValueError, match="32"):
        kind.from_raw(bytes(31))
    assert kind.fresh().public != kind.fresh().public


# The trust store


def person(name: str, label: str | None = None, **period) -> Identity:
    label = label or name
    return Identity(
        name=name,
        signing_key=key(SigningKey, label).public,
        agreement_key=key(AgreementKey, label).public,
        **{"not_before": 100, "not_after": 200, **period},
    )


def test_an_identity_is_trusted_within_its_period():
    store = TrustStore()
    store.add(person("alice"))
    for at in (100, 150, 200):
        assert store.get("alice", at) == person("alice")
    for at in (0, 99, 201):
        with pytest.raises(UntrustedKey, match="valid from 100 to 200"):
            store.get("alice", at)
    with pytest.raises(UntrustedKey, match="unknown"):
        store.get("bob", 150)


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": ""},
        {"name": "a" * 129},
        {"name": "\ud800"},
        {"name": "a\nb"},
        {"signing_key": bytes(31)},
        {"agreement_key": b""},
        {"agreement_key": bytes(32)},
        {"not_before": -1},
        {"not_after": (1 << 40) + 1},
        {"not_before": 0.5},
        {"not_before": 300},
    ],
    ids=repr,
)
def test_an_identity_that_a_file_could_not_hold_cannot_be_made(wrong):
    with pytest.raises(ValueError, match=r"name|key|time|not_before"):
        msgspec.structs.replace(person("alice"), **wrong)


def test_a_known_key_does_not_come_back_in_another_encoding():
    store = TrustStore()
    alice = person("alice")
    store.add(alice)
    store.revoke("alice")
    twin = alice.agreement_key[:31] + bytes([alice.agreement_key[31] | 0x80])
    with pytest.raises(ValueError, match="no key"):
        msgspec.structs.replace(person("alice", "new"), agreement_key=twin)


def test_a_store_that_could_not_be_loaded_is_not_saved(tmp_path, monkeypatch):
    path = tmp_path / "trust.json"
    store = TrustStore()
    store.add(person("alice"))
    store.save(path)
    before = path.read_bytes()
    store.add(person("bob"))
    for limit, value in (("_MAX_STORE_BYTES", len(before)), ("_MAX_TRUSTED", 1)):
        with monkeypatch.context() as patch:
            patch.setattr(identity_module, limit, value)
            with pytest.raises(ValueError, match="longer"):
                store.save(path)
        assert path.read_bytes() == before


def test_a_key_file_that_could_not_be_written_is_not_left(tmp_path, monkeypatch):
    def full_disk(descriptor):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(identity_module.os, "fsync", full_disk)
        with pytest.raises(OSError, match="no space"):
            key(SigningKey, "own").save_pem(tmp_path / "key")
    assert not list(tmp_path.iterdir())
    key(SigningKey, "own").save_pem(tmp_path / "key")


def test_threads_that_save_at_once_leave_a_whole_file(tmp_path):
    path = tmp_path / "file"
    contents = [bytes([i]) * 200_000 for i in range(4)]

    def write(content):
        for _ in range(10):
            write_atomically(path, content)
            assert path.read_bytes() in contents

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, contents))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_second_key_for_a_name_takes_a_rotation():
    store = TrustStore()
    store.add(person("alice"))
    store.add(person("alice"))
    for other in (person("alice", "new"), person("alice", not_after=300)):
        with pytest.raises(ConflictingKey):
            store.add(other)
        assert store.get("alice", 150) == person("alice")
    store.rotate(person("alice", "new"))
    assert store.get("alice", 150) == person("alice", "new")
    # The old keys never come back, neither to their owner nor to anybody else.
    for act in (store.add, store.rotate):
        with pytest.raises(ConflictingKey):
            act(person("alice"))
    with pytest.raises(ConflictingKey):
        store.add(person("mallory", "alice"))
    with pytest.raises(UntrustedKey):
        store.rotate(person("nobody"))


def test_a_key_has_one_name():
    store = TrustStore()
    alice = person("alice")
    store.add(alice)
    mallory = person("mallory")
    for stolen in (
        {"signing_key": alice.signing_key},
        {"agreement_key": alice.agreement_key},
        {"signing_key": alice.agreement_key},
    ):
        keys = {"signing_key": mallory.signing_key, "agreement_key": mallory.agreement_key}
        thief = Identity(name="mallory", not_before=0, not_after=9, **{**keys, **stolen})
        with pytest.raises(ConflictingKey):
            store.add(thief)
    store.add(mallory)


def test_revocation_is_for_good():
    store = TrustStore()
    store.add(person("alice"))
    store.revoke("alice")
    for _ in range(2):
        with pytest.raises(UntrustedKey, match="revoked"):
            store.get("alice", 150)
        with pytest.raises(ConflictingKey):
            store.add(person("alice"))
        with pytest.raises(ConflictingKey):
            store.add(person("alice", "another"))
        with pytest.raises(ConflictingKey):
            store.rotate(person("alice"))
        with pytest.raises(UntrustedKey):
            store.revoke("alice")
    store.rotate(person("alice", "new"))
    assert store.get("alice", 150) == person("alice", "new")


def test_the_store_comes_back_with_its_memory(tmp_path):
    store = TrustStore()
    for name in ("alice", "bob", "carol"):
        store.add(person(name))
    store.rotate(person("bob", "new bob"))
    store.revoke("carol")
    path = tmp_path / "trust.json"
    store.save(path)
    store.save(path)
    loaded = TrustStore.load(path)
    assert loaded.get("alice", 150) == person("alice")
    assert loaded.get("bob", 150) == person("bob", "new bob")
    with pytest.raises(UntrustedKey, match="revoked"):
        loaded.get("carol", 150)
    for old in (person("bob"), person("carol"), person("dave", "bob")):
        with pytest.raises(ConflictingKey):
            loaded.add(old)
    assert [p.name for p in tmp_path.iterdir()] == ["trust.json"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "trust.json"
    store = TrustStore()
    store.save(path)
    before = path.read_bytes()
    store.add(person("alice"))

    def full_disk(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr(identity_module.os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        store.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["trust.json"]


def test_files_that_are_no_store_are_refused(tmp_path):
    path = tmp_path / "trust.json"
    store = TrustStore()
    store.add(person("alice"))
    store.add(person("bob"))
    store.save(path)
    good = json.loads(path.read_bytes())
    alice, bob = good["trusted"]
    wrong = [
        {},
        {**good, "version": 2},
        {**good, "extra": 1},
        {**good, "trusted": [{**alice, "signing_key": "AAAA"}]},
        {**good, "trusted": [{**alice, "not_before": 300}]},
        {**good, "trusted": [{**alice, "name": ""}]},
        {**good, "trusted": [alice, alice]},
        {**good, "trusted": [alice, {**bob, "name": "alice"}]},
        {**good, "trusted": [alice, {**bob, "signing_key": alice["signing_key"]}]},
        {**good, "retired": [alice]},
    ]
    contents = [json.dumps(w).encode() for w in wrong]
    contents += [b"", b"\xff", b"[" * 100_000, path.read_bytes() + b"x"]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"trust\.json"):
            TrustStore.load(path)
    with path.open("wb") as file:
        file.truncate(identity_module._MAX_STORE_BYTES + 1)
    with pytest.raises(ValueError, match="longer"):
        TrustStore.load(path)
