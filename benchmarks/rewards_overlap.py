"""How much a slow judge adds to a step when every group is scored as soon as it is complete.

Run `python -m benchmarks.rewards_overlap`. Generation is real: vLLM on the quickstart's base model (made by its recipe
when it is not there), 64 sequences at a time, every completion drawn to the same full length. The judge is an
asynchronous function that sleeps for a second, once per sample, in the processes of a real reward pool. Only the
learner is left out: a step here is drawing and scoring its groups, through the same pipeline and scorer as in a run.

Three ways to draw and score the same groups, `--steps` times each:

    alone        generation without any reward
    after        judged when the whole step is drawn: what a loop without overlap pays
    overlapped   judged group by group while the others are still drawn: what Keel does

The three take turns, each step in another order, so that whatever else the machine does hits them alike; medians are
printed. What is left of the judge is the last groups' second, so the growth falls with the step's length: it is printed
for several.

The engine's own work varies by a tenth from one step to the next on a shared machine, which is as much as is looked
for. So the last columns leave it out: the processor seconds of scoring itself (the reward processes' and what the
thread of the event loop needs beyond a step alone), the seconds of a step, beyond a step alone, in which the engine's
thread did not run, and these as a share of a step alone.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.machine import describe_machine
from grpo.config import load_config
from grpo.pipeline import GroupPipeline, PipelineState
from grpo.preflight import Preflight, check
from rewards.config import RewardConfig
from rewards.load import LoadedReward, load_reward
from rewards.pool import RewardPool
from rewards.runner import RewardWorker
from rewards.score import Scorer
from rewards.types import Answer, ScoredGroup
from rollout.config import RolloutConfig
from rollout.tasks import sample_seed
from rollout.types import GenerateRequest, Group, Task
from rollout.worker import RolloutWorker

RUN_FILE = Path(__file__).parents[1] / "examples" / "quickstart" / "train.toml"
IN_FLIGHT = 64
GROUP_SIZE = 8
NEW_TOKENS = 48
JUDGE_S = 1.0
NUM_REWARD_WORKERS = 2

Draw = Callable[[int], Coroutine[Any, Any, Any]]
Way = Callable[[int], Coroutine[Any, Any, None]]
"""Draws a step of so many groups."""


async def one_second_judge(task: Task, answer: Answer) -> float:
    """As slow as a judge model, without its work."""
    await asyncio.sleep(JUDGE_S)
    return float(answer.num_tokens)


@dataclass(frozen=True, slots=True)
class Bench:
    """What every measurement draws and scores with."""

    preflight: Preflight
    worker: RolloutWorker
    scorer: Scorer

    async def generate(self, index: int) -> Group:
        """One group, every completion of `NEW_TOKENS` tokens: no token stops it."""
        task = self.preflight.tasks[index % len(self.preflight.tasks)]
        prompt = self.preflight.tokenizer.encode(task)
        seeds = tuple(sample_seed(0, index, sample) for sample in range(GROUP_SIZE))
        request = GenerateRequest(prompt, seeds, 1.0, 0.95, 0, NEW_TOKENS, ())
        return Group(index, task, prompt, await self.worker.generate(request))

    async def generate_and_score(self, index: int) -> ScoredGroup:
        """As `GroupSampler.draw` does."""
        scored = await self.scorer.score(await self.generate(index))
        assert scored.valid.all(), scored.failures
        return scored

    async def step(self, draw: Draw, num_groups: int) -> None:
        """One synchronous step through the pipeline."""
        pipeline = GroupPipeline(draw, groups_per_step=num_groups, max_off_policy_steps=0, state=PipelineState(0))
        await pipeline.take(num_groups)

    async def alone(self, num_groups: int) -> None:
        """Draws a step's groups."""
        await self.step(self.generate, num_groups)

    async def overlapped(self, num_groups: int) -> None:
        """Draws them and scores each when it is complete."""
        await self.step(self.generate_and_score, num_groups)

    async def after(self, num_groups: int) -> None:
        """Draws them all, then scores them all."""
        groups = await asyncio.gather(*(self.generate(index) for index in range(num_groups)))
        await asyncio.gather(*(self.scorer.score(group) for group in groups))


