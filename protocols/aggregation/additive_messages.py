"""What clients, servers and collector of additive aggregation send each other, and its checks.

Shapes: P = parameters.
"""

from typing import Annotated, TypeVar

from msgspec import Meta

from protocols.aggregation.cohort import MAX_SERVERS, Cohort, CohortMessage, Names
from protocols.errors import InconsistentShares
from protocols.randomness import SEED_BYTES
from protocols.sharing import AdditiveShare, SeedShare, VectorShare
from protocols.wire import RingVector, decode, encode, pack_vector, unpack_vector

A = TypeVar("A")

Index = Annotated[int, Meta(ge=0, lt=MAX_SERVERS)]


class SeedUpload(CohortMessage, frozen=True, tag="aggregation/additive/upload-seed"):
    """From a client to every server but the last: its share, as a seed."""

    index: Index
    seed: Annotated[bytes, Meta(min_length=SEED_BYTES, max_length=SEED_BYTES)]


class VectorUpload(CohortMessage, frozen=True, tag="aggregation/additive/upload-vector"):
    """From a client to the last server: its share, in full."""

    index: Index
    share: RingVector


class Holding(CohortMessage, frozen=True, tag="aggregation/additive/holding"):
    """Between servers: whose shares the sender holds, final."""

    clients: Names


class SumShare(CohortMessage, frozen=True, tag="aggregation/additive/sum-share"):
    """From a server to the collector: its share of the sum over `clients`."""

    index: Index
    clients: Names
    share: RingVector


def write_upload(share: AdditiveShare[A], cohort: Cohort[A]) -> bytes:
    """Return a client's upload of `share`."""
    if isinstance(share, SeedShare):
        return encode(SeedUpload(cohort=cohort.digest, index=share.index, seed=share.seed))
    assert isinstance(share, VectorShare)
    vector = pack_vector(share.ring, share.elements)
    return encode(VectorUpload(cohort=cohort.digest, index=share.index, share=vector))


def read_upload(data: bytes, index: int, cohort: Cohort[A]) -> AdditiveShare[A]:
    """Return the share, of P elements, in a client's upload to server `index`.

    Raises:
        WrongSession: of another round.
        InconsistentShares: meant for another server.
        RemoteProtocolError: as `decode` and `unpack_vector`.

    """
    if index == len(cohort.servers) - 1:
        upload = decode(data, VectorUpload, max_bytes=cohort.max_bytes(vectors=1))
        cohort.check_session(upload)
        return _vector_share(upload.share, upload.index, index, cohort)
    seed_upload = decode(data, SeedUpload, max_bytes=cohort.max_bytes())
    cohort.check_session(seed_upload)
    _require_index(seed_upload.index, index)
    return SeedShare(
        ring=cohort.encoding.ring,
        index=index,
        parties=len(cohort.servers),
        shape=(cohort.length,),
        seed=seed_upload.seed,
    )


def write_holding(clients: tuple[str, ...], cohort: Cohort[A]) -> bytes:
    """Return a server's word that it holds shares of `clients`."""
    return encode(Holding(cohort=cohort.digest, clients=clients))


def read_holding(data: bytes, cohort: Cohort[A]) -> tuple[str, ...]:
    """Return whose shares another server holds.

    Raises:
        WrongSession: of another round.
        MalformedMessage: not a set of the cohort's clients in their order.
        RemoteProtocolError: as `decode`.

    """
    holding = decode(data, Holding, max_bytes=cohort.max_bytes(names=True))
    cohort.check_session(holding)
    cohort.check_names(holding.clients)
    return holding.clients


def write_sum_share(share: VectorShare[A], clients: tuple[str, ...], cohort: Cohort[A]) -> bytes:
    """Return a server's share of the sum over `clients`."""
    vector = pack_vector(share.ring, share.elements)
    return encode(SumShare(cohort=cohort.digest, index=share.index, clients=clients, share=vector))


def read_sum_share(
    data: bytes, index: int, cohort: Cohort[A]
) -> tuple[VectorShare[A], tuple[str, ...]]:
    """Return share `index` of a sum, of P elements, and the clients in it.

    Raises:
        WrongSession: of another round.
        MalformedMessage: over no set of the cohort's clients in their order.
        TooFewClients: over fewer than `min_clients`.
        InconsistentShares: of another server.
        RemoteProtocolError: as `decode` and `unpack_vector`.

    """
    message = decode(data, SumShare, max_bytes=cohort.max_bytes(vectors=1, names=True))
    cohort.check_session(message)
    cohort.check_names(message.clients)
    cohort.check_enough(message.clients)
    return _vector_share(message.share, message.index, index, cohort), message.clients


def _vector_share(
    vector: RingVector, index: int, expected: int, cohort: Cohort[A]
) -> VectorShare[A]:
    _require_index(index, expected)
    ring = cohort.encoding.ring
    return VectorShare(
        ring=ring,
        index=index,
        parties=len(cohort.servers),
        shape=(cohort.length,),
        elements=unpack_vector(ring, vector, cohort.length),
    )


def _require_index(index: int, expected: int) -> None:
    if index != expected:
        raise InconsistentShares(f"share {index} came where share {expected} belongs")
