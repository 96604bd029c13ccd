"""A model update as one vector, and back.

Shapes: P = parameters of the update, B = examples, T = tokens, V = vocabulary.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import msgspec
import torch
from torch import Tensor, nn

from privlm.models.loss import per_example_loss


class UnexpectedTensors(ValueError):
    """Tensors of another model would be summed with this one's, entry by entry."""


@dataclass(frozen=True)
class Layout:
    """Which tensor of an update stands where in its vector; the same for every client.

    Tensors follow each other in the order of ``names``, each in row-major order.

    Args:
        names: of the tensors.
        shapes: of the tensors, in the same order.

    Raises:
        ValueError: a name twice, a negative size, or not as many shapes as names.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.shapes):
            raise ValueError(f"{len(self.names)} names for {len(self.shapes)} shapes")
        if len(set(self.names)) < len(self.names):
            raise ValueError("two tensors have one name")
        if any(size < 0 for shape in self.shapes for size in shape):
            raise ValueError("a tensor has a negative size")

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Layout":
        """The layout of ``tensors``, in their order.

        Raises:
            UnexpectedTensors: one is not of floating point.
        """
        for name, tensor in tensors.items():
            _require_floats(name, tensor)
        return cls(tuple(tensors), tuple(tuple(tensor.shape) for tensor in tensors.values()))

    @property
    def length(self) -> int:
        """P."""
        return sum(map(math.prod, self.shapes))

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Where each tensor stands in the vector."""
        places, start = {}, 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            places[name] = slice(start, start + math.prod(shape))
            start = places[name].stop
        return places

    @cached_property
    def digest(self) -> str:
        """SHA-256 of names, shapes and order, in hexadecimal.

        Its bytes, as the ``context`` of a :class:`protocols.aggregation.Cohort`, keep updates of
        different layouts out of one sum.
        """
        return hashlib.sha256(msgspec.msgpack.encode((self.names, self.shapes))).hexdigest()

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Put an update into one vector.

        Args:
            tensors: by name, in any order; exactly those of the layout. Left as they are.

        Returns:
            vector_P: contiguous, in memory of its own, of the widest of the tensors' types.

        Raises:
            UnexpectedTensors: a name is missing or unknown, a shape is wrong, or a tensor is not
                of floating point.
        """
        missing, unknown = set(self.names) - set(tensors), set(tensors) - set(self.names)
        if missing or unknown:
            raise UnexpectedTensors(
                f"missing: {sorted(missing) or 'none'}; unknown: {sorted(unknown) or 'none'}"
            )
        for name, shape in zip(self.names, self.shapes, strict=True):
            _require_floats(name, tensors[name])
            if tuple(tensors[name].shape) != shape:
                raise UnexpectedTensors(
                    f"{name} has shape {tuple(tensors[name].shape)}, not {shape}"
                )
        if not self.names:
            return torch.zeros(0)
        return torch.cat([tensors[name].detach().reshape(-1) for name in self.names])

    def unflatten(self, vector_P: Tensor) -> dict[str, Tensor]:
        """Return the tensors in ``vector_P``, by name; they share its memory.

        Raises:
            UnexpectedTensors: the vector has another length, or is not of floating point.
        """
        _require_floats("the vector", vector_P)
        if tuple(vector_P.shape) != (self.length,):
            raise UnexpectedTensors(
                f"the vector has shape {tuple(vector_P.shape)}, not ({self.length},)"
            )
        return {
            name: vector_P[self.slices[name]].view(shape)
            for name, shape in zip(self.names, self.shapes, strict=True)
        }


def gradient_update(model: nn.Module, ids_BT: Tensor, mask_BT: Tensor) -> dict[str, Tensor]:
    """The gradient of the mean loss over a client's examples: what one step of FedSGD uploads.

    Each example counts alike, whatever its length (:func:`privlm.models.per_example_loss`).
    Parameters and their ``.grad`` stay as they were, and so does the model's mode: in training
    mode dropout draws from torch's generator.

    Args:
        model: returns logits (B, T, V) for ``ids_BT``.
        ids_BT: int64 token ids, at least one example.
        mask_BT: bool, true where a token is a target.

    Returns:
        For each parameter that requires a gradient, its gradient, detached; a parameter that is
        shared between layers stands there once, under its first name. Zeros where the loss does
        not depend on it.

    Raises:
        ValueError: there is no example, or no parameter that requires a gradient.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("no parameter requires a gradient: there is nothing to update")
    if len(ids_BT) == 0:
        raise ValueError("an update needs at least one example")
    with torch.enable_grad():
        loss = per_example_loss(model(ids_BT), ids_BT, mask_BT).mean()
        gradients = torch.autograd.grad(
            loss, list(parameters.values()), allow_unused=True, materialize_grads=True
        )
    return dict(zip(parameters, gradients, strict=True))


def _require_floats(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise UnexpectedTensors(f"{name} holds {tensor.dtype}, which is no floating point")
