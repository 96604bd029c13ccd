"""A decoder as the adversary of aggregation knows it, and the parts of its gradient that tell.

Shape suffixes: B prefixes, t tokens of a prefix, C candidate tokens, T tokens, D width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from attacks.threat import Gradient, OpenModel
from privlm.models.decoder import Decoder, Weight


def open_model(decoder: Decoder, vocabulary_C: Tensor | None = None) -> OpenModel:
    """What anyone with the model can compute of it.

    Args:
        decoder: in evaluation mode; neither copied nor changed.
        vocabulary_C: int64, the ids that a text may hold; all if None.
    """

    @torch.no_grad()
    def attended_after(layer: int, prefix_Bt: Tensor, ids_C: Tensor) -> Tensor:
        prefixes, start = prefix_Bt.shape
        if layer == 0:
            embedded_C1D = decoder.embed_tokens(ids_C[:, None], start)
            rows_CD = decoder.attention_input(embedded_C1D, 0)[:, 0]
            return rows_CD.expand(prefixes, -1, -1)
        cache = decoder.new_cache()
        if start:
            decoder.run_blocks(decoder.embed_tokens(prefix_Bt), cache, 0, layer)
        x_N1D = decoder.embed_tokens(ids_C.repeat(prefixes)[:, None], start)
        x_N1D = decoder.run_blocks(x_N1D, cache.repeat(len(ids_C)), 0, layer)
        return decoder.attention_input(x_N1D, layer).view(prefixes, len(ids_C), decoder.width)

    @torch.no_grad()
    def predict(ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        hidden_BTD = decoder.final_hidden(decoder.run_blocks(decoder.embed_tokens(ids_BT)))
        return hidden_BTD, decoder.head(hidden_BTD)

    return OpenModel(
        vocabulary_C=torch.arange(decoder.vocab_size) if vocabulary_C is None else vocabulary_C,
        layers=decoder.layers,
        width=decoder.width,
        context=decoder.context,
        attended_after=attended_after,
        predict=predict,
        positional=decoder.positional,
        tied=decoder.tied_head,
    )


def gradient_of(
    decoder: Decoder, gradients: Mapping[str, Tensor], resolution: float = 0.0
) -> Gradient:
    """Pick out what the attacks read, by the decoder's own account of its parameters.

    Args:
        decoder: whose gradient it is.
        gradients: by parameter name; a tied matrix once.
        resolution: the step to which entries are rounded, 0 for plain floats.

    Raises:
        KeyError: a parameter that the attacks read is missing.
    """
    roles = decoder.parameter_roles()

    def outputs_first(weight: Weight) -> Tensor:
        return gradients[weight.name].T if weight.in_out else gradients[weight.name]

    return Gradient(
        values=tuple(outputs_first(weight) for weight in roles.values),
        head_VD=gradients[roles.head],
        embedding_VD=gradients[roles.embedding],
        resolution=resolution,
    )
