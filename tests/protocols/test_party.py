"""A party plays once, in order, and is closed by its first error."""

import copy
import pickle

import pytest

from protocols.errors import (
    LocalProtocolError,
    PartySpent,
    PeersMissing,
    UnexpectedMessage,
)
from protocols.party import Outgoing, Party, Received, State
from protocols.randomness import Stream


class Waiter(Party):
    """Takes one secret message, from `friend`, and is done."""

    def __init__(self, stream, secret=b"input"):
        super().__init__("waiter", stream, {"secret": secret})

    def _on_start(self):
        return [Outgoing("friend", self._stream.bytes(8))]

    def _on_message(self, sender, data):
        if sender != "friend":
            raise UnexpectedMessage(f"a message from {sender}")
        self._finish()
        return []


def waiter(label="test"):
    return Waiter(Stream(bytes(32), label))


CALLS = {
    "start": lambda party: party.start(),
    "receive": lambda party: party.receive("friend", b""),
    "deadline": lambda party: party.deadline(),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_finished_party_refuses_every_call(call):
    party = waiter()
    party.start()
    party.receive("friend", b"")
    assert party.state is State.FINISHED
    with pytest.raises(PartySpent) as error:
        CALLS[call](party)
    assert isinstance(error.value, LocalProtocolError)
    assert party.state is State.FINISHED


@pytest.mark.parametrize("call", CALLS)
def test_a_failed_party_refuses_every_call(call):
    party = waiter()
    party.start()
    with pytest.raises(UnexpectedMessage):
        party.receive("stranger", b"")
    assert party.state is State.FAILED
    with pytest.raises(PartySpent):
        party.receive("friend", b"")
    with pytest.raises(PartySpent):
        CALLS[call](party)


@pytest.mark.parametrize("call", ["receive", "deadline"])
def test_a_party_must_be_started_first(call):
    party = waiter()
    with pytest.raises(PartySpent, match="when new"):
        CALLS[call](party)
    with pytest.raises(PartySpent):
        party.start()


def test_a_party_starts_once():
    party = waiter()
    party.start()
    with pytest.raises(PartySpent, match="started twice"):
        party.start()
    assert party.state is State.FAILED


@pytest.mark.parametrize(
    "error", [KeyError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit, PeersMissing]
)
@pytest.mark.parametrize("finished", [False, True])
def test_any_error_closes_the_party(error, finished):
    class Buggy(Waiter):
        def _on_message(self, sender, data):
            if finished:
                self._finish()
            raise error(sender)

    party = Buggy(Stream(bytes(32), "test"))
    party.start()
    with pytest.raises(error):
        party.receive("friend", b"")
    assert party.state is State.FAILED
    with pytest.raises(PartySpent):
        party.receive("friend", b"")


def test_parties_do_not_print_and_cannot_be_copied():
    party = waiter()
    assert repr(party) == "Waiter(name='waiter', state=new)"
    party.start()
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(PartySpent, match="copy"):
            attempt(party)
    assert party.receive("friend", b"") == []  # the one and only goes on


def test_parties_under_one_stream_have_their_own_randomness():
    root = Stream(bytes(32), "root")
    first, second = Waiter(root), Waiter(root)
    assert first.view(()).randomness != second.view(()).randomness
    assert first.start()[0].data != second.start()[0].data


def test_received_messages_compare_by_content():
    assert Received("a", b"1") == Received("a", b"1") != Received("a", b"2")


def test_a_view_replays_the_party():
    party = waiter()
    sent = party.start()[0].data
    view = party.view((Received("friend", b"answer"),))
    assert view.stream().bytes(8) == sent
    assert view.inputs == {"secret": b"input"}
    assert view.received[0].data == b"answer"


def test_recorded_library_randomness_is_in_the_view():
    class Drawer(Waiter):
        def _on_start(self):
            self._record_randomness("library key", b"\x07")
            return []

    party = Drawer(Stream(bytes(32), "test"))
    before = party.view(())
    party.start()
    assert set(before.randomness) == {"seed"}
    assert party.view(()).randomness["library key"] == b"\x07"


def test_a_deadline_closes_a_party_that_cannot_go_on():
    party = waiter()
    party.start()
    with pytest.raises(PeersMissing, match="waiter"):
        party.deadline()
    assert party.state is State.FAILED
