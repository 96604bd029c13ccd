"""ChaCha20 (RFC 8439) in tensor operations: cryptographic randomness where the tensors are.

A `DeviceStream` draws on an accelerator what a `Stream` draws in host memory, so that noise for a
large model never crosses the bus. On a CPU `Stream` is faster by far: processors have AES in
hardware and no such thing for tensors of 32-bit words.
"""

import math
import operator

import torch
from torch import Tensor

from protocols.errors import KeystreamReused
from protocols.randomness import SEED_BYTES, SingleUse, Stream, hkdf_sha256

BLOCK_BYTES = 64
MAX_BLOCKS = 1 << 32
"""The counter has 32 bits: 256 GiB of keystream under one key and nonce."""

_INFO = b"privlm/protocols/device-stream/v1\x00"
# "expand 32-byte k"
_CONSTANTS = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)
# The working state of 2^13 blocks, 512 KiB, stays in a core's cache; a GPU wants many threads.
_CPU_BLOCKS, _DEVICE_BLOCKS = 1 << 13, 1 << 20


class ChaCha20:
    """The keystream under a key and a nonce, block by block: a deterministic core.

    Args:
        key: 32 bytes.
        nonce: 12 bytes.
        counter: of the first block, below 2^32.
        device: where the words are computed and delivered.

    Raises:
        ValueError: an argument has another length or range.

    """

    __slots__ = ("_counter", "_device", "_words_16")

    def __init__(self, key: bytes, nonce: bytes, counter: int, device: torch.device) -> None:
        if len(key) != 32 or len(nonce) != 12:
            raise ValueError("ChaCha20 needs a key of 32 bytes and a nonce of 12")
        if not 0 <= operator.index(counter) < MAX_BLOCKS:
            raise ValueError(f"counter must lie in [0, 2^32), got {counter}")
        rest = torch.frombuffer(bytearray(key + bytes(4) + nonce), dtype=torch.int32)
        self._words_16 = torch.cat([_int32(_CONSTANTS), rest]).to(device)
        self._counter = counter
        self._device = device

    def fill(self, out: Tensor) -> None:
        """Overwrite `out`, in memory order, with keystream from the next block on.

        What the last block holds beyond `out` is lost: no block serves two calls.

        Args:
            out: contiguous int32 or int64 on this keystream's device, of any shape.

        Raises:
            ValueError: `out` is anything else.
            KeystreamReused: the counter would pass 2^32 and begin anew.

        """
        if out.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"uniform words are no uniform {out.dtype}: fill integers")
        if out.device != self._device or not out.is_contiguous():
            raise ValueError(f"this keystream fills contiguous memory on {self._device} only")
        words = out.view(-1).view(torch.int32)
        blocks = -(-len(words) // 16)
        if self._counter + blocks > MAX_BLOCKS:
            raise KeystreamReused("past 2^32 blocks the counter would repeat the keystream")
        chunk = _CPU_BLOCKS if self._device.type == "cpu" else _DEVICE_BLOCKS
        for start in range(0, blocks, chunk):
            target = words[16 * start : 16 * (start + chunk)]
            block_16B = self._blocks(-(-len(target) // 16))
            whole = len(target) - len(target) % 16
            target[:whole].view(-1, 16).copy_(block_16B[:, : whole // 16].t())
            if whole < len(target):
                target[whole:] = block_16B[: len(target) - whole, -1]

    def _blocks(self, count: int) -> Tensor:
        """Blocks as the columns of int32 (16, B): the block function of RFC 8439, section 2.3."""
        start_16B = self._words_16[:, None].repeat(1, count)
        # Counters are 32-bit words of which torch knows the signed reading alone.
        counters = torch.arange(self._counter, self._counter + count, device=self._device)
        start_16B[12] = ((counters + (1 << 31)) % (1 << 32) - (1 << 31)).to(torch.int32)
        self._counter += count
        a, b, c, d = start_16B.clone().view(4, 4, count).unbind()
        scratch = torch.empty_like(a)
        for _ in range(10):
            _quarter_rounds(a, b, c, d, scratch)
            b, c, d = b.roll(-1, 0), c.roll(-2, 0), d.roll(-3, 0)  # diagonals become columns
            _quarter_rounds(a, b, c, d, scratch)
            b, c, d = b.roll(1, 0), c.roll(2, 0), d.roll(3, 0)
        return torch.cat([a, b, c, d]).add_(start_16B)


def _quarter_rounds(a: Tensor, b: Tensor, c: Tensor, d: Tensor, scratch: Tensor) -> None:
    """Four quarter rounds (RFC 8439, section 2.1), one a column, in place on int32 (4, B)."""
    for x, y, z, bits in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
        x.add_(y)  # modulo 2^32
        z.bitwise_xor_(x)
        # Rotate left. The shift to the right copies the sign, which the mask takes off again.
        torch.bitwise_right_shift(z, 32 - bits, out=scratch)
        scratch.bitwise_and_((1 << bits) - 1)
        z.bitwise_left_shift_(bits).bitwise_or_(scratch)


def _int32(words: tuple[int, ...]) -> Tensor:
    return torch.tensor(words, dtype=torch.int64).to(torch.int32)


class DeviceStream(SingleUse):
    r"""A reproducible, unpredictable sequence on a device: ChaCha20 keyed by HKDF(seed, label).

    key ‖ nonce ‖ secret of the children (32, 12 and 32 bytes)
        = HKDF-SHA256(seed, salt = "", info = "privlm/protocols/device-stream/v1\0" ‖ label).

    The rules are those of `Stream`: no default seed, no copy, no pickle, no use in a forked
    process, one thread, and children that depend on labels alone. The key lies in the memory of
    the device, where any program that may read that memory reads it.

    Args:
        seed: 32 uniform bytes, used for nothing else; see `of`.
        label: what the stream is for; not empty.
        device: where the sequence is drawn.

    Raises:
        ValueError: the seed does not have 32 bytes, or the label is empty.

    """

    __slots__ = ("_child_secret", "_device", "_keystream")

    def __init__(self, seed: bytes, label: str, device: torch.device) -> None:
        if not isinstance(seed, bytes) or len(seed) != SEED_BYTES:
            raise ValueError(f"a stream needs a seed of exactly {SEED_BYTES} bytes")
        super().__init__(label)
        derived = hkdf_sha256(seed, salt=b"", info=_INFO + label.encode(), length=76)
        # "cuda" is the current device, of which tensors state the number.
        self._device = torch.empty(0, device=device).device
        self._keystream = ChaCha20(derived[:32], derived[32:44], 0, self._device)
        self._child_secret = derived[44:]

    @classmethod
    def of(cls, stream: Stream, device: torch.device) -> "DeviceStream":
        """Seed a stream on `device` with the next 32 bytes of `stream`."""
        return cls(stream.bytes(SEED_BYTES), stream.label, device)

    @property
    def device(self) -> torch.device:
        """Where the sequence is drawn."""
        return self._device

    def child(self, label: str) -> "DeviceStream":
        """Derive the stream for `label`, whatever has been read; see `Stream.child`.

        Raises:
            KeystreamReused: this process is a fork of the one that made the stream.

        """
        self._require_own_process()
        return DeviceStream(self._child_secret, label, self._device)

    def fill(self, out: Tensor) -> None:
        """Overwrite `out`, contiguous int32 or int64 on the device, with uniform words.

        Raises:
            ValueError: `out` is anything else.
            KeystreamReused: in a forked process, or 2^32 blocks are used up.

        """
        self._require_own_process()
        self._keystream.fill(out)

    def fill_normal(self, out: Tensor) -> None:
        """Overwrite `out` with independent standard normals, by the method of `Stream.fill_normal`.

        The law is that of `Stream.fill_normal`, tails included. Takes about 50 bytes a value beyond
        `out`: fill in pieces.

        Args:
            out: contiguous float64 on the device, of any shape.

        Raises:
            ValueError: `out` is anything else.
            KeystreamReused: as of `fill`.

        """
        if out.dtype != torch.float64:
            raise ValueError(f"normals need float64 to fill, not {out.dtype}")
        if out.device != self._device or not out.is_contiguous():
            raise ValueError(f"this stream fills contiguous memory on {self._device} only")
        flat = out.view(-1)
        pairs = (len(flat) + 1) // 2
        words = torch.empty(2 * pairs, dtype=torch.int64, device=self._device)
        self.fill(words)
        radius_P = words[:pairs].to(torch.float64).abs_()
        short = (radius_P < 2.0**44).nonzero()[:, 0]
        if len(short):
            following = torch.empty_like(short)
            self.fill(following)
            continued = words[short].double() + following.double() * 2.0**-64
            radius_P[short] = continued.abs_().clamp_(min=2.0**-64)
        radius_P.mul_(2.0**-63).log_().mul_(-2.0).sqrt_()
        angle_P = words[pairs:].to(torch.float64).mul_(2 * math.pi * 2.0**-64)
        torch.mul(radius_P, angle_P.cos(), out=flat[:pairs])
        torch.mul(radius_P, angle_P.sin_(), out=radius_P)
        flat[pairs:] = radius_P[: len(flat) - pairs]
