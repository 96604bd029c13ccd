"""Client and server of a split model refuse what their protocol does not expect, and play once."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from privlm.models import TinyConfig, TinyDecoder
from privlm.split import (
    Cut,
    GaussianNoise,
    Plain,
    Session,
    SplitClient,
    SplitServer,
    client_part,
    run_in_memory,
    server_part,
)
from privlm.split.messages import ClientRows, End, ServerRows, max_bytes, pack_rows
from protocols.errors import (
    MalformedMessage,
    NonFiniteResult,
    OversizedMessage,
    PartySpent,
    RemoteProtocolError,
    UnexpectedMessage,
    WrongSession,
)
from protocols.party import State
from protocols.randomness import Stream
from protocols.transport import FaultPlan, InMemoryNetwork
from protocols.wire import decode, encode

WIDTH, CONTEXT, VOCABULARY = 32, 24, 50
PROMPT = (7, 3, 3, 41, 0, 12, 49, 5)
CUT = Cut(1, 2)
NAME = Session(bytes(16), CUT, WIDTH, layers=3)
OTHER = dataclasses.replace(NAME, id=bytes([1]) * 16)


@pytest.fixture
def stream():
    return Stream(bytes(range(32)), "test")


@pytest.fixture(scope="module")
def parts():
    config = TinyConfig(VOCABULARY, CONTEXT, width=WIDTH, layers=3)
    model = TinyDecoder(config, torch.Generator().manual_seed(4))
    return client_part(model, CUT), server_part(model, CUT)


GOOD = torch.ones(2, WIDTH)


def rows_message(session=NAME.digest, start=0, rows=2, width=WIDTH, data=None):
    data = GOOD.numpy().tobytes() if data is None else data
    return encode(ClientRows(session=session, start=start, rows=rows, width=width, data=data))


BAD_FOR_SERVER = {
    "another sender": ("mallory", rows_message(), UnexpectedMessage),
    "another session": ("client", rows_message(session=OTHER.digest), WrongSession),
    "another session's end": ("client", encode(End(session=OTHER.digest)), WrongSession),
    "rows left out": ("client", rows_message(start=1), UnexpectedMessage),
    "another width": (
        "client",
        rows_message(width=16, data=bytes(2 * 16 * 4)),
        UnexpectedMessage,
    ),
    "beyond the context": (
        "client",
        rows_message(rows=25, data=bytes(25 * WIDTH * 4)),
        UnexpectedMessage,
    ),
    "too few bytes": ("client", rows_message(data=bytes(2 * WIDTH * 4 - 1)), MalformedMessage),
    "too many bytes": ("client", rows_message(data=bytes(3 * WIDTH * 4)), MalformedMessage),
    "infinite numbers": (
        "client",
        rows_message(data=(GOOD * float("inf")).numpy().tobytes()),
        MalformedMessage,
    ),
    "one that is no number": (
        "client",
        rows_message(data=GOOD.numpy().tobytes()[:-4] + b"\xff" * 4),
        MalformedMessage,
    ),
    "the server's own kind": (
        "client",
        pack_rows(ServerRows, NAME, 0, GOOD),
        UnexpectedMessage,
    ),
    "no message": ("client", b"rows", MalformedMessage),
    "too long": ("client", bytes(max_bytes(CONTEXT, WIDTH) + 1), OversizedMessage),
}


@pytest.mark.parametrize("case", BAD_FOR_SERVER)
def test_a_bad_message_closes_the_server(case, parts, stream):
    sender, data, error = BAD_FOR_SERVER[case]
    server = SplitServer(NAME, parts[1], stream)
    server.start()
    with pytest.raises(error):
        server.receive(sender, data)
    assert server.state is State.FAILED
    with pytest.raises(PartySpent):
        server.receive("client", rows_message())


def test_a_good_message_does_not_close_it(parts, stream):
    """Else the test above would hold for a server that refuses everything."""
    server = SplitServer(NAME, parts[1], stream)
    server.start()
    assert len(server.receive("client", rows_message())) == 1
    assert len(server.receive("client", rows_message(start=2))) == 1
    with pytest.raises(UnexpectedMessage, match="rows from position 2 on, expected 4"):
        server.receive("client", rows_message(start=2))  # a replay
    other = SplitServer(NAME, parts[1], stream)
    other.start()
    other.receive("client", rows_message(rows=24, data=bytes(24 * WIDTH * 4)))
    with pytest.raises(UnexpectedMessage, match="2 rows of 32 numbers after 24"):
        other.receive("client", rows_message(start=24))


BAD_FOR_CLIENT = {
    "another sender": ("mallory", pack_rows(ServerRows, NAME, 0, torch.ones(8, WIDTH))),
    "another session": (
        "server",
        pack_rows(ServerRows, OTHER, 0, torch.ones(8, WIDTH)),
    ),
    "another start": ("server", pack_rows(ServerRows, NAME, 1, torch.ones(8, WIDTH))),
    "too few rows": ("server", pack_rows(ServerRows, NAME, 0, torch.ones(7, WIDTH))),
    "too many rows": ("server", pack_rows(ServerRows, NAME, 0, torch.ones(9, WIDTH))),
    "another width": ("server", pack_rows(ServerRows, NAME, 0, torch.ones(8, WIDTH // 2))),
    "the client's own": ("server", pack_rows(ClientRows, NAME, 0, torch.ones(8, WIDTH))),
    "the end": ("server", encode(End(session=NAME.digest))),
    "no number": (
        "server",
        encode(
            ServerRows(
                session=NAME.digest, start=0, rows=8, width=WIDTH, data=b"\xff" * (8 * WIDTH * 4)
            )
        ),
    ),
}


@pytest.mark.parametrize("case", BAD_FOR_CLIENT)
def test_a_bad_answer_closes_the_client(case, parts, stream):
    client = SplitClient(NAME, parts[0], PROMPT, Plain(), stream, max_new_tokens=3)
    client.start()
    with pytest.raises(RemoteProtocolError):
        client.receive(*BAD_FOR_CLIENT[case])
    assert client.state is State.FAILED
    assert client.tokens == []


def test_a_good_answer_does_not_close_it(parts, stream):
    client = SplitClient(NAME, parts[0], PROMPT, Plain(), stream, max_new_tokens=3)
    client.start()
    answer = pack_rows(ServerRows, NAME, 0, torch.ones(8, WIDTH))
    assert len(client.receive("server", answer)) == 1
    assert len(client.tokens) == 1
    with pytest.raises(RemoteProtocolError):
        client.receive("server", answer)  # a replay
    assert len(client.tokens) == 1


@pytest.mark.parametrize("seed", range(40))
def test_no_fault_gives_a_wrong_token_in_silence(parts, stream, seed):
    """All but flipped bits, which authenticated channels keep out."""
    client, server = parts
    right = run_in_memory(client, server, PROMPT, Plain(), stream, max_new_tokens=6).client.tokens
    asking = SplitClient(NAME, client, PROMPT, Plain(), stream, max_new_tokens=6)
    plan = FaultPlan(drop=0.05, duplicate=0.1, reorder=0.2)
    generator = np.random.default_rng(seed)
    network = InMemoryNetwork(
        [asking, SplitServer(NAME, server, stream)], faults=plan, generator=generator
    )
    outcome = network.run()
    assert asking.tokens == right[: len(asking.tokens)]
    if asking.state is State.FINISHED:
        assert asking.tokens == right
    else:
        assert outcome.errors or outcome.unfinished


def test_parties_play_once_and_hide_their_secrets(parts, stream):
    client = SplitClient(NAME, parts[0], PROMPT, Plain(), stream)
    server = SplitServer(NAME, parts[1], stream)
    InMemoryNetwork([client, server]).run()
    for party in (client, server):
        assert party.state is State.FINISHED
        with pytest.raises(PartySpent):
            party.start()
        with pytest.raises(PartySpent):
            copy.deepcopy(party)
        with pytest.raises(PartySpent):
            pickle.dumps(party)
        assert "41" not in repr(party)
    request = run_in_memory(*parts, PROMPT, Plain(), stream)
    assert "tensor" not in repr(request)
    assert "41" not in repr(request)
    message = decode(rows_message(), ClientRows, max_bytes=10_000)
    assert repr(message) == "<ClientRows: session, start, rows, width, data>"


def test_the_clients_view_repeats_its_run(parts, stream):
    """Inputs and randomness are all there: played again, the same bytes leave."""
    client, server = parts
    protection = GaussianNoise(1.0, clip=1.0, max_rows=24, delta=1e-3)
    options = {"max_new_tokens": 9, "temperature": 1.0}

    def play(stop_token):
        own = Stream(bytes(range(32)), "the same noise and coins")
        asking = SplitClient(
            NAME, client, PROMPT, protection, own, stop_token=stop_token, **options
        )
        return asking, InMemoryNetwork([asking, SplitServer(NAME, server, own)]).run()

    unstopped, _ = play(None)
    asking, outcome = play(unstopped.tokens[4])
    assert asking.tokens == unstopped.tokens[: len(asking.tokens)]
    assert 1 <= len(asking.tokens) <= 5
    view = outcome.views["client"]
    again = SplitClient(NAME, client, stream=stream, **view.inputs)
    again._stream = view.stream()
    sent = again.start()
    for item in view.received:
        sent += again.receive(item.sender, item.data)
    assert [item.data for item in sent] == [m.data for m in outcome.views["server"].received]
    assert again.tokens == asking.tokens
    assert again.state is State.FINISHED


def model_of(layers=3, width=WIDTH, training=False):
    config = TinyConfig(VOCABULARY, CONTEXT, width=width, layers=layers)
    return TinyDecoder(config, torch.Generator().manual_seed(4)).train(training)


@pytest.mark.parametrize(
    ("cut", "width", "layers"),
    [(Cut(0, 2), WIDTH, 3), (Cut(1, 3), WIDTH, 3), (CUT, 64, 3), (CUT, WIDTH, 4)],
)
def test_neither_party_takes_a_part_of_another_session(cut, width, layers, stream):
    """Cut elsewhere, both would compute something, and the tokens would be wrong in silence."""
    model = model_of(layers, width)
    with pytest.raises(ValueError, match="the session is of"):
        SplitClient(NAME, client_part(model, cut), PROMPT, Plain(), stream)
    with pytest.raises(ValueError, match="the session is of"):
        SplitServer(NAME, server_part(model, cut), stream)


def test_parties_that_describe_the_session_otherwise_do_not_meet(stream):
    """Each side's own description fits its own part; the wire tells them apart."""
    model = model_of()
    theirs = Cut(0, 3)
    asking = SplitClient(NAME, client_part(model, CUT), PROMPT, Plain(), stream, max_new_tokens=3)
    answering = SplitServer(
        dataclasses.replace(NAME, cut=theirs), server_part(model, theirs), stream
    )
    outcome = InMemoryNetwork([asking, answering]).run()
    assert isinstance(outcome.errors["server"], WrongSession)
    assert asking.tokens == []


