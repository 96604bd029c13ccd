"""Losses of language models, one number an example.

Differential privacy bounds what *one example* adds to a gradient, so no mean may couple examples:
a batch mean over all tokens would divide one example's loss by its neighbours' lengths. The
callables at the end therefore call a model without its labels, for it would form that mean.

Shapes: B = examples, T = tokens, V = vocabulary, R = B * T rows, K = classes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privlm.models.cross_entropy import IGNORE_INDEX, cross_entropy_rows
from privlm.models.decoder import Decoder

Batch = Mapping[str, Tensor]
"""Tensors by their names in transformers, each with the examples as its first dimension."""

BatchLoss = Callable[[nn.Module, Batch], Tensor]
"""(model, batch) -> losses of shape (B,), each of its example alone."""

# They read a table of positions at one row that all examples share, whose gradient then has no
# example to belong to, and count padding on the left as positions. Given a row an example, neither.
_SHARES_POSITIONS = frozenset({"gpt2", "bert"})


class UnknownLossError(ValueError):
    """A guessed loss would have trained the model for something it is not."""


def token_log_probs(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """Log-probability (nats) of each token given those before it.

    The logits at position t predict the token at t + 1.

    Args:
        logits_BTV: What a causal model returned for ``ids_BT``.
        ids_BT: int64 token ids.

    Returns:
        logp_BS: Shape (B, T - 1); column t belongs to token t + 1.

    Raises:
        ValueError: If the shapes disagree.
    """
    if logits_BTV.shape[:-1] != ids_BT.shape:
        raise ValueError(f"logits {tuple(logits_BTV.shape)} do not fit ids {tuple(ids_BT.shape)}")
    logits_BVS = logits_BTV[:, :-1].transpose(1, 2)
    return -F.cross_entropy(logits_BVS, ids_BT[:, 1:], reduction="none")


def per_example_loss(logits_BTV: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean negative log-likelihood (nats) of each example's own target tokens.

    Args:
        logits_BTV: What a causal model returned for ``ids_BT``.
        ids_BT: int64 token ids.
        mask_BT: bool, true where a token is a target; the first column is never one.

    Returns:
        loss_B: An example without any target has loss and gradient zero.

    Raises:
        ValueError: If the shapes disagree.
    """
    if mask_BT.shape != ids_BT.shape:
        raise ValueError(f"mask {tuple(mask_BT.shape)} does not fit ids {tuple(ids_BT.shape)}")
    if logits_BTV.shape[:-1] != ids_BT.shape:
        raise ValueError(f"logits {tuple(logits_BTV.shape)} do not fit ids {tuple(ids_BT.shape)}")
    return next_token_loss(logits_BTV, ids_BT.masked_fill(~mask_BT, IGNORE_INDEX))


def next_token_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """:func:`token_loss` of a causal model: the logits at t answer for the label at t + 1.

    Args:
        logits_BTV: What the model returned.
        labels_BT: int64 as transformers has them: the token ids, not shifted, -100 where a token
            is no target. The first column is never one.

    Returns:
        loss_B: In nats; an example without any target has loss and gradient zero.

    Raises:
        ValueError: If the shapes disagree.
    """
    # The labels move, not the logits: those are the largest tensor of a step.
    return token_loss(logits_BTV, F.pad(labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX))


