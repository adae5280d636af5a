"""Waits that end: by an answer, by their limit, by what the other side raises."""

from __future__ import annotations

import asyncio

import pytest

from grpo.cluster.waits import ClusterError, wait_for


async def answer(after_s: float, error: Exception | None = None) -> int:
    await asyncio.sleep(after_s)
    if error is not None:
        raise error
    return 7


def wait(after_s: float, limit_s: float, error: Exception | None = None) -> int:
    return asyncio.run(wait_for(answer(after_s, error), limit_s, "rank 0", "load the model", "start_timeout_s"))


def test_a_wait_beyond_its_limit_says_who_waited_for_whom_and_which_key_raises_it():
    assert wait(0, 1) == 7
    with pytest.raises(ClusterError, match=r"0\.01 s for rank 0 to load the model: .*\(cluster\.start_timeout_s\)"):
        wait(30, 0.01)


def test_a_timeout_on_the_other_side_is_not_taken_for_the_waits_own():
    with pytest.raises(TimeoutError, match="the store is slow"):
        wait(0, 1, TimeoutError("the store is slow"))