def test_the_digest_says_all_that_both_sides_must_agree_on():
    others = [
        dataclasses.replace(NAME, **change)
        for change in (
            {"id": bytes([1]) * 16},
            {"client": "another"},
            {"server": "another"},
            {"cut": Cut(0, 2)},
            {"cut": Cut(1, 3)},
            {"width": 31},
            {"layers": 4},
        )
    ]
    assert len({session.digest for session in (NAME, *others)}) == 8
    assert dataclasses.replace(NAME).digest == NAME.digest
    for change in ({"layers": 1}, {"width": 0}):
        with pytest.raises(ValueError, match="does not fit"):
            dataclasses.replace(NAME, **change)


def test_no_party_is_built_on_a_part_that_trains_by_now(stream):
    """The part shares its modules with the whole model, whose train() reaches it after the cut."""
    model = model_of()
    for block in (0, 1):  # one of the client's, one of the server's
        model.blocks[block].mlp.dropout = nn.Dropout(0.5)
    model.eval()
    client, server = client_part(model, CUT), server_part(model, CUT)
    SplitClient(NAME, client, PROMPT, Plain(), stream)
    SplitServer(NAME, server, stream)
    model.train()
    with pytest.raises(ValueError, match="would apply dropout"):
        SplitClient(NAME, client, PROMPT, Plain(), stream)
    with pytest.raises(ValueError, match="would apply dropout"):
        SplitServer(NAME, server, stream)


