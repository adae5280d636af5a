"""Both ends of the weight wire: named tensors in, flat byte buckets over the wire, named tensors out.

The learner packs its checkpoint tensors one layer after another, so that neither side ever holds more than a few
buckets besides the model. A bucket is a plain numpy buffer, which crosses processes through shared memory without a
copy, or, where both ends share a GPU, a handle to device memory (CUDA IPC), which never leaves the GPU. This module
knows neither the engine that loads the tensors nor what carries the buckets.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 64
"""Every tensor starts on a cache line, which is also a multiple of every dtype's size."""

_NUM_DEVICE_BUFFERS = 4
"""One is being loaded, two may wait on their way, one is being filled."""


@dataclass(frozen=True)  # with slots, thousands of them take three times as long to cross processes
class TensorSpec:
    """Where one tensor lies in its bucket. Example: `TensorSpec("lm_head.weight", "bfloat16", (99, 128), 0, 25344)`."""

    name: str
    """The checkpoint's name of the tensor."""
    dtype: str
    """The torch dtype's name: `"float32"`, `"bfloat16"`."""
    shape: tuple[int, ...]
    offset: int
    """First byte in the bucket's buffer."""
    num_bytes: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch names it. Raises ValueError for a name that torch does not know."""
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"tensor '{self.name}' has the unknown dtype '{self.dtype}'; use a torch dtype's name")
        return dtype


@dataclass(frozen=True, slots=True)
class DeviceBuffer:
    """Bytes in GPU memory of another process on the same device, opened without a copy.

    The sender may fill the memory anew once the receiver has loaded the bucket.
    """

    rebuild: Callable[..., Tensor]
    arguments: tuple[Any, ...]
    num_bytes: int

    def __len__(self) -> int:
        return self.num_bytes

    def open(self) -> Tensor:
        """uint8 [num_bytes] on the device."""
        return self.rebuild(*self.arguments)[: self.num_bytes]


@dataclass(frozen=True, slots=True)
class WeightBucket:
    """Some tensors of a checkpoint as one run of bytes."""

    specs: tuple[TensorSpec, ...]
    buffer: np.ndarray | DeviceBuffer  # uint8 [num_bytes]

    def __post_init__(self) -> None:
        if isinstance(self.buffer, DeviceBuffer):
            return
        if self.buffer.dtype != np.uint8 or self.buffer.ndim != 1:
            raise TypeError(f"WeightBucket.buffer must be uint8 [bytes], got {self.buffer.dtype} {self.buffer.shape}")

    @property
    def num_bytes(self) -> int:
        return len(self.buffer)


def pack_buckets(named_tensors: Iterable[tuple[str, Tensor]], *, max_bytes: int) -> Iterator[WeightBucket]:
    """Packs tensors, in their order, into buckets of at most `max_bytes`; a larger tensor gets a bucket of its own.

    The tensors are read lazily: at most one bucket's worth is held at a time. Raises ValueError if `max_bytes` < 1.
    """
    for pending, num_bytes in _split(named_tensors, max_bytes):
        buffer = np.zeros(num_bytes, np.uint8)
        _fill(torch.from_numpy(buffer), pending)
        yield WeightBucket(tuple(spec for spec, _ in pending), buffer)


def pack_device_buckets(named_tensors: Iterable[tuple[str, Tensor]], *, max_bytes: int) -> Iterator[WeightBucket]:
    """`pack_buckets` for a receiver on the same GPU: the bytes stay in device memory, in `_NUM_DEVICE_BUFFERS` turns.

    A bucket is good until as many more have been drawn from the iterator as there are buffers, less one: whoever
    carries them must not run further ahead of the receiver. Raises ValueError if `max_bytes` < 1.
    """
    from torch.multiprocessing.reductions import reduce_tensor

    buffers: list[Tensor | None] = [None] * _NUM_DEVICE_BUFFERS
    for number, (pending, num_bytes) in enumerate(_split(named_tensors, max_bytes)):
        turn = number % _NUM_DEVICE_BUFFERS
        buffer = buffers[turn]
        if buffer is None or len(buffer) < num_bytes:
            buffer = torch.empty(max(num_bytes, max_bytes), dtype=torch.uint8, device="cuda")
            buffers[turn] = buffer
        _fill(buffer, pending)
        torch.cuda.current_stream().synchronize()  # the receiver's stream knows nothing of this one
        rebuild, arguments = reduce_tensor(buffer)
        yield WeightBucket(tuple(spec for spec, _ in pending), DeviceBuffer(rebuild, arguments, num_bytes))


def unpack_bucket(bucket: WeightBucket) -> Iterator[tuple[str, Tensor]]:
    """The bucket's `(name, tensor)` pairs as views of its buffer: they are only to be read.

    Raises ValueError if a spec does not fit its shape, its dtype or the buffer.
    """
    data = open_bucket(bucket)
    for spec in bucket.specs:
        check_spec(spec, bucket)
        yield spec.name, _view(data, spec)


def check_spec(spec: TensorSpec, bucket: WeightBucket) -> None:
    """Raises ValueError if a spec does not fit its shape, its dtype or the bucket's buffer."""
    itemsize = spec.torch_dtype.itemsize
    expected = math.prod(spec.shape) * itemsize
    inside = 0 <= spec.offset <= bucket.num_bytes - expected
    if spec.num_bytes != expected or not inside or spec.offset % itemsize:
        raise ValueError(
            f"bucket of {bucket.num_bytes} bytes: tensor '{spec.name}' {spec.dtype} {spec.shape} needs {expected} "
            f"bytes, its spec says {spec.num_bytes} at {spec.offset}; the bucket is damaged, send it again"
        )


