"""What a model's first batch is tried under, before any sum of its gradients is trusted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

SHAKEN_BY = 0.02
"""Standard deviation of what is added to every weight while a model is tried."""

State = dict[str, tuple[int, int]]


class WithoutDropout(TorchFunctionMode):
    """Training mode without its randomness: two passes over one example then agree."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called by torch for every one of its functions."""
        named = dict(kwargs or {})
        if func in _DROPOUTS:
            return args[0] if args else named["input"]
        if func is F.scaled_dot_product_attention:
            named.pop("dropout_p", None)
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
        return func(*args, **named)


_DROPOUTS = {
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
    torch.dropout,
}


@contextlib.contextmanager
def shaken(parameters: tuple[Tensor, ...]) -> Iterator[None]:
    """Weights a little off, and bitwise their own again afterwards.

    A gate that begins at zero, such as LoRA's, hides all that is behind it from a comparison of
    gradients.
    """
    generator = torch.Generator().manual_seed(0)
    kept = [parameter.detach().clone() for parameter in parameters]
    try:
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator) * SHAKEN_BY
            parameter.data.add_(noise.to(parameter))
        yield
    finally:
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.data.copy_(value)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and the buffers that are saved with them, by name."""
    return dict(model.named_parameters()) | {
        f"{prefix}.{name}".lstrip("."): buffer
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def versions(model: nn.Module) -> State:
    """Which tensors the model's state is, and how often each was written to."""
    return {name: (id(value), value._version) for name, value in state_of(model).items()}


def written(model: nn.Module, before: State) -> list[str]:
    """Names of what was written to since ``before``, or is another buffer now."""
    return [
        name
        for name, (identity, version) in versions(model).items()
        if name in before
        and (identity, version) != before[name]
        # Sharded training puts other tensors in the place of parameters, and back.
        and (identity == before[name][0] or not isinstance(state_of(model)[name], nn.Parameter))
    ]


def sums(model: nn.Module) -> dict[str, str]:
    """Of each tensor of the state its sum and that of its magnitudes: writes past torch show."""
    found = {}
    for name, value in state_of(model).items():
        if not hasattr(value, "to_local") and value.is_floating_point():
            exact = value.detach().double()
            found[name] = f"{float(exact.sum())} {float(exact.abs().sum())}"  # NaN equals itself
    return found
