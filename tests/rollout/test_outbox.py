"""Results from a thread to callers in event loops."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from rollout.outbox import Outbox


def make_future() -> asyncio.Future[int]:
    return asyncio.get_running_loop().create_future()


async def leave() -> asyncio.Future[int]:
    """What nobody waits for, in a loop that is about to close."""
    return make_future()


def in_a_thread(work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_a_loop_is_woken_once_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    outbox, woken = Outbox(), []

    async def wait() -> list[int | BaseException]:
        replies = [make_future() for _ in range(4)]
        loop = asyncio.get_running_loop()
        wake = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *args: woken.append(0) or wake(*args))
        waiting = asyncio.gather(*(asyncio.wait_for(reply, 10) for reply in replies), return_exceptions=True)
        await asyncio.sleep(0)

        def put() -> None:
            for number, reply in enumerate(replies[:3]):
                outbox.resolve(reply, number)
            outbox.reject(replies[3], ValueError("lost"))
            assert not woken
            outbox.send()
            outbox.send()  # there is nothing more

        in_a_thread(put)
        return await waiting

    *results, error = asyncio.run(wait())
    assert results == [0, 1, 2] and isinstance(error, ValueError) and str(error) == "lost"
    assert len(woken) == 1


def test_a_closed_loop_holds_up_nobody() -> None:
    outbox, closed = Outbox(), asyncio.run(leave())
    assert closed.get_loop().is_closed()

    async def wait() -> int:
        first, second = make_future(), make_future()
        outbox.resolve(closed, 0)
        outbox.reject(first, StopIteration("spent"))
        outbox.resolve(closed, 1)
        outbox.resolve(second, 2)
        in_a_thread(outbox.send)
        with pytest.raises(RuntimeError, match="spent"):  # no future takes a StopIteration
            await first
        return await second

    assert asyncio.run(asyncio.wait_for(wait(), 10)) == 2


def test_callers_that_have_gone() -> None:
    """One has given up, one's loop is closed; the third, in a loop after theirs, still gets its own."""
    outbox, closed = Outbox(), asyncio.run(leave())

    async def wait() -> int:
        given_up, reply = make_future(), make_future()
        given_up.cancel()
        assert given_up.cancelled() and not reply.cancelled()

        def put() -> None:
            outbox.resolve(closed, 1)
            outbox.resolve(given_up, 2)
            outbox.reject(given_up, ValueError())
            outbox.resolve(reply, 3)
            outbox.send()

        in_a_thread(put)
        return await reply

    assert asyncio.run(wait()) == 3
    assert not closed.done()
