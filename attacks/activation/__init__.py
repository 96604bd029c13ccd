"""Which prompt did these activations carry? Inversion and distinguishing by an honest re-run."""

from attacks.activation.nearest import nearest_neighbour, prior_only, with_prior
from attacks.activation.pairs import distinguish

__all__ = ["distinguish", "nearest_neighbour", "prior_only", "with_prior"]
