"""A weight update as vLLM's engine sees it: hold, load, put in force; and sleep, from which only an update wakes it.

Called by the engine's thread only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rollout.vllm_plugin.record import EngineError

if TYPE_CHECKING:  # it imports torch
    from rollout.weight_sync import WeightBucket

_MAX_DRAIN_STEPS = 16
"""One or two steps are in flight at most; more means that the engine does not come to rest."""


def fall_asleep(llm: Any, step: Callable[[], None]) -> None:
    """Stops scheduling and gives the GPU memory of weights and KV cache back; what they held is lost.

    Running requests stay: they compute their context again after the update that wakes the engine.
    """
    _hold(llm, step)
    _drop_caches(llm)
    llm.engine_core.engine_core.model_executor.sleep(level=2)


def begin_update(llm: Any, step: Callable[[], None]) -> None:
    """Stops scheduling, takes in the steps still in flight, and opens the model for loading.

    What an earlier update left unfinished is taken back first; a sleeping engine gets the memory of its weights again.
    """
    from rollout.vllm_plugin.weight_transfer import abandon_update

    _hold(llm, step)
    _wake(llm, "weights")
    llm.collective_rpc(abandon_update)
    llm.collective_rpc("start_weight_update")


def load_bucket(llm: Any, bucket: WeightBucket) -> None:
    """Loads one bucket in every worker of the engine."""
    llm.collective_rpc("update_weights", args=({"bucket": bucket},))


def finish_update(llm: Any, version: int) -> None:
    """Packs what was loaded, drops every cached value of the old weights, labels the new ones, schedules again.

    Running requests lose their KV cache and compute their context again under the new weights.
    """
    from vllm.v1.core.sched.interface import PauseState

    llm.collective_rpc("finish_weight_update")
    _wake(llm, "kv_cache")
    _drop_caches(llm)
    scheduler = llm.engine_core.engine_core.scheduler
    scheduler.policy_version = version
    scheduler.set_pause_state(PauseState.UNPAUSED)


def _hold(llm: Any, step: Callable[[], None]) -> None:
    """Steps in flight were computed with the old weights and are labelled with them."""
    from vllm.v1.core.sched.interface import PauseState

    core = llm.engine_core.engine_core
    core.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    for _ in range(_MAX_DRAIN_STEPS):
        if not core.batch_queue:
            break
        step()
    else:
        raise EngineError(f"{_MAX_DRAIN_STEPS} steps did not empty vLLM's queue of batches")


def _drop_caches(llm: Any) -> None:
    if not llm.reset_prefix_cache(reset_running_requests=True):
        raise EngineError("vLLM did not empty its prefix cache, which holds values of the old weights")


def _wake(llm: Any, part: str) -> None:
    """Gives a sleeping engine this part of its memory again, with nothing in it."""
    executor = llm.engine_core.engine_core.model_executor
    if part in executor.sleeping_tags:
        executor.wake_up([part])
