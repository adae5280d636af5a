"""The worker's half of recording: what was sampled and the routes leave the device as arrays of a whole step.

Put into a running model runner by `start_recording`. vLLM's own recording prepares everything per request, in Python;
here a step carries one set of arrays for its sampling (`rollout/vllm_plugin/support.py`) and its routes with the cache
slots they belong to, and the scheduler (`rollout/vllm_plugin/scheduler.py`) keeps them.

Shapes: B = requests in the step, V = vocabulary, L = decoder layers, K = experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker.gpu.input_batch import get_num_sampled_and_rejected
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler

from rollout.vllm_plugin.record import EngineError
from rollout.vllm_plugin.support import StepSample, StepSupports, SupportMeter


class StepRoutes(NamedTuple):
    """The routes of one step's tokens, and the cache slots that the tokens' keys and values went to."""

    slots: np.ndarray  # int64 [tokens]
    routes: np.ndarray  # uint8 | uint16 [tokens, L, K]


class StepRecord(NamedTuple):
    """What a step leaves behind, on the host."""

    sample: StepSample
    routes: StepRoutes | None


def start_recording(wrapper: Any) -> None:
    """For `collective_rpc`: replaces the worker's sampler, and its recorder of routes if it has one."""
    runner = wrapper.worker.model_runner
    connector = runner.aux_output_connector
    routes = None if connector is None else RouteReader(connector._capturer, runner)
    runner.sampler = RecordingSampler.adopt(runner.sampler, routes, runner.device)
    if connector is not None:
        runner.aux_output_connector = None
        connector.close()


class RecordingSampler(Sampler):
    """vLLM's sampler for requests that all want the log-probability of what is drawn, and no other.

    Draws as vLLM's does. With `return_sampling_mask` it records the support of the rows that truncate; the others cost
    nothing.
    """

    _measure: SupportMeter
    _ones: Tensor  # int32 [most requests]
    _zeros: Tensor
    _routes: RouteReader | None
    _has_staged: bool

    @classmethod
    def adopt(cls, sampler: Sampler, routes: RouteReader | None, device: torch.device) -> RecordingSampler:
        """The same sampler, with all its state, as one of these."""
        if type(sampler) is not Sampler or sampler.logprobs_mode != "processed_logprobs":
            raise EngineError(f"vLLM's {type(sampler).__name__} with {sampler.logprobs_mode} cannot be recorded from")
        adopted = cls.__new__(cls)
        vars(adopted).update(vars(sampler))
        states = sampler.sampling_states
        adopted._measure = SupportMeter(max_rows=states.max_num_reqs, vocab_size=states.vocab_size, device=device)
        adopted._ones = torch.ones(states.max_num_reqs, dtype=torch.int32, device=device)
        adopted._zeros = torch.zeros_like(adopted._ones)
        adopted._routes = routes
        adopted._has_staged = True
        return adopted

    def add_request(self, req_idx: int, sampling_params: Any) -> None:
        """vLLM's."""
        self._has_staged = True
        super().add_request(req_idx, sampling_params)

    def apply_staged_writes(self) -> None:
        """vLLM's, where there is anything to write; it would copy every setting of every request in every step."""
        if self._has_staged:
            super().apply_staged_writes()
        self._has_staged = False

    def __call__(self, logits: Tensor, input_batch: Any) -> SamplerOutput:
        """Tokens [B, 1]; the step's record travels in the place of vLLM's sampling masks."""
        # A step of decoding alone has one token and one row for each request, in one order.
        decodes = input_batch.num_tokens == input_batch.num_reqs and not input_batch.has_prefill
        rows = slice(input_batch.num_reqs) if decodes else input_batch.logits_indices
        sampled, processed = self.sample(
            logits,
            input_batch.expanded_idx_mapping,
            input_batch.idx_mapping,
            input_batch.idx_mapping_np,
            input_batch.positions[rows],
            input_batch.input_ids[rows],
            input_batch.expanded_local_pos,
            input_batch.seq_lens_cpu_upper_bound.numpy(),
            return_logprobs=True,
        )
        num_sampled, num_rejected = self._count_sampled(input_batch, decodes=decodes)
        truncates = self._find_truncating(input_batch, num_sampled) if self.return_sampling_mask else None
        supports = self._measure(processed, sampled, num_sampled, truncates)
        pending: Any = _PendingRecord(supports, self._routes and self._routes.snapshot(input_batch.num_tokens))
        return SamplerOutput(sampled.view(-1, 1), None, None, num_sampled, num_rejected, pending)

    def _count_sampled(self, input_batch: Any, *, decodes: bool) -> tuple[Tensor, Tensor]:
        """int32 [B] each: 1, or 0 for a request whose prompt is not computed yet; and 0."""
        num_reqs = input_batch.num_reqs
        if decodes:
            return self._ones[:num_reqs], self._zeros[:num_reqs]
        return get_num_sampled_and_rejected(
            self._ones[:num_reqs].clone(),
            input_batch.seq_lens,
            input_batch.cu_num_logits,
            input_batch.idx_mapping,
            self.req_states.prefill_len.gpu,
        )

    def _find_truncating(self, input_batch: Any, num_sampled: Tensor) -> Tensor | None:
        """int32 [B], nonzero where a row truncates; None if none does."""
        states, slots = self.sampling_states, input_batch.idx_mapping_np
        truncates = (states.top_p.np[slots] < 1) | (states.top_k.np[slots] < states.vocab_size)
        if truncates.all():
            return num_sampled  # rows that have sampled nothing are not recorded in any case
        return async_tensor_h2d(truncates.astype(np.int32), device=num_sampled.device) if truncates.any() else None


