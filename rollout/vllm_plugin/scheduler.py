"""vLLM's scheduler with its per-token bookkeeping replaced: a step costs a few microseconds per sequence.

vLLM schedules every step as if anything might happen in it, and hands every token of every sequence from the scheduler
to an output processor. A rollout engine mostly decodes, and only finished sequences are asked for. So:

- A step in which every running sequence decodes one token is scheduled by `_schedule_decode`; any other step by vLLM.
- `update_from_output` appends tokens, finds the sequences that end, and adds the step's arrays to a log. While the
  sequences stay the same, both know them from the step before (`decoding.py`).
- A sequence leaves by one door, `_free_request`; there its record is put together and handed out at once, and vLLM's
  output processor has nothing to do.

What is scheduled, drawn and cached is what vLLM's own scheduler would have it be (`tests/rollout/test_scheduler.py`).
Fits vLLM 0.32 only; `rollout.vllm_plugin.check_version` guards it.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import Any

import numpy as np
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
from vllm.v1.core.sched.utils import check_stop, remove_all
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from rollout.vllm_plugin.decoding import ENDED, DecodeBatch, DecodeStep, Live, StepBatch
from rollout.vllm_plugin.record import EngineError, FinishedSequence
from rollout.vllm_plugin.recorder import find_full_attention_group
from rollout.vllm_plugin.slot_routes import SlotRoutes, Stretch
from rollout.vllm_plugin.step_log import StepLog
from rollout.vllm_plugin.support import StepRecord

_RETRY_STEPS = 32
"""Steps after which waiting sequences are tried again although no cache block has become free."""


class RecordingScheduler(AsyncScheduler):
    """A vLLM scheduler for one process that draws rollouts: text models, one token per sequence and step.

    Works with one batch in flight or two (vLLM's asynchronous scheduling). Raises EngineError if vLLM is set up for
    what it does not do: speculative decoding, pipeline parallelism, KV or encoder connectors, pooling, statistics.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._refuse_what_is_not_done()
        self.policy_version = 0
        """The weights in force; set between steps."""
        self.on_finished: Callable[[FinishedSequence], None] = lambda sequence: None
        """Called with every sequence as it ends, however it ends, in the middle of a step."""
        config = self.vllm_config
        self._log = StepLog(keeps_sets=self.return_sampling_mask)
        self._routes: SlotRoutes | None = None
        if config.aux_output_config.enabled:
            self._route_group = find_full_attention_group(self.kv_cache_config)
            block_size = self.kv_cache_manager.coordinator.group_block_sizes[self._route_group]
            self._routes = SlotRoutes(num_blocks=self.kv_cache_config.num_blocks, block_size=block_size)
            self.aux_output_connector = None  # a step's routes come as arrays, under their cache slots
        self._block_step = gcd(*self.kv_cache_manager.coordinator.group_block_sizes)
        """Cache blocks begin and end at multiples of this only."""
        self._unit = gcd(self._block_step, self.hash_block_size)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        self._drops_blocks = not all(isinstance(manager, FullAttentionManager) for manager in managers)
        """Whether blocks are given back while a sequence runs, as with a sliding window."""
        self._num_ordinary = self.max_num_active_reqs
        """Sequences that may run beside those that go first."""
        self._going_first: set[str] = set()
        self._live: dict[str, Live] = {}
        self._step_batch = StepBatch([], [], [])
        self._decode_batch: DecodeBatch | None = None
        self._num_departures = 0
        """Sequences that have ended or been preempted."""
        self._free_blocks_at_stall: int | None = None

    def _refuse_what_is_not_done(self) -> None:
        config = self.vllm_config
        reasons = {
            "speculative decoding": config.speculative_config is not None,
            "pipeline parallelism": self.use_pp,
            "context parallelism": self.dcp_world_size * self.pcp_world_size > 1,
            "a KV connector": self.connector is not None,
            "an encoder connector": self.ec_connector is not None,
            "a pooling or diffusion model": self.num_sampled_tokens_per_step != 1,
            "an encoder-decoder model": self.is_encoder_decoder,
            "LoRA": self.lora_config is not None,
            "Model Runner V1": not self.use_v2_model_runner,
            "statistics": self.log_stats,
        }
        if unsupported := [name for name, present in reasons.items() if present]:
            raise EngineError(f"Keel's scheduler for vLLM does not do {', '.join(unsupported)}; turn it off")

    # -- requests in, sequences out ---------------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        """Queues a request."""
        params = request.sampling_params
        if params is None or request.use_structured_output or request.mm_features or params.min_tokens:
            raise EngineError(f"request {request.request_id} asks for more than tokens drawn from a text prompt")
        super().add_request(request)
        longest = self.max_model_len - request.num_prompt_tokens
        stops = frozenset(params.stop_token_ids or ())
        self._live[request.request_id] = Live(self._log.begin(), stops, min(request.max_tokens, longest))
        if request.priority < 0:
            self._going_first.add(request.request_id)
            self._count_slots()

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> tuple[Any, Any]:
        self._note_departure()
        self.on_finished(self._collect(request))
        return super()._free_request(request, delay_free_blocks)

    def _count_slots(self) -> None:
        self.max_num_active_reqs = min(self._num_ordinary + len(self._going_first), self.max_num_running_reqs)

    def _note_departure(self) -> None:
        self._num_departures += 1
        self._decode_batch = None

    def _collect(self, request: Request) -> FinishedSequence:
        live = self._live.pop(request.request_id)
        live.ended = True
        self._save_routes([(request, live)])
        log = self._log.take(live.key)
        if request.priority < 0:
            self._going_first.discard(request.request_id)
            self._count_slots()
        stats = request.prefill_stats
        return FinishedSequence(
            request_id=request.request_id,
            token_ids=np.asarray(request._output_token_ids, np.int32),
            logprobs=log.logprobs,
            versions=log.versions,
            kept=log.kept,
            routed_experts=live.join_routes(),
            finish_reason=str(request.get_finished_reason()),
            num_prompt_tokens=request.num_prompt_tokens,
            num_cached_tokens=0 if stats is None else stats.num_cached_tokens,
            num_preemptions=request.num_preemptions,
        )

    # -- routes -----------------------------------------------------------------------------------------------------

    def _save_routes(self, sequences: list[tuple[Request, Live]]) -> None:
        """Reads what is not read yet, up to the last sampled token, from the cache slots of the sequences' blocks."""
        if self._routes is None:
            return
        lives, stretches = [], []
        for request, live in sequences:
            start, stop = sum(map(len, live.routes)), request.num_tokens - 1
            if request.num_output_tokens and start < stop:
                lives.append(live)
                stretches.append(Stretch(live.lost_blocks or self._route_blocks(request), start, stop))
        for live, routes in zip(lives, self._routes.read(stretches) if stretches else (), strict=True):
            live.routes.append(routes)

    def _route_blocks(self, request: Request) -> list[int]:
        manager = self.kv_cache_manager.coordinator.single_type_managers[self._route_group]
        return [block.block_id for block in manager.req_to_blocks.get(request.request_id, ())]

    def _write_routes(self, scheduler_output: SchedulerOutput, record: StepRecord | None) -> None:
        """Follows what the device did with its cache in this step, in the device's order."""
        if self._routes is None:
            return
        for copy in scheduler_output.kv_cache_block_copies or ():
            self._routes.copy_block(copy.src_block_id, copy.dst_block_id)
        if record is not None:
            self._routes.write(record)

    def _preempt_request(self, request: Request, timestamp: float, drop_stale_output: bool = False) -> None:
        self._note_departure()
        live = self._live[request.request_id]
        if self._routes is not None:
            live.lost_blocks = self._route_blocks(request)
        super()._preempt_request(request, timestamp, drop_stale_output)
        if live.lost_blocks is not None and (request.drop_stale_output or not request.num_stale_output_tokens):
            # Nothing in flight will add to what these blocks hold for it, so read them before others write there.
            self._save_routes([(request, live)])
            live.lost_blocks = None

    # -- what a step brings -----------------------------------------------------------------------------------------

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> dict:
        """Takes in one step. Returns no outputs: what has ended goes to `on_finished`."""
        output = model_runner_output
        record: Any = output.sampling_masks  # None if the step computed nothing
        self._write_routes(scheduler_output, record)
        batch = self._find_batch(output.req_ids)
        sampled = output.sampled_token_ids
        one_each = scheduler_output.total_num_scheduled_tokens == len(sampled) and all(sampled)
        takers = batch.find_takers(self._num_departures) if one_each else None
        if takers is not None:
            keys, ended = takers.keys, takers.take_in(sampled)
            for request in takers.find_at_block_ends(self._unit):
                self._cache_full_blocks(request)
        else:
            keys, ended = self._take_in_one_by_one(batch, sampled, scheduler_output)
        if record is not None:
            self._log.add(keys, self.policy_version, record)
        self._stop(ended)
        return {}

    def _find_batch(self, request_ids: list[str]) -> StepBatch:
        """The step's sequences in its order; most steps have those of the step before."""
        if request_ids != self._step_batch.request_ids:
            requests = [self.requests.get(request_id) for request_id in request_ids]
            lives = [self._live.get(request_id, ENDED) for request_id in request_ids]
            self._step_batch = StepBatch(request_ids, requests, lives)
        return self._step_batch

    def _take_in_one_by_one(
        self, batch: StepBatch, sampled: list[list[int]], step: SchedulerOutput
    ) -> tuple[np.ndarray, list[Request]]:
        """Any step. Returns the keys of the rows, -1 where none counts, and the requests that end."""
        batch.forget_takers()
        rows: list[int] = []
        ended: list[Request] = []
        for row, (request, live, token_ids) in enumerate(zip(batch.requests, batch.lives, sampled, strict=True)):
            if live.ended or not self._take_in(request, live, token_ids, step):
                continue
            rows.append(row)
            if token_ids[0] in live.stops or request.num_output_tokens >= live.max_tokens:
                ended.append(request)
        return batch.keys_of(rows), ended

    def _take_in(self, request: Request, live: Live, token_ids: list[int], step: SchedulerOutput) -> bool:
        """One sequence's share of a step. Returns whether a token of it counts."""
        num_scheduled = step.num_scheduled_tokens[request.request_id]
        request.num_in_flight_tokens -= num_scheduled
        is_stale = request.num_stale_output_tokens > 0
        if is_stale:
            request.num_stale_output_tokens -= num_scheduled
        counts = bool(token_ids) and not (is_stale and request.drop_stale_output)
        if counts:
            request._all_token_ids.append(token_ids[0])
            request._output_token_ids.append(token_ids[0])
        if is_stale:
            self._take_in_stale(request, live)
        elif counts:
            request.num_output_placeholders -= 1
            self._cache_full_blocks(request)
        return counts

    def _take_in_stale(self, request: Request, live: Live) -> None:
        """What was in flight when the sequence was preempted came from what the lost blocks still hold."""
        if len(request._all_token_ids) % self.hash_block_size == 0:
            request.update_block_hashes()
        if live.lost_blocks is not None:
            self._save_routes([(request, live)])
            if not request.num_stale_output_tokens:
                live.lost_blocks = None

    def _cache_full_blocks(self, request: Request) -> None:
        """Hashes the tokens that complete a block, and offers a block whose values are all computed to others."""
        if len(request._all_token_ids) % self.hash_block_size == 0:
            request.update_block_hashes()
        num_settled = request.num_computed_tokens - request.num_output_placeholders
        if num_settled % self._block_step == 0:
            self.kv_cache_manager.cache_blocks(request, num_settled)

    def _stop(self, requests: list[Request]) -> None:
        """Ends sequences at their last token."""
        if not requests:
            return
        were_running = {request for request in requests if request.status == RequestStatus.RUNNING}
        preempted = set(requests) - were_running
        self._save_routes([(request, self._live[request.request_id]) for request in requests])  # of all at once
        for request in requests:
            if not check_stop(request, self.max_model_len):
                raise EngineError(f"vLLM does not end request {request.request_id} where it has to")
            self._free_request(request)
        self.running = remove_all(self.running, were_running)
        if preempted:
            self.waiting.remove_requests(preempted)
            self.kv_holding_waiting.remove_requests(preempted)
            self.deferred_waiting.difference_update(preempted)

    # -- the next step ----------------------------------------------------------------------------------------------

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """The next step: by a short way where every running sequence decodes, by vLLM's otherwise."""
        batch = self._find_decode_batch()
        if batch is not None:
            return self._schedule_decode(batch)
        output = super().schedule(throttle_prefills)
        self._note_stall(output)
        return output

    def _find_decode_batch(self) -> DecodeBatch | None:
        """The sequences of the next step if it is one of decoding alone, and its blocks are free; else None."""
        batch, self._decode_batch = self._decode_batch, None
        if self._pause_state != PauseState.UNPAUSED or self._may_admit():
            return None
        if batch is None or not batch.lasts:
            requests = self._find_decoding()
            batch = DecodeBatch(requests, max_model_len=self.max_model_len) if requests else None
        if batch is None:
            return None
        num_new_blocks = len(batch.find_growing(self._block_step)) * len(self.kv_cache_config.kv_cache_groups)
        return batch if num_new_blocks <= self.kv_cache_manager.block_pool.get_num_free_blocks() else None

    def _find_decoding(self) -> list[Request]:
        """The running sequences that get one token each in the next step; none if one of them needs something else."""
        if len(self.running) > self.max_num_scheduled_tokens or self.has_mamba_layers:
            return []
        decoding = []
        for request in self.running:
            computed, in_flight = request.num_computed_tokens, request.num_output_placeholders
            if in_flight and computed + 2 - in_flight >= request.num_prompt_tokens + request.max_tokens:
                continue  # its last token is on its way
            if len(request._all_token_ids) + in_flight - computed != 1:
                return []
            if computed + 1 < self.max_model_len:
                decoding.append(request)
        return decoding

    def _schedule_decode(self, batch: DecodeBatch) -> DecodeStep:
        """One token for each; vLLM's `schedule` and `_update_after_schedule` for this case, in one pass."""
        self.current_step += 1
        self.kv_cache_manager.new_step_starts()
        new_block_ids: list[tuple[list[int], ...] | None] = [None] * len(batch.requests)
        growing = batch.find_growing(self._block_step)
        for row in growing:
            new_block_ids[row] = self._grow(batch.requests[row])
        computed, num_sampled = batch.advance()
        cached = CachedRequestData(
            req_ids=batch.request_ids,
            resumed_req_ids=set(),
            new_token_ids=[],
            all_token_ids={},
            new_block_ids=new_block_ids,
            num_computed_tokens=computed.tolist(),
            num_output_tokens=num_sampled.tolist(),
        )
        output = DecodeStep(
            computed=computed,
            grown=[row for row in growing if new_block_ids[row] is not None],
            scheduled_new_reqs=[],
            scheduled_cached_reqs=cached,
            num_scheduled_tokens=dict.fromkeys(batch.request_ids, 1),
            total_num_scheduled_tokens=len(batch.requests),
            scheduled_spec_decode_tokens={},
            scheduled_encoder_inputs={},
            finished_req_ids=self.finished_req_ids,
            free_encoder_mm_hashes=[],
            preempted_req_ids=self.reset_preempted_req_ids,
            new_block_ids_to_zero=self._get_new_block_ids_to_zero(),
        )
        self.finished_req_ids = set()
        self.reset_preempted_req_ids = set()
        self._decode_batch = batch
        return output

    def _grow(self, request: Request) -> tuple[list[int], ...] | None:
        """Cache blocks for one more token, which are known to be free: what `allocate_slots` comes to here."""
        coordinator = self.kv_cache_manager.coordinator
        computed = request.num_computed_tokens
        if self._drops_blocks:
            num_settled = max(0, computed - request.num_in_flight_tokens)
            coordinator.remove_skipped_blocks(request.request_id, num_settled, request.num_prompt_tokens)
        blocks = coordinator.allocate_new_blocks(request.request_id, computed + 1, computed + 1)
        return tuple([block.block_id for block in group] for group in blocks) if any(blocks) else None

    def _may_admit(self) -> bool:
        """Whether a waiting sequence might start in the next step."""
        if not self.waiting and not self.kv_holding_waiting:
            return False
        if len(self.running) >= self.max_num_active_reqs:
            return False
        stall = self._free_blocks_at_stall
        has_new_room = stall is None or self.kv_cache_manager.block_pool.get_num_free_blocks() > stall
        return has_new_room or self.current_step % _RETRY_STEPS == 0

    def _note_stall(self, output: SchedulerOutput) -> None:
        """Remembers how little room there was if waiting sequences were tried in this step and none was admitted."""
        stalled = (
            bool(self.waiting)
            and len(self.running) < self.max_num_active_reqs
            and not self.deferred_waiting
            and not output.scheduled_new_reqs
            and not output.preempted_req_ids
            and 0 < output.total_num_scheduled_tokens < self.max_num_scheduled_tokens
        )
        self._free_blocks_at_stall = self.kv_cache_manager.block_pool.get_num_free_blocks() if stalled else None
