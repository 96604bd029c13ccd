# ruff: noqa: D102  (forward is documented by its class, the rest by Decoder)
"""A decoder small enough to read in ten minutes, for tests and examples.

Pre-norm transformer (RMSNorm, rotary positions, causal attention, SwiGLU) over text, with image
patches or log-mel frames as an optional prefix. Every layer with parameters is one that Opacus's
``GradSampleModule`` knows.

Shapes: B = examples, T = text tokens, X = prefix rows (patches or frames), S = X + T positions of
this call, C = cached positions, A = C + S positions attended, D = width, H = heads, E = D / H,
F = width of the MLP, V = vocabulary, P x K = patches, M = mel bands.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privlm.models.decoder import Cache, Decoder, ParameterRoles, Weight
from privlm.models.modalities import patchify

ROTARY_BASE = 10_000.0


@dataclass(frozen=True)
class TinyConfig:
    """Sizes of a ``TinyDecoder``.

    Args:
        vocab_size: V, canary tokens included.
        context: Positions at most, prefix included.
        width: D, divisible by ``2 * heads``.
        layers: Number of blocks.
        heads: H.
        mlp: ``"swiglu"`` (Shazeer 2020) or ``"gelu"`` (tanh form, as GPT-2).
        mlp_width: F; default 8 D / 3 for SwiGLU, 4 D for GELU, so both cost the same.
        tied_head: The head shares the embedding's matrix.
        image_channels: Channels of images; 0 if the model sees none.
        image_patch: Side of a patch in pixels.
        n_mels: M, bands of ``log_mel`` frames; 0 if the model hears nothing.

    Raises:
        ValueError: If a size is out of range or does not divide.
    """

    vocab_size: int
    context: int
    width: int = 64
    layers: int = 2
    heads: int = 4
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    mlp_width: int = 0
    tied_head: bool = False
    image_channels: int = 0
    image_patch: int = 4
    n_mels: int = 0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "width", "layers", "heads", "image_patch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("mlp_width", "image_channels", "n_mels"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width must be a multiple of 2 * heads (rotary positions turn pairs), "
                f"got width {self.width} and {self.heads} heads"
            )
        if self.mlp not in _MLPS:
            raise ValueError(f"mlp must be one of {', '.join(_MLPS)}, got {self.mlp!r}")
        if not self.mlp_width:
            width = 4 * self.width if self.mlp == "gelu" else math.ceil(8 * self.width / 3)
            object.__setattr__(self, "mlp_width", width)


@dataclass(frozen=True)
class Positions:
    """What attention needs to know about this call's positions, the same for every layer."""

    cos_SE: Tensor
    sin_SE: Tensor
    visible_SA: Tensor

    @staticmethod
    def at(cached: int, new: int, head_width: int, like: Tensor) -> "Positions":
        """``new`` positions after ``cached`` ones, rotated as RoFormer's (Su et al. 2021)."""
        position_A = torch.arange(cached + new, device=like.device)
        position_S = position_A[cached:]
        exponent_E = torch.arange(0, head_width, 2, device=like.device).repeat(2) / head_width
        angle_SE = position_S[:, None] * ROTARY_BASE**-exponent_E
        return Positions(
            angle_SE.cos().to(like.dtype),
            angle_SE.sin().to(like.dtype),
            position_A <= position_S[:, None],
        )

    def rotate(self, x_BHSE: Tensor) -> Tensor:
        """Turn each pair (e, e + E/2) by its angle."""
        first, second = x_BHSE.chunk(2, dim=-1)
        return x_BHSE * self.cos_SE + torch.cat([-second, first], dim=-1) * self.sin_SE


class Attention(nn.Module):
    """Causal attention; separate layers give attacks separate gradients of query, key, value."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query = nn.Linear(config.width, config.width, bias=False)
        self.key = nn.Linear(config.width, config.width, bias=False)
        self.value = nn.Linear(config.width, config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(
        self, x_BSD: Tensor, positions: Positions, layer: int, cache: Cache | None
    ) -> Tensor:
        query, key, value = (
            project(x_BSD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        query, key = positions.rotate(query), positions.rotate(key)
        if cache is not None:
            key, value = cache.extend(layer, key, value)
        mixed_BHSE = F.scaled_dot_product_attention(
            query, key, value, attn_mask=positions.visible_SA
        )
        out: Tensor = self.out(mixed_BHSE.transpose(1, 2).flatten(-2))
        return out


class SwiGlu(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.mlp_width, bias=False)
        self.up = nn.Linear(config.width, config.mlp_width, bias=False)
        self.out = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        out: Tensor = self.out(F.silu(self.gate(x_BSD)) * self.up(x_BSD))
        return out


class Gelu(nn.Module):
    """out(gelu(up(x))), the tanh form of GPT-2."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, config.mlp_width, bias=False)
        self.out = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        out: Tensor = self.out(F.gelu(self.up(x_BSD), approximate="tanh"))
        return out


_MLPS: dict[str, type[SwiGlu] | type[Gelu]] = {"swiglu": SwiGlu, "gelu": Gelu}


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.mlp = _MLPS[config.mlp](config)

    def forward(
        self, x_BSD: Tensor, positions: Positions, layer: int, cache: Cache | None = None
    ) -> Tensor:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), positions, layer, cache)
        out: Tensor = x_BSD + self.mlp(self.mlp_norm(x_BSD))
        return out


