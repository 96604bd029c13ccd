"""What single layers give away exactly: inputs, labels and tokens by arithmetic alone.

Shape suffixes: V vocabulary, D width, I inputs, O outputs, M predictions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def linear_input(weight_grad_OI: Tensor, bias_grad_O: Tensor) -> Tensor:
    """The input x_I of a linear layer with a bias that saw one row: dW = db xᵀ (Phong et al. 2017).

    Solved by least squares over all outputs, x = dWᵀ db / |db|², so that no single small entry of
    the bias gradient is divided by.

    Raises:
        ValueError: the bias gradient is zero; nothing of the input is in the gradient.
    """
    weight, bias = weight_grad_OI.double(), bias_grad_O.double()
    energy = bias.square().sum()
    if not energy > 0:
        raise ValueError("the bias gradient is zero, so the gradient tells nothing of the input")
    return weight.T @ bias / energy


def label_of(head_grad_VD: Tensor) -> int:
    """The label of one prediction, from the gradient of the head's weight.

    Row v is (p_v - [v = label]) h. iDLG (Zhao et al. 2020) takes the one row of opposite sign; as
    1 - p_label = Σ p_v over the others, that is also the longest row, whatever the sign of h.
    A tie needs all the probability on one wrong token.
    """
    return int(head_grad_VD.double().square().sum(1).argmax())


def embedding_tokens(embedding_grad_VD: Tensor) -> Tensor:
    """Ids, ascending, of tokens that were read: the nonzero rows of an untied embedding's gradient.

    A text's last token is read by nobody under a shifted causal loss, and is not among them.
    """
    return embedding_grad_VD.ne(0).any(1).nonzero().flatten()


class PredictionErrors(NamedTuple):
    """What each of M predictions contributed to V rows of the head's gradient.

    Attributes:
        errors_MV: float64.
        noise_std_MV: standard deviation of their entries.
        outside_V: squared length of what no contribution explains.
    """

    errors_MV: Tensor
    noise_std_MV: Tensor
    outside_V: Tensor


def prediction_errors(head_grad_VD: Tensor, hidden_MD: Tensor) -> PredictionErrors:
    """What each prediction contributed to the head: dW = Eᵀ H, so E = (dW H⁺)ᵀ, with H known.

    For the loss Σ_m scale_m · cross-entropy_m, row m of E is scale_m (P_m - Y_m). Its noise is told
    by what of each row of the gradient lies outside the rows of H, where an exact gradient of these
    inputs has nothing.

    Args:
        head_grad_VD: gradient of the head's weight; any subset of its rows will do.
        hidden_MD: the head's inputs, M < D and linearly independent.

    Raises:
        ValueError: there are as many inputs as dimensions, or they depend on each other.
    """
    head, hidden = head_grad_VD.double(), hidden_MD.double()
    inputs, width = hidden.shape
    if inputs >= width:
        raise ValueError(f"{inputs} inputs of the head do not fit into {width} dimensions")
    basis_DM, triangle_MM = torch.linalg.qr(hidden.T)
    diagonal = triangle_MM.diagonal().abs()
    if not diagonal.min() > torch.finfo(torch.float32).eps * diagonal.max():
        raise ValueError("the inputs of the head depend on each other, no error is any one's own")
    coordinates_VM = head @ basis_DM
    outside_V = (head - coordinates_VM @ basis_DM.T).square().sum(1)
    # A row's own rounding grows with its entries; few free dimensions alone would misjudge it.
    std_V = (outside_V.clamp(min=float(outside_V.mean())) / (width - inputs)).sqrt()
    inverse_MM = torch.linalg.solve_triangular(
        triangle_MM, torch.eye(inputs, dtype=torch.float64), upper=True
    )
    return PredictionErrors(
        inverse_MM @ coordinates_VM.T, inverse_MM.norm(dim=1)[:, None] * std_V, outside_V
    )


def labels(head_grad_VD: Tensor, hidden_MD: Tensor) -> Tensor:
    """The label of each of M predictions whose inputs to the head are known: int64 (M,).

    The most negative entry of scale_m (P_m - Y_m): exact, and free of the scale.

    Raises:
        ValueError: as :func:`prediction_errors`.
    """
    return prediction_errors(head_grad_VD, hidden_MD).errors_MV.argmin(1)
