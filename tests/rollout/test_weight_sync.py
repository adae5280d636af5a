"""The weight wire: what is packed comes out bit by bit, in order, within the bucket's size."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from rollout.weight_sync import WeightBucket, pack_buckets, unpack_bucket


def make_tensors() -> list[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        ("embed", torch.randn(99, 16, generator=generator)),
        ("bias", torch.randn(7, generator=generator).bfloat16()),
        ("scalar", torch.tensor(3.5)),
        ("empty", torch.zeros(0, 4)),
        ("strided", torch.randn(6, 10, generator=generator).t()),
        ("ids", torch.arange(5, dtype=torch.int64)),
        ("half", torch.randn(3, 3, generator=generator).half()),
    ]


@pytest.mark.parametrize("max_bytes", [1, 300, 100_000])
def test_round_trip_is_bit_exact(max_bytes: int) -> None:
    tensors = make_tensors()
    buckets = [pickle.loads(pickle.dumps(b)) for b in pack_buckets(tensors, max_bytes=max_bytes)]
    result = [pair for bucket in buckets for pair in unpack_bucket(bucket)]
    assert [name for name, _ in result] == [name for name, _ in tensors]
    for (_, sent), (_, received) in zip(tensors, result, strict=True):
        assert received.dtype == sent.dtype and received.shape == sent.shape
        assert torch.equal(received, sent)


def test_buckets_keep_to_their_size() -> None:
    tensors = [(f"w{i}", torch.zeros(16)) for i in range(20)]  # 64 bytes each
    sizes = [bucket.num_bytes for bucket in pack_buckets(tensors, max_bytes=256)]
    assert sizes == [256] * 5
    big = [("big", torch.zeros(1000)), *tensors[:2]]
    assert [len(bucket.specs) for bucket in pack_buckets(big, max_bytes=256)] == [1, 2]


def test_tensors_are_read_one_bucket_at_a_time() -> None:
    read = []

    def source() -> Iterator[tuple[str, Tensor]]:
        for i in range(10):
            read.append(i)
            yield f"w{i}", torch.full((16,), float(i))

    buckets = pack_buckets(source(), max_bytes=128)
    next(buckets)
    assert read == [0, 1, 2]  # two fill the bucket, the third showed that it was full


def test_a_packed_tensor_no_longer_follows_its_source() -> None:
    tensor = torch.ones(4)
    (bucket,) = pack_buckets([("w", tensor)], max_bytes=100)
    tensor.zero_()
    assert dict(unpack_bucket(bucket))["w"].tolist() == [1, 1, 1, 1]


def test_damage_is_found() -> None:
    (bucket,) = pack_buckets([("w", torch.ones(8))], max_bytes=100)
    (spec,) = bucket.specs
    for wrong in (replace(spec, shape=(9,)), replace(spec, offset=80), replace(spec, num_bytes=16)):
        with pytest.raises(ValueError, match="the bucket is damaged"):
            list(unpack_bucket(WeightBucket((wrong,), bucket.buffer)))
    with pytest.raises(ValueError, match="unknown dtype 'float3'"):
        list(unpack_bucket(WeightBucket((replace(spec, dtype="float3"),), bucket.buffer)))
    with pytest.raises(TypeError, match="must be uint8"):
        WeightBucket((), np.zeros(4, np.float32))
    with pytest.raises(ValueError, match="max_bytes must be at least 1"):
        next(pack_buckets([], max_bytes=0))
