"""Language models for tests and examples, and the losses every model shares."""

from privlm.models.decoder import Cache, Decoder, ParameterRoles, Weight, generate, next_token
from privlm.models.loss import (
    UnknownLossError,
    causal_lm,
    decoder_lm,
    loss_for,
    masked_lm,
    next_token_loss,
    per_example_loss,
    seq2seq,
    sequence_classification,
    token_log_probs,
    token_loss,
)
from privlm.models.modalities import log_mel, mel_filterbank, patchify, whisper_mel
from privlm.models.tiny import TinyConfig, TinyDecoder

__all__ = [
    "Cache",
    "Decoder",
    "ParameterRoles",
    "TinyConfig",
    "TinyDecoder",
    "UnknownLossError",
    "Weight",
    "causal_lm",
    "decoder_lm",
    "generate",
    "log_mel",
    "loss_for",
    "masked_lm",
    "mel_filterbank",
    "next_token",
    "next_token_loss",
    "patchify",
    "per_example_loss",
    "seq2seq",
    "sequence_classification",
    "token_log_probs",
    "token_loss",
    "whisper_mel",
]