def open_bucket(bucket: WeightBucket) -> Tensor:
    """The bucket's bytes where they lie, uint8 [num_bytes], only to be read."""
    if isinstance(bucket.buffer, DeviceBuffer):
        return bucket.buffer.open()
    with warnings.catch_warnings():
        # A buffer out of shared memory is read-only; the views are only read, so torch's warning says nothing.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
        return torch.from_numpy(bucket.buffer)


def elements_of(data: Tensor, dtype: torch.dtype) -> Tensor:
    """A bucket's bytes, uint8 [num_bytes], as elements of another dtype, without a last one that is not whole."""
    return data[: len(data) // dtype.itemsize * dtype.itemsize].view(dtype)


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """`target.copy_(source)` for each pair, on a GPU in a few launches for all of them."""
    torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]


_Pending = list[tuple[TensorSpec, Tensor]]


def _split(named_tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[tuple[_Pending, int]]:
    """The tensors of one bucket after another, with their places in it and the bucket's size in bytes."""
    if max_bytes < 1:
        raise ValueError(f"max_bytes must be at least 1, got {max_bytes}")
    pending: _Pending = []
    end = 0
    for name, tensor in named_tensors:
        num_bytes = tensor.nbytes
        if pending and end + num_bytes > max_bytes:
            yield pending, end
            pending, end = [], 0
        pending.append((TensorSpec(name, _name_of(tensor.dtype), tuple(tensor.shape), end, num_bytes), tensor.detach()))
        end += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
    if pending:
        yield pending, end


def _fill(target: Tensor, pending: _Pending) -> None:
    """Some microseconds per tensor, of which a large model has tens of thousands."""
    typed: dict[torch.dtype, Tensor] = {}
    targets, sources = [], []
    for spec, tensor in pending:
        if not spec.num_bytes:
            continue
        dtype, source = tensor.dtype, tensor.contiguous()
        if dtype not in typed:
            typed[dtype] = elements_of(target, dtype)
        targets.append(typed[dtype].as_strided(source.shape, source.stride(), spec.offset // dtype.itemsize))
        sources.append(source)
    if targets:
        copy_all(targets, sources)


@functools.cache
def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _view(data: Tensor, spec: TensorSpec) -> Tensor:
    if not spec.num_bytes:  # a slice without elements cannot be seen as another dtype
        return data.new_empty(spec.shape, dtype=spec.torch_dtype)
    return data[spec.offset : spec.offset + spec.num_bytes].view(spec.torch_dtype).view(spec.shape)
