"""Was this record trained on? Scores from the released model alone."""

from attacks.membership.scores import MEMBERSHIP, loss, min_k_plus_plus, reference
from attacks.membership.secrets import guess_secrets, guess_secrets_blind

__all__ = [
    "MEMBERSHIP",
    "guess_secrets",
    "guess_secrets_blind",
    "loss",
    "min_k_plus_plus",
    "reference",
]
