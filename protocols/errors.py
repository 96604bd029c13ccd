"""What a protocol refuses, named for what the refusal averted.

As in h11, an error says whose fault it is: a `RemoteProtocolError` means that a peer, or whoever
sits on the wire, sent something wrong; a `LocalProtocolError` means that this side used the library
against its contract. Wrong arguments that have nothing to do with a protocol are `ValueError`s.
"""


class ProtocolError(Exception):
    """A step was refused because going on would have been unsafe."""


class LocalProtocolError(ProtocolError):
    """A fault on this side: a bug to mend here."""


class RemoteProtocolError(ProtocolError):
    """A fault of a peer or the network: distrust what was received."""


# Local faults


class KeystreamReused(LocalProtocolError):
    """Two uses of one keystream would reveal the difference of what they hide."""


class PartySpent(LocalProtocolError):
    """A party used twice under the same secrets would let its two runs be compared."""


class UnknownRecipient(LocalProtocolError):
    """A message for nobody would be lost in silence."""


# Remote faults


class MalformedMessage(RemoteProtocolError):
    """Bytes that are no message of the expected form would be misread."""


class OversizedMessage(RemoteProtocolError):
    """A message beyond its stated bound would exhaust memory."""


class WrongVersion(RemoteProtocolError):
    """A message of another protocol version would be misread."""


class UnexpectedMessage(RemoteProtocolError):
    """A message that the protocol does not expect here would put the party into a wrong state."""


class NonCanonicalElement(RemoteProtocolError):
    """Two encodings of one ring element would let a peer smuggle or distinguish."""


class MissingShares(RemoteProtocolError):
    """Too few shares determine nothing: any value would be a guess."""


class DuplicateShare(RemoteProtocolError):
    """One party counted twice would pass for two."""


class InconsistentShares(RemoteProtocolError):
    """Shares that belong to no common secret would open to a value nobody shared."""


class UnusableKey(RemoteProtocolError):
    """A low-order or reflected key would make the agreed secret predictable."""


class BadSignature(RemoteProtocolError):
    """A forged message would be taken for the signer's. Says nothing about why it failed."""


class UntrustedKey(RemoteProtocolError):
    """A key that is unknown, outside its validity period or revoked would be trusted."""


class ConflictingKey(RemoteProtocolError):
    """A second key for a name, or a second name for a key, would let one party pose as another."""


class PeersMissing(RemoteProtocolError):
    """The deadline passed before enough peers had answered; going on would be unsafe."""


class EndlessExchange(RemoteProtocolError):
    """Parties that answer each other without end would never finish."""


class WrongSession(RemoteProtocolError):
    """A message of another run, replayed or misdirected, would be taken for one of this run."""


class TooFewClients(RemoteProtocolError):
    """A sum over too few clients would say nearly what each of them gave."""


class InconsistentSurvivors(RemoteProtocolError):
    """Shares of sums over different clients would open to a sum over nobody."""


class NonFiniteResult(RemoteProtocolError):
    """Numbers from a peer that overflow what is computed of them would pass for an answer."""