def token_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean cross-entropy (nats) over each example's own targets; logits at t answer for label t.

    Args:
        logits_BTV: What a masked or sequence-to-sequence model returned. Half precision is
            widened to float32 a few rows at a time.
        labels_BT: int64, -100 where there is no target.

    Returns:
        loss_B: float32, or float64 for such logits; an example without any target has loss and
            gradient zero.

    Raises:
        ValueError: If the shapes disagree.
    """
    if logits_BTV.dim() != 3 or logits_BTV.shape[:-1] != labels_BT.shape:
        raise ValueError(
            f"logits {tuple(logits_BTV.shape)} do not fit labels {tuple(labels_BT.shape)}"
        )
    nll_R = cross_entropy_rows(logits_BTV.flatten(0, 1), labels_BT.flatten())
    targets_B = (labels_BT != IGNORE_INDEX).sum(dim=1).clamp(min=1)
    loss_B: Tensor = nll_R.view(labels_BT.shape).sum(dim=1) / targets_B
    return loss_B


def class_loss(logits_BK: Tensor, label_B: Tensor) -> Tensor:
    """Cross-entropy (nats) of one label an example; -100 gives loss and gradient zero.

    Raises:
        ValueError: If the shapes disagree.
    """
    if logits_BK.dim() != 2 or logits_BK.shape[:1] != label_B.shape:
        raise ValueError(
            f"logits {tuple(logits_BK.shape)} do not fit labels {tuple(label_B.shape)}; "
            "a classifier has one label an example"
        )
    return cross_entropy_rows(logits_BK, label_B)


def causal_lm(model: nn.Module, batch: Batch) -> Tensor:
    """Per-example loss (B,) of a model that predicts the next token, images or sound beside it.

    The first token after padding on the left is no target: only padding could predict it.
    """
    labels_BT, mask_BT = batch["labels"], batch.get("attention_mask")
    if mask_BT is not None and mask_BT.shape == labels_BT.shape:
        after_padding_BT = F.pad(mask_BT[:, :-1] == 0, (1, 0), value=False)
        labels_BT = labels_BT.masked_fill(after_padding_BT, IGNORE_INDEX)
    # A cache of keys and values is of no use in training, and would be one more copy of them.
    return next_token_loss(_logits(model, batch, use_cache=False), labels_BT)


def masked_lm(model: nn.Module, batch: Batch) -> Tensor:
    """Per-example loss (B,) of an encoder at the positions that have a label."""
    return token_loss(_logits(model, batch), batch["labels"])


def sequence_classification(model: nn.Module, batch: Batch) -> Tensor:
    """Per-example loss (B,) of a classifier; ``labels`` has shape (B,)."""
    return class_loss(_logits(model, batch), batch["labels"])


def seq2seq(model: nn.Module, batch: Batch) -> Tensor:
    """Per-example loss (B,) of an encoder-decoder, its decoder fed with the labels one later."""
    extra: dict[str, Any] = {"use_cache": False}
    if "decoder_input_ids" not in batch:
        base: Any = unwrapped(model)
        extra["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(batch["labels"])
    return token_loss(_logits(model, batch, **extra), batch["labels"])


def decoder_lm(model: nn.Module, batch: Batch) -> Tensor:
    """:func:`causal_lm` of a :class:`~privlm.models.decoder.Decoder`, from the same batch.

    ``pixel_values`` (B, C, H, W) and ``input_features`` (B, M, F) precede the text; padding
    stands on the right, where causal attention hides it without a mask.
    """
    renamed: dict[str, Tensor] = {}
    if "pixel_values" in batch:
        renamed["image_BCHW"] = batch["pixel_values"]
    if "input_features" in batch:
        renamed["audio_BFM"] = batch["input_features"].transpose(1, 2)
    return next_token_loss(model(batch["input_ids"], **renamed), batch["labels"])


def loss_for(model: nn.Module) -> BatchLoss:
    """The loss that a model was made for, by the class it is of; wrappers are looked through.

    Raises:
        UnknownLossError: If the class does not tell.
    """
    base = unwrapped(model)
    if isinstance(base, Decoder):
        return decoder_lm
    config: Any = getattr(base, "config", None)
    names = [kind.__name__ for kind in type(base).__mro__]
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        return causal_lm
    if any(name.endswith("ForConditionalGeneration") for name in names):
        return seq2seq if config.is_encoder_decoder else causal_lm
    if any(name.endswith("ForMaskedLM") for name in names):
        return masked_lm
    if any(name.endswith("ForSequenceClassification") for name in names):
        if config.num_labels < 2 or config.problem_type not in (
            None,
            "single_label_classification",
        ):
            raise UnknownLossError(
                f"{names[0]} with problem_type {config.problem_type!r} and {config.num_labels} "
                "labels is no choice among classes; pass a loss of your own, one number an example"
            )
        return sequence_classification
    raise UnknownLossError(
        f"{names[0]} does not tell what it is trained for; pass one of privlm.models.loss, or a "
        "function (model, batch) -> losses of shape (N,), each of its example alone"
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside data-parallel wrappers and peft's adapters."""
    while True:
        inner: Any = model
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            model = inner.get_base_model()
        else:
            return model


def _logits(model: nn.Module, batch: Batch, **extra: Any) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    config: Any = getattr(unwrapped(model), "config", None)
    if getattr(config, "model_type", None) in _SHARES_POSITIONS and "position_ids" not in inputs:
        mask_BT = inputs.get("attention_mask")
        if mask_BT is None:
            mask_BT = torch.ones_like(inputs["input_ids"])
        inputs["position_ids"] = (mask_BT.long().cumsum(dim=1) - 1).clamp(min=0)
    logits: Tensor = model(**inputs, **extra).logits
    return logits
