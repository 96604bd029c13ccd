"""What shares and masks of a protocol tell of the updates beneath them."""

from attacks.protocol.matching import matching

__all__ = ["matching"]
