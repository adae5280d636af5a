"""The bounded-staleness window against a simulated engine whose drawings finish out of order."""

from __future__ import annotations

import asyncio

import pytest

from grpo.pipeline import GroupPipeline, PipelineState


class SimulatedEngine:
    """Remembers which version each group was drawn under; later groups can finish first."""

    def __init__(self) -> None:
        self.version = 0
        self.drawn: list[int] = []
        self.num_running = self.max_running = 0

    async def draw(self, index: int) -> tuple[int, int]:
        self.drawn.append(index)
        self.num_running += 1
        self.max_running = max(self.max_running, self.num_running)
        version = self.version
        await asyncio.sleep(0.001 * ((index * 7) % 5))
        self.num_running -= 1
        return index, version


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_groups_come_in_order_once_and_never_too_stale(ahead):
    async def run():
        engine = SimulatedEngine()
        pipeline = GroupPipeline(engine.draw, groups_per_step=4, max_off_policy_steps=ahead, state=PipelineState(0))
        taken, staleness = [], []
        for step in range(6):
            groups = await pipeline.take(4)
            taken += [index for index, _ in groups]
            staleness += [step - version for _, version in groups]
            if ahead == 0:
                assert engine.num_running == 0, "synchronous: nothing may run while training runs"
            await asyncio.sleep(0.001)  # the training of this step
            engine.version = step + 1
        await pipeline.close()
        return engine, taken, staleness, pipeline.state

    engine, taken, staleness, state = asyncio.run(run())
    assert taken == list(range(24))
    assert len(set(engine.drawn)) == len(engine.drawn)
    assert state == PipelineState(24 + 4 * ahead, tuple(range(24, 24 + 4 * ahead)))
    assert max(staleness) <= ahead and (ahead == 0 or max(staleness) == ahead)


def test_a_resumed_pipeline_draws_the_pending_groups_again_first():
    async def run():
        engine = SimulatedEngine()
        pipeline = GroupPipeline(engine.draw, groups_per_step=2, max_off_policy_steps=2, state=PipelineState(0))
        await pipeline.take(2)
        state = pipeline.state
        await pipeline.close()
        again = GroupPipeline(engine.draw, groups_per_step=2, max_off_policy_steps=2, state=state)
        first = await again.take(3)
        rest = await again.take(3)
        await again.close()
        return state, [index for index, _ in (*first, *rest)]

    state, taken = asyncio.run(run())
    assert state == PipelineState(6, (2, 3, 4, 5))
    assert taken == [2, 3, 4, 5, 6, 7]


def test_groups_that_were_started_are_drawn_once_and_taken_in_order():
    async def run():
        started: list[int] = []

        async def draw(index: int) -> int:
            started.append(index)
            return index

        pipeline = GroupPipeline(draw, groups_per_step=2, max_off_policy_steps=0, state=PipelineState(4))
        pipeline.start(2)
        await asyncio.sleep(0)
        assert started == [4, 5] and pipeline.state == PipelineState(6, (4, 5))
        pipeline.start(2)
        taken = [*await pipeline.take(2), *await pipeline.take(2)]
        return started, taken

    assert asyncio.run(run()) == ([4, 5, 6, 7], [4, 5, 6, 7])


def test_a_cancelled_take_leaves_every_group_pending():
    async def run():
        async def never(index: int) -> int:
            await asyncio.sleep(3600)
            return index

        pipeline = GroupPipeline(never, groups_per_step=2, max_off_policy_steps=0, state=PipelineState(8, (3,)))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(pipeline.take(2), 0.01)
        await pipeline.close()
        return pipeline.state

    assert asyncio.run(run()) == PipelineState(9, (3, 8))


def test_uncounted_groups_come_along_and_others_are_drawn_in_their_place():
    async def run(limit: int):
        engine = SimulatedEngine()
        pipeline = GroupPipeline(engine.draw, groups_per_step=4, max_off_policy_steps=0, state=PipelineState(0))
        groups = await pipeline.take(4, counts=lambda group: group[0] % 3 == 0, limit=limit)
        await pipeline.close()
        return [index for index, _ in groups], pipeline.state

    assert asyncio.run(run(100)) == (list(range(10)), PipelineState(10)), "0, 3, 6 and 9 count"
    assert asyncio.run(run(6)) == (list(range(6)), PipelineState(6))


def test_a_take_cancelled_while_it_refills_leaves_every_group_pending():
    async def run():
        async def draw(index: int) -> int:
            await asyncio.sleep(0 if index < 2 else 3600)
            return index

        pipeline = GroupPipeline(draw, groups_per_step=2, max_off_policy_steps=0, state=PipelineState(0))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(pipeline.take(2, counts=lambda index: index > 0, limit=4), 0.05)
        await pipeline.close()
        return pipeline.state

    assert asyncio.run(run()) == PipelineState(3, (0, 1, 2))


def test_a_failed_drawing_fails_the_take():
    async def run():
        async def draw(index: int) -> int:
            if index == 1:
                raise RuntimeError("engine is gone")
            return index

        pipeline = GroupPipeline(draw, groups_per_step=3, max_off_policy_steps=0, state=PipelineState(0))
        with pytest.raises(RuntimeError, match="engine is gone"):
            await pipeline.take(3)
        await pipeline.close()
        return pipeline.state

    assert asyncio.run(run()) == PipelineState(3, (0, 1, 2))