async def measure(bench: Bench, sizes: Sequence[int], num_steps: int) -> None:
    """Prints one row per step length."""
    ways = (bench.alone, bench.overlapped, bench.after)
    await bench.overlapped(IN_FLIGHT // GROUP_SIZE)  # first calls compile and connect
    print(f"\n{'':15}{'wall-clock seconds':^48}  {'without the engine':^31}")
    columns = ("samples", "alone", "overlapped", "growth", "after", "growth", "scoring", "waiting", "growth")
    print(_line("groups", *columns))
    for num_groups in sizes:
        costs = np.array([await _turns(bench, ways, num_groups, first=step) for step in range(num_steps)])
        print(_row(num_groups, costs), flush=True)


async def _turns(bench: Bench, ways: Sequence[Way], num_groups: int, *, first: int) -> np.ndarray:
    """float64 [ways, 3]: each way once, from the `first` on."""
    costs = np.zeros((len(ways), 3))
    for way in np.roll(range(len(ways)), -first):
        before = await _clocks(bench)
        await ways[way](num_groups)
        costs[way] = await _clocks(bench) - before
    return costs


async def _clocks(bench: Bench) -> np.ndarray:
    """float64 [3], seconds: the wall clock's, those without the engine's thread, and the processor's for scoring."""
    processes = psutil.Process().children(recursive=True)
    judging = sum(sum(process.cpu_times()[:2]) for process in processes)
    now, engine = time.perf_counter(), await bench.worker._engine._ask(time.thread_time)
    return np.array([now, now - engine, time.thread_time() + judging])


def _row(num_groups: int, costs: np.ndarray) -> str:
    """Medians over the steps; a growth compares ways that took their turns in one step."""
    growths = np.median(costs[:, 1:, 0] / costs[:, :1, 0] - 1, axis=0)
    alone, overlapped, after = np.median(costs, axis=0)
    waiting = float(np.median(costs[:, 1, 1] - costs[:, 0, 1]))
    wall = (f"{alone[0]:.2f}", f"{overlapped[0]:.2f}", f"{growths[0]:+.1%}", f"{after[0]:.2f}", f"{growths[1]:+.1%}")
    rest = (f"{overlapped[2] - alone[2]:.2f}", f"{waiting:.2f}", f"{waiting / alone[0]:+.1%}")
    return _line(str(num_groups), str(num_groups * GROUP_SIZE), *wall, *rest)


def _line(groups: str, samples: str, *columns: str) -> str:
    alone, overlapped, growth, after, without, scoring, waiting, rest = columns
    wall = f"{alone:>8} {overlapped:>11} {growth:>8} {after:>8} {without:>8}"
    return f"{groups:>6} {samples:>8} {wall}  {scoring:>9} {waiting:>9} {rest:>9}"


async def run(sizes: Sequence[int], num_steps: int) -> None:
    """Starts engine and pool, measures, stops both."""
    config = load_config(RUN_FILE)
    preflight = check(config, RUN_FILE)
    reward: LoadedReward = load_reward(
        RewardConfig(fn="benchmarks.rewards_overlap:one_second_judge"), base_dir=Path.cwd()
    )
    pool = RewardPool([RewardWorker([reward.spec]) for _ in range(NUM_REWARD_WORKERS)])
    rollout = RolloutConfig(dtype="float32", max_concurrent_sequences=IN_FLIGHT, max_batched_tokens=4096)
    worker = RolloutWorker(
        preflight.model_path, rollout, max_model_len=64, record_kept=True, record_routing=preflight.is_moe
    )
    try:
        await pool.start()
        scorer = Scorer(lambda domain: (reward,), decode=preflight.tokenizer.decode, runner=pool)
        await measure(Bench(preflight, worker, scorer), sizes, num_steps)
    finally:
        await pool.close()
        await worker.shutdown()


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, nargs="+", default=[64, 192, 384], help="groups of 8 per step")
    parser.add_argument("--steps", type=int, default=3, help="steps of each; the median is printed")
    arguments = parser.parse_args()
    print(describe_machine())
    print(f"{IN_FLIGHT} samples in flight, {NEW_TOKENS} tokens each, a {JUDGE_S:g} s judge on every one")
    asyncio.run(run(arguments.groups, arguments.steps))


if __name__ == "__main__":
    main()
