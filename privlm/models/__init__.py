"""Language models for tests and examples, and the losses every model shares."""

from privlm.models.decoder import Cache, Decoder, ParameterRoles, Weight, generate, next_token
from privlm.models.loss import per_example_loss, token_log_probs
from privlm.models.modalities import log_mel, mel_filterbank, patchify
from privlm.models.tiny import TinyConfig, TinyDecoder

__all__ = [
    "Cache",
    "Decoder",
    "ParameterRoles",
    "TinyConfig",
    "TinyDecoder",
    "Weight",
    "generate",
    "log_mel",
    "mel_filterbank",
    "next_token",
    "patchify",
    "per_example_loss",
    "token_log_probs",
]
