"""All attacks by name."""

from __future__ import annotations

from typing import Any

from attacks.activation import distinguish, nearest_neighbour, with_prior
from attacks.gradient import span
from attacks.membership import MEMBERSHIP
from attacks.protocol import matching
from attacks.threat import Attack
from attacks.white_box import white_box

_EVERY: tuple[Attack[Any], ...] = (
    *MEMBERSHIP,
    white_box,
    span,
    matching,
    nearest_neighbour,
    with_prior,
    distinguish,
)

ATTACKS: dict[str, Attack[Any]] = {attack.name: attack for attack in _EVERY}
"""By the names that a suite uses."""