class RouteReader:
    """Reads a step's routes where vLLM's hooks in the routers have put them."""

    def __init__(self, capturer: Any, runner: Any) -> None:
        self._capturer = capturer
        self._block_tables = runner.block_tables
        self._group = find_full_attention_group(runner.kv_cache_config)

    def snapshot(self, num_tokens: int) -> _PendingRoutes:
        """The step that was just computed; the next one overwrites the buffers."""
        slots = self._block_tables.slot_mappings[self._group, :num_tokens, None].view(torch.uint8)
        routes = self._capturer.snapshot_routing_data(num_tokens)
        packed = torch.cat([slots, routes.flatten(1).view(torch.uint8)], dim=1)
        return _PendingRoutes(packed, tuple(routes.shape), np.dtype(self._capturer.output_dtype_name))


@dataclass(frozen=True)
class _PendingRoutes:
    """Slots and routes of a step in one tensor."""

    packed: Tensor  # uint8 [tokens, 8 + bytes of L * K ids]
    shape: tuple[int, ...]
    dtype: np.dtype

    def to_host(self) -> _PendingRoutes:
        return replace(self, packed=self.packed.to("cpu", non_blocking=True))

    def read(self) -> StepRoutes:
        packed = self.packed.numpy()
        slots, routes = packed[:, :8].copy(), packed[:, 8:].copy()
        return StepRoutes(slots.view(np.int64)[:, 0], routes.view(self.dtype).reshape(self.shape))


@dataclass(frozen=True)
class _PendingRecord:
    """A step's record on the device. It stands in for vLLM's `SamplingMaskTensors` and has its two methods."""

    supports: StepSupports
    routes: _PendingRoutes | None

    def to_cpu_nonblocking(self) -> _PendingRecord:
        """Begins the copies, on the stream that vLLM has made current; it keeps `self` until they are done."""
        return _PendingRecord(self.supports.to_host(), self.routes and self.routes.to_host())

    def tolists(self, num_sampled: np.ndarray | None = None) -> StepRecord:
        """The record, once the copies are done."""
        return StepRecord(self.supports.read(), self.routes and self.routes.read())


def find_full_attention_group(kv_cache_config: Any) -> int:
    """Index of the first cache group that keeps every token. Raises EngineError if there is none."""
    for index, group in enumerate(kv_cache_config.kv_cache_groups):
        specs = getattr(group.kv_cache_spec, "kv_cache_specs", None)
        spec = next(iter(specs.values())) if specs else group.kv_cache_spec
        if isinstance(spec, FullAttentionSpec):
            return index
    raise EngineError(
        "routes can be recorded only for a model with a layer of full attention; set stability.keep_routing = false"
    )
