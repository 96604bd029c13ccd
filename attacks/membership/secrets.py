"""Which of these secrets did the model see behind its prompt? The attack behind exposure."""

from __future__ import annotations

from attacks.threat import ReleasedModel, Scores


def guess_secrets(view: ReleasedModel) -> Scores:
    """Log-likelihood of every candidate secret after its prompt; shape (N, C).

    Source: Carlini et al. 2019, "The Secret Sharer"; the rank of the planted
    secret among the candidates is its exposure, and only the scorer knows it.

    Raises:
        ValueError: the view has no secrets to guess.
    """
    return Scores("secrets", view.released.secret_logp_NC)


def guess_secrets_blind(view: ReleasedModel) -> Scores:
    """The same guess by a model that never saw a secret: what prompts and digits give away."""
    return Scores("secrets, blind", view.reference.secret_logp_NC)