def test_numbers_that_overflow_the_model_are_the_senders_fault(stream):
    """Finite rows, and what is computed of them is not: no token is chosen by it."""
    model = model_of()
    client, server = client_part(model, CUT), server_part(model, CUT)
    answer = pack_rows(ServerRows, NAME, 0, torch.ones(len(PROMPT), WIDTH))

    def play():
        answering = SplitServer(NAME, server, stream)
        answering.start()
        askings = [
            SplitClient(NAME, client, PROMPT, Plain(), stream, **options)
            for options in ({}, {"max_new_tokens": 3}, {"max_new_tokens": 3, "temperature": 1.0})
        ]
        for asking in askings:
            asking.start()
        return answering, askings

    answering, askings = play()
    assert answering.receive("client", rows_message())
    assert all(asking.receive("server", answer) for asking in askings)
    with torch.no_grad():
        model.blocks[1].mlp.out.weight.fill_(3e38)
        model.head.weight.fill_(3e38)
    answering, askings = play()
    with pytest.raises(NonFiniteResult, match="server's blocks"):
        answering.receive("client", rows_message())
    assert answering.state is State.FAILED
    for asking in askings:
        with pytest.raises(NonFiniteResult, match="logits"):
            asking.receive("server", answer)
        assert (asking.state, asking.tokens, asking.logits_TV) == (State.FAILED, [], None)
    assert issubclass(NonFiniteResult, RemoteProtocolError)
