# ruff: noqa: D102  (forward is documented by its class)
"""What everything that cuts, probes or continues a model may ask of it, whoever built it.

Shapes: B = examples, T = positions of this call, C = cached positions, A = C + T attended,
D = width, H = heads, E = D / H, V = vocabulary.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class Cache:
    """Keys and values of the positions already seen, one pair a layer; grows as it is used."""

    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False)

    @property
    def length(self) -> int:
        """C, positions held."""
        return self.layers[0][0].shape[2] if self.layers else 0

    def extend(self, layer: int, key_BHTE: Tensor, value_BHTE: Tensor) -> tuple[Tensor, Tensor]:
        """Append to a layer; returns all its keys and values (B, H, A, E)."""
        if layer == len(self.layers):
            self.layers.append((key_BHTE, value_BHTE))
        else:
            key, value = self.layers[layer]
            self.layers[layer] = (
                torch.cat([key, key_BHTE], dim=2),
                torch.cat([value, value_BHTE], dim=2),
            )
        return self.layers[layer]

    def repeat(self, times: int) -> "Cache":
        """A cache with each row ``times`` times, one after the other; this one stays as it is."""
        return Cache(
            [
                (key.repeat_interleave(times, dim=0), value.repeat_interleave(times, dim=0))
                for key, value in self.layers
            ]
        )


@dataclass(frozen=True)
class Weight:
    """A matrix among the named parameters; ``in_out``: stored (in, out), not (out, in)."""

    name: str
    in_out: bool = False


@dataclass(frozen=True)
class ParameterRoles:
    """Names of the parameters whose gradients tell of the text.

    Attributes:
        values: For each layer, what makes the values of ``attention_input``: the value projection
            alone, or query, key and value in one.
        head: Output head (V, D); with a tied head the embedding.
        embedding: Token embedding (V, D).
    """

    values: tuple[Weight, ...]
    head: str
    embedding: str


class Decoder(nn.Module, ABC):
    """A causal language model: ``embed_tokens``, then ``blocks``, then ``norm`` and ``head``.

    Apart from the modules in ``blocks``, every child belongs to the ends: embedding, norm, head.
    It has no parameters or buffers but those of its children, or it could not be cut in two.

    Args:
        vocab_size: V.
        width: D.
        layers: Number of blocks.
        context: Positions at most.
        tied_head: The head shares the embedding's matrix.
        positional: ``embed_tokens`` depends on the position, not on the token alone.
    """

    blocks: nn.ModuleList
    norm: nn.Module
    head: nn.Linear

    def __init__(
        self,
        *,
        vocab_size: int,
        width: int,
        layers: int,
        context: int,
        tied_head: bool,
        positional: bool,
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.width = width
        self.layers = layers
        self.context = context
        self.tied_head = tied_head
        self.positional = positional

    @abstractmethod
    def embed_tokens(self, ids_BT: Tensor, start: int = 0) -> Tensor:
        """Residual stream x_BTD of tokens at positions ``start`` to ``start + T - 1``.

        Raises:
            ValueError: If ids have no (B, T) shape.
        """

    @abstractmethod
    def run_blocks(
        self, x_BTD: Tensor, cache: Cache | None = None, first: int = 0, last: int | None = None
    ) -> Tensor:
        """Pass the residual stream through blocks ``first`` up to, not including, ``last``.

        The cache of a partial run counts layers from ``first``.

        Raises:
            ValueError: If cached and new positions exceed the context.
        """

    @abstractmethod
    def attention_input(self, x_BTD: Tensor, layer: int) -> Tensor:
        """What the query, key and value projections of ``layer`` multiply, given its input."""

    @abstractmethod
    def parameter_roles(self) -> ParameterRoles:
        """Names among ``named_parameters()``."""

    def new_cache(self) -> Cache:
        return Cache()

    def final_hidden(self, x_BTD: Tensor) -> Tensor:
        """What the head multiplies, given the output of the last block."""
        hidden_BTD: Tensor = self.norm(x_BTD)
        return hidden_BTD

    def predict(self, x_BTD: Tensor) -> Tensor:
        """Logits over the next token, given the output of the last block."""
        logits_BTV: Tensor = self.head(self.final_hidden(x_BTD))
        return logits_BTV

    def forward(self, ids_BT: Tensor, *, cache: Cache | None = None) -> Tensor:
        start = cache.length if cache is not None else 0
        return self.predict(self.run_blocks(self.embed_tokens(ids_BT, start), cache))


def next_token(
    logits_BV: Tensor, temperature: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    """Choose a token for each row: (B, 1).

    Args:
        logits_BV: Over the next token.
        temperature: 0 takes the likeliest token; else logits are divided by it and sampled.
        generator: Needed if ``temperature`` is positive.

    Raises:
        ValueError: If the temperature is negative or not finite, or positive without a generator.
    """
    if not 0 <= temperature < math.inf or (temperature > 0 and generator is None):
        raise ValueError(
            f"temperature must be 0, or positive with a generator, and finite; got {temperature}"
        )
    if temperature == 0:
        return logits_BV.argmax(dim=-1, keepdim=True)
    return torch.multinomial(tempered(logits_BV, temperature), 1, generator=generator)


def tempered(logits_BV: Tensor, temperature: float) -> Tensor:
    """softmax(logits / temperature) for a temperature > 0, however small: (B, V)."""
    # With the greatest at 0 first, dividing can overflow towards minus infinity alone.
    below_BV = logits_BV - logits_BV.amax(dim=-1, keepdim=True)
    least = torch.finfo(below_BV.dtype).tiny  # its reciprocal is finite
    return (below_BV / max(temperature, least)).softmax(dim=-1)


@torch.no_grad()
def generate(
    model: Decoder,
    prompt_BT: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    **prefix: Tensor,
) -> Tensor:
    """Continue prompts of equal length, one token at a time.

    Args:
        model: The decoder.
        prompt_BT: int64 token ids.
        max_new_tokens: Tokens to add.
        temperature: 0 takes the likeliest token; else logits are divided by it and sampled.
        generator: Needed if ``temperature`` is positive.
        prefix: What else the model takes with its first call, such as ``image_BCHW``.

    Returns:
        ids: int64, shape (B, T + max_new_tokens), prompt included.

    Raises:
        ValueError: If an argument is out of range or the context overflows.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be positive, got {max_new_tokens}")
    cache = model.new_cache()
    ids_BT, new_BT = prompt_BT, prompt_BT
    for step in range(max_new_tokens):
        logits_BTV = model(new_BT, **(prefix if step == 0 else {}), cache=cache)
        new_BT = next_token(logits_BTV[:, -1], temperature, generator)
        ids_BT = torch.cat([ids_BT, new_BT], dim=1)
    return ids_BT
