"""Which rank's buckets go to which engine, and that every rank is waited for; streams are stand-ins for Ray's."""

from __future__ import annotations

import asyncio
import tomllib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from grpo.cluster import Cluster
from grpo.config import TrainConfig
from tests.test_config import MINIMAL


class Stream:
    """What a rank sends; it has come to its end when somebody has waited for that."""

    def __init__(self, buckets: Sequence[str]) -> None:
        self._buckets, self.is_over = self._send(buckets), False

    def __aiter__(self) -> AsyncIterator[str]:
        return self._buckets

    async def __anext__(self) -> str:
        return await anext(self._buckets)

    async def completed(self) -> None:
        self.is_over = True

    @staticmethod
    async def _send(buckets: Sequence[str]) -> AsyncIterator[str]:
        for bucket in buckets:
            yield bucket


@pytest.mark.parametrize(
    ("senders", "expected"),
    [
        ([0], [{0: "a0"}, {0: "b0"}]),
        ([0, 2], [{0: "a0", 2: "a2"}, {0: "b0", 2: "b2"}]),
        ([1], [{1: "a1"}, {1: "b1"}]),
        ([], []),
    ],
)
def test_buckets_come_from_the_ranks_that_send(senders: list[int], expected: list[dict[int, str]]) -> None:
    nothing: Any = None
    cluster = Cluster(TrainConfig.model_validate(tomllib.loads(MINIMAL)), nothing, nothing)
    streams = [Stream([f"a{i}", f"b{i}"] if i in senders else []) for i in range(3)]

    async def collect() -> list[dict[int, str]]:
        return [refs async for refs in cluster._weight_buckets(streams, senders)]

    assert asyncio.run(asyncio.wait_for(collect(), 5)) == expected
    assert all(stream.is_over for stream in streams)
