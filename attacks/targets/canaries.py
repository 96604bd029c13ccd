"""Records made to be memorised, each planted or not by its own coin.

Shape suffixes: N candidate records, K secret canaries, C candidate secrets, T tokens.
"""

from __future__ import annotations

import math
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from attacks.threat import SecretSlots
from privlm.config import AtLeastOne, NotNegative
from privlm.data import Canary, DataError, plant, secret_canaries
from privlm.finetuning import Corpus
from privlm.models import TinyDecoder
from protocols.randomness import Stream

DIGITS = "0123456789"


class CanaryConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Records made to be memorised, each planted or not by its own coin.

    ``new_token`` canaries are documents of one token that nothing else uses: the
    strongest signal for the bound on ε that a document can carry. ``secrets`` are
    ``secret_digits`` random digits after ``prompt_tokens`` of public text; the
    attack picks one of ``candidates``. ``gradients`` are records of DP-SGD that are a
    gradient each (:mod:`privlm.dp.canaries`); as many coordinates besides are watched.
    """

    new_token: Annotated[int, msgspec.Meta(ge=100)] = 1000
    secrets: NotNegative = 100
    secret_digits: AtLeastOne = 6
    prompt_tokens: AtLeastOne = 12
    candidates: Annotated[int, msgspec.Meta(ge=2)] = 256
    gradients: Annotated[int, msgspec.Meta(ge=100, le=10**6)] = 2400


def token_canaries(corpus: Corpus) -> list[Canary]:
    """One document a reserved token, which holds nothing but that token."""
    end_id = corpus.tokenizer.end_id
    return [
        Canary(f"token-canary-{n}", (end_id,), (token,))
        for n, token in enumerate(corpus.tokenizer.reserved_ids)
    ]


@torch.no_grad()
def level(model: TinyDecoder, corpus: Corpus) -> None:
    """Teach the public model that canary tokens stand at a document's start and nowhere else.

    All of them get one output row, by least squares on the hidden states of public
    text: about 99% of the probability where a document starts, about 1% of it
    elsewhere, so that text hardly notices them. Where they are expected and alike,
    the gradient that one of them sends back into the model, Σ p_v w_v − w_u,
    vanishes: nearly all of its clipped norm lies in its own output row, which no
    other record raises. That is as close to a Dirac gradient (Nasr et al. 2023) as
    a document can come; the private training is not touched.
    """
    end_id, canary_tokens = corpus.tokenizer.end_id, corpus.tokenizer.reserved_ids
    starts_BT = torch.full((1, 1), end_id)
    hidden_MD = torch.cat(
        [
            model.norm(model.run_blocks(model.embed_inputs(ids))).flatten(0, 1)
            for ids in (corpus.blocks.public.ids_NT[:256], starts_BT)
        ]
    )
    words = model.head.weight[: canary_tokens.start]
    others_M = (hidden_MD @ words.T).logsumexp(1) - math.log(len(canary_tokens))
    is_start_M = torch.arange(len(hidden_MD)) == len(hidden_MD) - 1
    wanted_M = torch.where(is_start_M, others_M + math.log(99), others_M - math.log(99))
    weight_M = torch.where(is_start_M, float(len(hidden_MD)), 1.0).sqrt()
    solved = torch.linalg.lstsq(weight_M[:, None] * hidden_MD, (weight_M * wanted_M)[:, None])
    rows = model.head.weight[canary_tokens.start : canary_tokens.stop]
    rows.copy_(solved.solution.T.expand_as(rows))


def draw_secrets(corpus: Corpus, config: CanaryConfig, stream: Stream) -> tuple[Canary, ...]:
    """Secrets behind the opening tokens of public records."""
    prompts = list(
        dict.fromkeys(
            tuple(row[: config.prompt_tokens].tolist())
            for row, length in zip(
                corpus.blocks.public.ids_NT, corpus.blocks.public.length_N, strict=True
            )
            if length >= config.prompt_tokens
        )
    )
    if len(prompts) < config.secrets:
        raise DataError(
            f"training.canaries.secrets: {config.secrets} prompts of {config.prompt_tokens} tokens "
            f"are needed, the public documents offer {len(prompts)}; plant fewer secrets or raise "
            "corpus.public_share"
        )
    digits = [corpus.tokenizer.encode(digit)[0] for digit in DIGITS]
    return secret_canaries(prompts[: config.secrets], digits, config.secret_digits, stream)


def hide(
    canaries: tuple[Canary, ...], count: int, context: int, end_id: int, stream: Stream
) -> tuple[SecretSlots, npt.NDArray[np.int64]]:
    """Each canary's secret among random alternatives, at a random place."""
    place_K = stream.integers(count, len(canaries)).astype(np.int64)
    ids, targets = [], []
    for canary, place in zip(canaries, place_K.tolist(), strict=True):
        others = canary.candidates(count - 1, stream)
        lineup = np.insert(others, place, np.array(canary.secret_ids), axis=0)
        rows = plant(
            [
                Canary(str(c), canary.prompt_ids, tuple(secret), canary.alphabet_ids)
                for c, secret in enumerate(lineup.tolist())
            ],
            context,
            end_id,
            loss_on="secret",
        )
        ids.append(rows.ids_NT)
        targets.append(rows.mask_NT)
    return SecretSlots(torch.stack(ids), torch.stack(targets), canaries[0].space), place_K
