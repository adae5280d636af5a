"""One engine behind an asynchronous door: what the cluster makes an actor of.

Requests in, completions out, weights in between. It knows nothing of groups, rewards or the cluster.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from rollout.config import RolloutConfig
from rollout.engine import Engine, EngineStats
from rollout.types import Completion, GenerateRequest

if TYPE_CHECKING:  # it imports torch
    from rollout.weight_sync import WeightBucket


class RolloutWorker:
    """A plain class around one `Engine`; every method may be awaited from any event loop, many at a time.

    A weight update is `begin_weight_update`, any number of `load_weights`, `finish_weight_update`. Requests that run
    meanwhile stand still and go on with the new weights.
    """

    def __init__(
        self,
        model_path: str,
        config: RolloutConfig,
        *,
        max_model_len: int,
        record_kept: bool,
        record_routing: bool,
        seed: int = 0,
    ) -> None:
        self._engine = Engine(
            model_path,
            config,
            max_model_len=max_model_len,
            record_kept=record_kept,
            record_routing=record_routing,
            seed=seed,
        )

    async def generate(self, request: GenerateRequest) -> tuple[Completion, ...]:
        """One completion per seed of the request, in the order of its seeds."""
        return await self._engine.generate(request)

    async def sleep(self) -> None:
        """Gives the engine's GPU memory back until the next weight update has been finished."""
        await self._engine.sleep()

    async def begin_weight_update(self) -> None:
        """Holds the engine between two steps; running requests stay where they are."""
        await self._engine.begin_weight_update()

    async def load_weights(self, bucket: WeightBucket) -> None:
        """Loads some of the checkpoint's tensors; over one update, all of them must come."""
        await self._engine.load_weights(bucket)

    async def finish_weight_update(self, policy_version: int) -> None:
        """Puts the loaded weights in force as `policy_version` and lets the engine go on."""
        await self._engine.finish_weight_update(policy_version)

    async def stats(self) -> EngineStats:
        """The engine's counters so far."""
        return self._engine.stats()

    async def shutdown(self) -> None:
        """Stops the engine; what is still pending fails with an `EngineDiedError`."""
        await asyncio.to_thread(self._engine.shutdown)
