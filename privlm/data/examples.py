"""Examples: what a model is trained on, under the names that transformers gives its inputs.

Shapes: N = examples, T = tokens.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from privlm.data.errors import DataError

Which = Sequence[int] | npt.NDArray[np.int64] | npt.NDArray[np.bool_] | Tensor


@dataclass(frozen=True, eq=False)
class Examples:
    """N examples, each of them one row of every tensor.

    Args:
        tensors: Such as ``input_ids``, ``attention_mask``, ``labels`` and ``pixel_values``, with
            the examples as their first dimension. ``labels`` are -100 where there is no target.
        record_ids: One stable, unique name an example.
        users: Name of each example's user.

    Raises:
        DataError: If there is no tensor, their lengths disagree, or a record id repeats.
    """

    tensors: Mapping[str, Tensor] = field(repr=False)
    record_ids: tuple[str, ...] = field(repr=False)
    users: tuple[str, ...] = field(repr=False)

    def __post_init__(self) -> None:
        if not self.tensors:
            raise DataError("examples without any tensor")
        for name, tensor in self.tensors.items():
            if tensor.dim() < 1 or len(tensor) != len(self.record_ids):
                raise DataError(
                    f"{len(self.record_ids)} record ids but {name} of shape {tuple(tensor.shape)}"
                )
        if len(self.users) != len(self.record_ids):
            raise DataError(f"{len(self.record_ids)} record ids but {len(self.users)} users")
        if len(set(self.record_ids)) != len(self.record_ids):
            raise DataError("record ids repeat; every example needs its own")

    def __len__(self) -> int:
        return len(self.record_ids)

    def batch(self, index_B: Tensor) -> dict[str, Tensor]:
        """The tensors' rows at these indices: what a loss takes."""
        return {name: tensor[index_B] for name, tensor in self.tensors.items()}

    def select(self, which: Which) -> "Examples":
        """The examples at these indices, or where this mask of N is true."""
        index = chosen(which, len(self))
        return Examples(
            self.batch(torch.tensor(index, dtype=torch.int64)),
            tuple(self.record_ids[i] for i in index),
            tuple(self.users[i] for i in index),
        )

    def fingerprint(self) -> str:
        """SHA-256 in hexadecimal of the examples, their names and users, whatever their order.

        It names a data set in the ledger. It also confirms a guess of the whole data set, so it
        is kept with the ledger and not published.
        """
        names = sorted(self.tensors)
        kinds = [f"{n} {self.tensors[n].dtype} {tuple(self.tensors[n].shape[1:])}" for n in names]
        arrays = [_bytes_of(self.tensors[name]) for name in names]
        digests = []
        for n in range(len(self)):
            record = hashlib.sha256()
            for name in (self.record_ids[n], self.users[n]):
                encoded = name.encode("utf-8")
                record.update(len(encoded).to_bytes(8, "little") + encoded)
            for array in arrays:
                record.update(array[n])
            digests.append(record.digest())
        header = f"privlm examples 1, {len(self)}, {'; '.join(kinds)}".encode()
        return hashlib.sha256(header + b"".join(sorted(digests))).hexdigest()


def chosen(which: Which, count: int) -> list[int]:
    """Indices below ``count``, given as they are or as a mask of ``count``.

    Raises:
        DataError: If a mask has another length.
    """
    array = np.asarray(which)
    if array.dtype == np.bool_:
        if array.shape != (count,):
            raise DataError(f"a mask of {array.shape} cannot select from {count}")
        array = array.nonzero()[0]
    return [int(i) for i in array]


def _bytes_of(tensor: Tensor) -> npt.NDArray[np.uint8]:
    """One row of bytes an example; little-endian, as every machine that torch runs on."""
    flat = tensor.detach().cpu().contiguous().reshape(len(tensor), -1)
    return flat.view(torch.uint8).numpy()
