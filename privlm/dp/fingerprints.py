"""Names of data sets for the ledger, made from their items."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor


def fingerprint_of_items(dataset: Any) -> str:
    """SHA-256 in hexadecimal of ``dataset[0]``, ``dataset[1]``, ..., whatever their order.

    It reads every item once. It also confirms a guess of the whole data set, so it is kept with the
    ledger and not published.

    Args:
        dataset: has a length and indices; items are tensors, arrays, images, numbers, text, and
            lists and mappings of those.

    Raises:
        ValueError: an item of another kind.
    """
    digests = [_digest(dataset[i]) for i in range(len(dataset))]
    header = f"privlm items 1, {len(digests)}".encode()
    return hashlib.sha256(header + b"".join(sorted(digests))).hexdigest()


def _digest(item: Any) -> bytes:
    try:
        encoded = msgspec.msgpack.encode(item, enc_hook=_plain, order="sorted")
    except (TypeError, OverflowError, msgspec.MsgspecError) as error:
        raise ValueError(
            f"the data set has no fingerprint ({error}); name it yourself: dataset='...', the same "
            "name for the same data in every run"
        ) from error
    return hashlib.sha256(encoded).digest()


def _plain(value: Any) -> Any:
    """What msgpack does not know, as what it knows."""
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        return ["tensor", str(value.dtype), list(value.shape), flat.view(torch.uint8).numpy().data]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype != object:
        return ["array", value.dtype.str, list(value.shape), value.tobytes()]
    if isinstance(value, Mapping):
        return dict(value)
    if all(hasattr(value, name) for name in ("mode", "size", "tobytes")):  # a PIL image
        return ["image", value.mode, list(value.size), value.tobytes()]
    raise TypeError(f"a {type(value).__name__} in it")