class TinyDecoder(Decoder):
    """The decoder: ``embed`` -> ``blocks`` -> ``norm`` -> ``head``.

    Second derivatives (gradient inversion) and ``torch.func.vmap`` (shadow models) need
    ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`` around them: torch's fused attention has
    neither a second derivative nor a batching rule.

    Args:
        config: Sizes.
        generator: Source of the initial parameters; the global generator is not touched.
    """

    def __init__(self, config: TinyConfig, generator: torch.Generator) -> None:
        super().__init__(
            vocab_size=config.vocab_size,
            width=config.width,
            layers=config.layers,
            context=config.context,
            tied_head=config.tied_head,
            positional=False,  # rotary positions turn queries and keys inside the blocks
        )
        self.config = config
        with torch.device("meta"):  # the layers' own initialisation would draw global randomness
            self.embed = nn.Embedding(config.vocab_size, config.width)
            patch_size = config.image_channels * config.image_patch**2
            self.image = nn.Linear(patch_size, config.width) if patch_size else None
            self.audio = nn.Linear(config.n_mels, config.width) if config.n_mels else None
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
            self.norm = nn.RMSNorm(config.width, eps=1e-6)
            self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.to_empty(device=generator.device)
        self._initialise(generator)
        if config.tied_head:
            self.head.weight = self.embed.weight

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        """Normal with variance 1 / fan-in; what joins the residual stream shrinks with depth.

        Every addition to the residual stream is divided by sqrt(2 layers), as GPT-2 does, and
        embedding and head start small, so that the first predictions are near uniform.
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            std = parameter.shape[1] ** -0.5
            if name.endswith("out.weight"):
                std /= math.sqrt(2 * self.config.layers)
            if name == "head.weight":
                std /= 4.0
            parameter.normal_(0.0, std, generator=generator)

    def forward(
        self,
        ids_BT: Tensor,
        image_BCHW: Tensor | None = None,
        audio_BFM: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Logits over the next token at every text position.

        Args:
            ids_BT: int64 token ids, T >= 1.
            image_BCHW: float pixels, about [0, 1]; their patches precede the text.
            audio_BFM: ``log_mel`` frames; they precede the text, after the image.
            cache: Positions already seen; this call's are appended. Image and audio go with
                the first call.

        Returns:
            logits_BTV: At text positions only, so every loss is a loss on text.

        Raises:
            ValueError: If ids have no (B, T) shape, a prefix is given that the configuration has
                no input for, its size is wrong, or the positions exceed the context.
        """
        if cache is not None and cache.length and (image_BCHW is not None or audio_BFM is not None):
            raise ValueError("image and audio precede the text; give them with the first call")
        x_BSD = self.embed_inputs(ids_BT, image_BCHW, audio_BFM)
        x_BSD = self.run_blocks(x_BSD, cache)
        return self.predict(x_BSD[:, -ids_BT.shape[1] :])

    def embed_tokens(self, ids_BT: Tensor, start: int = 0) -> Tensor:
        return self.embed_inputs(ids_BT)

    def attention_input(self, x_BTD: Tensor, layer: int) -> Tensor:
        rows_BTD: Tensor = self.get_submodule(f"blocks.{layer}.attention_norm")(x_BTD)
        return rows_BTD

    def parameter_roles(self) -> ParameterRoles:
        values = (Weight(f"blocks.{layer}.attention.value.weight") for layer in range(self.layers))
        head = "embed.weight" if self.tied_head else "head.weight"
        return ParameterRoles(tuple(values), head, "embed.weight")

    def embed_inputs(
        self,
        ids_BT: Tensor,
        image_BCHW: Tensor | None = None,
        audio_BFM: Tensor | None = None,
    ) -> Tensor:
        """Rows of the residual stream, image before audio before text: x_BSD."""
        if ids_BT.dim() != 2 or ids_BT.shape[1] < 1:
            raise ValueError(f"ids have shape (B, T) with T >= 1, got {tuple(ids_BT.shape)}")
        rows = [self.embed(ids_BT)]
        if audio_BFM is not None:
            if self.audio is None:
                raise ValueError("the model has no audio input; set n_mels in its TinyConfig")
            if audio_BFM.dim() != 3 or audio_BFM.shape[2] != self.config.n_mels:
                raise ValueError(
                    f"audio has shape (B, F, {self.config.n_mels}), got {tuple(audio_BFM.shape)}"
                )
            rows.insert(0, self.audio(audio_BFM))
        if image_BCHW is not None:
            if self.image is None:
                raise ValueError(
                    "the model has no image input; set image_channels in its TinyConfig"
                )
            if image_BCHW.dim() != 4 or image_BCHW.shape[1] != self.config.image_channels:
                raise ValueError(
                    f"images have shape (B, {self.config.image_channels}, H, W), "
                    f"got {tuple(image_BCHW.shape)}"
                )
            rows.insert(0, self.image(patchify(image_BCHW, self.config.image_patch)))
        return torch.cat(rows, dim=1) if len(rows) > 1 else rows[0]

    def run_blocks(
        self, x_BTD: Tensor, cache: Cache | None = None, first: int = 0, last: int | None = None
    ) -> Tensor:
        cached = cache.length if cache is not None else 0
        if cached + x_BTD.shape[1] > self.config.context:
            raise ValueError(
                f"{cached} cached and {x_BTD.shape[1]} new positions exceed the context of "
                f"{self.config.context}"
            )
        head_width = self.config.width // self.config.heads
        positions = Positions.at(cached, x_BTD.shape[1], head_width, x_BTD)
        for layer, block in enumerate(self.blocks[first:last]):
            x_BTD = block(x_BTD, positions, layer, cache)
        return x_BTD
