"""Canaries: records made to be memorised, so that an audit measures the worst case.

Shapes: N = canaries, T = tokens of context, C = candidates, K = tokens of a secret.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from privlm.data.blocks import TokenBlocks
from privlm.data.errors import DataError
from privlm.data.tokenization import Tokenizer
from protocols.randomness import Stream


@dataclass(frozen=True)
class Canary:
    """A prompt and the secret that follows it.

    Two kinds: a *secret* canary's secret is drawn uniformly from ``alphabet_ids``^K, so its rank
    among that space measures exposure (Carlini et al. 2019, "The Secret Sharer"); a *new-token*
    canary has no alphabet and is built of ids used nowhere else (Panda et al. 2025, "Privacy
    Auditing of Large Language Models").

    Raises:
        DataError: If the secret is empty or leaves its alphabet, or the alphabet repeats an id.
    """

    id: str
    prompt_ids: tuple[int, ...]
    secret_ids: tuple[int, ...] = field(repr=False)
    alphabet_ids: tuple[int, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if not self.secret_ids:
            raise DataError(f"canary {self.id!r} has an empty secret")
        if len(set(self.alphabet_ids)) != len(self.alphabet_ids):
            raise DataError(f"the alphabet of canary {self.id!r} repeats an id")
        if self.alphabet_ids and not set(self.secret_ids) <= set(self.alphabet_ids):
            raise DataError(f"the secret of canary {self.id!r} leaves its alphabet")

    @property
    def space(self) -> int:
        """|R|, the number of secrets this one was drawn from; 1 for a new-token canary."""
        return len(self.alphabet_ids) ** len(self.secret_ids) if self.alphabet_ids else 1

    @property
    def max_exposure(self) -> float:
        """log2 |R|, the exposure in bits of a secret that ranks first (Carlini et al. 2019)."""
        return math.log2(self.space)

    def candidates(self, count: int, stream: Stream) -> npt.NDArray[np.int64]:
        """Draw alternative secrets, all different, none the planted one, uniformly at random.

        Before training sees it, the planted secret is one more uniform draw: its rank among
        ``count`` candidates is uniform under the null hypothesis.

        Returns:
            secret_CK: int64 token ids, shape (count, K).

        Raises:
            DataError: If the canary has no alphabet, or ``count`` exceeds |R| - 1.
        """
        if not self.alphabet_ids:
            raise DataError(f"canary {self.id!r} was drawn from no alphabet; it has no candidates")
        if not 0 < count < self.space:
            raise DataError(
                f"canary {self.id!r} has {self.space - 1} alternatives to its secret, "
                f"cannot draw {count}; lengthen the secret or draw fewer"
            )
        base, length = len(self.alphabet_ids), len(self.secret_ids)
        rank_of = {token: rank for rank, token in enumerate(self.alphabet_ids)}
        planted = tuple(rank_of[token] for token in self.secret_ids)
        drawn: dict[tuple[int, ...], None] = {}
        if count > self.space // 2:  # rejection would crawl; the whole space is small
            for index in stream.permutation(self.space):
                drawn[tuple(int(i) for i in np.unravel_index(index, (base,) * length))] = None
            drawn.pop(planted)
        while len(drawn) < count:
            rows_CK = stream.integers(base, (2 * (count - len(drawn)), length))
            drawn.update((tuple(int(i) for i in row), None) for row in rows_CK)
            drawn.pop(planted, None)
        chosen_CK = np.array(list(drawn)[:count], dtype=np.int64)
        return np.array(self.alphabet_ids, dtype=np.int64)[chosen_CK]


def secret_canaries(
    prompts: Sequence[Sequence[int]],
    alphabet_ids: Sequence[int],
    secret_length: int,
    stream: Stream,
) -> tuple[Canary, ...]:
    """One canary a prompt, each with its own uniform secret of ``secret_length`` tokens.

    Args:
        prompts: Token ids of natural text, all different.
        alphabet_ids: At least two existing tokens, such as those of the ten digits.
        secret_length: K.
        stream: Source of the secrets.

    Raises:
        DataError: If prompts are missing, empty or repeat, or the alphabet or length is too small.
    """
    distinct = {tuple(prompt) for prompt in prompts}
    if not prompts or () in distinct or len(distinct) != len(prompts):
        raise DataError("secret canaries need prompts, none empty, all different")
    if len(set(alphabet_ids)) < 2 or secret_length < 1:
        raise DataError(
            f"a secret needs two symbols and one position at least, got {len(set(alphabet_ids))} "
            f"and {secret_length}"
        )
    alphabet = tuple(alphabet_ids)
    rank_NK = stream.integers(len(alphabet), (len(prompts), secret_length))
    return tuple(
        Canary(
            f"secret-canary-{n}", tuple(prompt), tuple(alphabet[rank] for rank in rank_K), alphabet
        )
        for n, (prompt, rank_K) in enumerate(zip(prompts, rank_NK.tolist(), strict=True))
    )


def new_token_canaries(
    tokenizer: Tokenizer, count: int, tokens_each: int = 2
) -> tuple[Canary, ...]:
    """``count`` canaries of ``tokens_each`` reserved ids that no other record holds.

    The gradient of such a canary reaches embedding and head rows that nothing else raises, so
    canaries barely interfere with each other or with text: the strongest signal that an adversary
    who only sees the released model can plant (Panda et al. 2025). All but the last token are the
    prompt; with ``tokens_each=1`` the canary is planted with ``fill="repeat"``.

    Raises:
        DataError: If the tokenizer has reserved fewer than ``count * tokens_each`` ids.
    """
    if count < 1 or tokens_each < 1:
        raise DataError(f"count and tokens_each must be positive, got {count} and {tokens_each}")
    reserved = tokenizer.reserved_ids
    needed = count * tokens_each
    if needed > len(reserved):
        raise DataError(
            f"{count} new-token canaries of {tokens_each} tokens need {needed} reserved ids, the "
            f"tokenizer has {len(reserved)}; call reserve({needed - len(reserved)})"
        )
    rows = [tuple(reserved[n * tokens_each : (n + 1) * tokens_each]) for n in range(count)]
    return tuple(Canary(f"token-canary-{n}", row[:-1], row[-1:]) for n, row in enumerate(rows))


def plant(
    canaries: Sequence[Canary],
    context: int,
    end_id: int,
    *,
    fill: Literal["pad", "repeat"] = "pad",
    loss_on: Literal["all", "secret"] = "all",
) -> TokenBlocks:
    """Lay each canary out as one record of ``context`` tokens, its own document and user.

    Args:
        canaries: With different ids.
        context: T.
        end_id: The token at padded positions.
        fill: ``"pad"`` writes the canary once; ``"repeat"`` as often as it fits whole.
        loss_on: Targets: every token, as a trainer unaware of canaries has it, or secrets alone,
            as an attack scores them.

    Raises:
        DataError: If there are no canaries, ids repeat, one does not fit, or nothing before the
            only secret token could predict it.
    """
    if not canaries:
        raise DataError("there are no canaries to plant")
    ids_NT = torch.full((len(canaries), context), end_id, dtype=torch.int64)
    mask_NT = torch.zeros((len(canaries), context), dtype=torch.bool)
    for n, canary in enumerate(canaries):
        once = canary.prompt_ids + canary.secret_ids
        if len(once) > context:
            raise DataError(
                f"canary {canary.id!r} has {len(canary.prompt_ids)} prompt and "
                f"{len(canary.secret_ids)} secret tokens, the context holds {context}"
            )
        times = context // len(once) if fill == "repeat" else 1
        if times * len(once) < 2:
            raise DataError(
                f"canary {canary.id!r} is a single token that nothing stands before; "
                "plant it with fill='repeat' or give it a prompt"
            )
        target = [loss_on == "all"] * len(canary.prompt_ids) + [True] * len(canary.secret_ids)
        ids_NT[n, : times * len(once)] = torch.tensor(once * times)
        mask_NT[n, : times * len(once)] = torch.tensor(target * times)
    names = tuple(canary.id for canary in canaries)
    return TokenBlocks(ids_NT, mask_NT, names, names, names)
