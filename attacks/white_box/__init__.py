"""Was this record trained on? From every noised gradient, by one who knows all other records."""

from attacks.white_box.likelihood import SeenGradients, white_box

__all__ = ["SeenGradients", "white_box"]
