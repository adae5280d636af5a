"""No wait without a name and a limit: a hang becomes an error that says who waited for whom."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


class ClusterError(RuntimeError):
    """The cluster cannot do what the run needs; the message says who waited for whom, or what is missing."""


async def wait_for(awaitable: Awaitable[T], limit_s: float, who: str, what: str, setting: str) -> T:
    """Awaits a remote answer.

    Raises:
        ClusterError: `who` did not do `what` within `limit_s` seconds; `setting` is the key that raises the limit.
    """
    limit = asyncio.timeout(limit_s)
    try:
        async with limit:
            return await awaitable
    except TimeoutError:
        if not limit.expired():  # the answer itself: something over there took too long
            raise
        raise ClusterError(
            f"the driver waited {limit_s:g} s for {who} to {what}: it hangs, or needs longer (cluster.{setting})"
        ) from None
