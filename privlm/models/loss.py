"""Losses of causal language models, one number an example.

Differential privacy bounds what *one example* adds to a gradient, so no mean may couple examples:
a batch mean over all tokens would divide one example's loss by its neighbours' lengths.

Shapes: B = examples, T = tokens, V = vocabulary.
"""

from torch import Tensor
from torch.nn import functional as F


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
    target_BS = mask_BT[:, 1:]
    nll_BS = (-token_log_probs(logits_BTV, ids_BT)).masked_fill(~target_BS, 0.0)
    return nll_BS.sum(dim=1) / target_BS.sum(dim=1).clamp(min=1)
