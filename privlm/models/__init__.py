"""Language models for tests and examples, and the losses every model shares."""

from privlm.models.loss import per_example_loss, token_log_probs
from privlm.models.modalities import log_mel, mel_filterbank, patchify
from privlm.models.tiny import Cache, TinyConfig, TinyDecoder, generate

__all__ = [
    "Cache",
    "TinyConfig",
    "TinyDecoder",
    "generate",
    "log_mel",
    "mel_filterbank",
    "patchify",
    "per_example_loss",
    "token_log_probs",
]
