"""The worker's half of recording: what was sampled and the routes leave the device as arrays of a whole step.

Put into a running model runner by `start_recording`. vLLM's own recording prepares everything per request, in Python;
here a step carries one array with its sampling, its routes and the cache slots that these belong to
(`rollout/vllm_plugin/support.py`), and the scheduler (`rollout/vllm_plugin/scheduler.py`) keeps them.

Shapes: B = requests in the step, V = vocabulary, L = decoder layers, K = experts per token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker.gpu.input_batch import get_num_sampled_and_rejected
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler

from rollout.vllm_plugin.record import EngineError
from rollout.vllm_plugin.support import RouteBuffers, StepPacker


def start_recording(wrapper: Any) -> None:
    """For `collective_rpc`: replaces the worker's sampler, and its recorder of routes if it has one."""
    runner = wrapper.worker.model_runner
    connector = runner.aux_output_connector
    buffers = None if connector is None else find_route_buffers(connector._capturer, runner)
    runner.sampler = RecordingSampler.adopt(runner.sampler, buffers, runner.device)
    if connector is not None:
        runner.aux_output_connector = None
        connector.close()


class RecordingSampler(Sampler):
    """vLLM's sampler for requests that all want the log-probability of what is drawn, and no other.

    Draws as vLLM's does. With `return_sampling_mask` it records the support of the rows that truncate; the others cost
    nothing.
    """

    _pack: StepPacker
    _ones: Tensor  # int32 [most requests]
    _zeros: Tensor
    _truncates: np.ndarray  # bool [most requests]
    _has_staged: bool

    @classmethod
    def adopt(cls, sampler: Sampler, buffers: RouteBuffers | None, device: torch.device) -> RecordingSampler:
        """The same sampler, with all its state, as one of these."""
        if type(sampler) is not Sampler or sampler.logprobs_mode != "processed_logprobs":
            raise EngineError(f"vLLM's {type(sampler).__name__} with {sampler.logprobs_mode} cannot be recorded from")
        adopted = cls.__new__(cls)
        vars(adopted).update(vars(sampler))
        states = sampler.sampling_states
        adopted._pack = StepPacker(
            max_rows=states.max_num_reqs, vocab_size=states.vocab_size, device=device, buffers=buffers
        )
        adopted._ones = torch.ones(states.max_num_reqs, dtype=torch.int32, device=device)
        adopted._zeros = torch.zeros_like(adopted._ones)
        adopted._truncates = np.zeros(states.max_num_reqs, bool)
        adopted._has_staged = True
        return adopted

    def add_request(self, req_idx: int, sampling_params: Any) -> None:
        """vLLM's."""
        self._has_staged = True
        super().add_request(req_idx, sampling_params)
        states = self.sampling_states
        self._truncates[req_idx] = states.top_p.np[req_idx] < 1 or states.top_k.np[req_idx] < states.vocab_size

    def apply_staged_writes(self) -> None:
        """vLLM's, where there is anything to write; it would copy every setting of every request in every step."""
        if self._has_staged:
            super().apply_staged_writes()
        self._has_staged = False

    def apply_sampling_params(
        self,
        logits: Tensor,
        expanded_idx_mapping: Tensor,
        idx_mapping: Tensor,
        idx_mapping_np: np.ndarray,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Divides by the temperature, in place: vLLM copies all logits before, and nobody wants them as they were.

        Of all that vLLM applies here, `rollout.vllm_plugin.record.sampling_params` asks for nothing else.
        """
        logits = logits.float()  # as they come from a head in float32
        self.sampling_states.apply_temperature(logits, expanded_idx_mapping, idx_mapping_np)
        return logits

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
        pending: Any = self._pack(processed, sampled, num_sampled, truncates, input_batch.num_tokens)
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
        truncates = self._truncates[input_batch.idx_mapping_np]
        if truncates.all():
            return num_sampled  # rows that have sampled nothing are not recorded in any case
        return async_tensor_h2d(truncates.astype(np.int32), device=num_sampled.device) if truncates.any() else None


def find_route_buffers(capturer: Any, runner: Any) -> RouteBuffers:
    """Where vLLM's hooks in the routers put a step's routes, and its runner the slots of the step's tokens."""
    slots = runner.block_tables.slot_mappings[find_full_attention_group(runner.kv_cache_config)]
    return RouteBuffers(slots, capturer.device_buffer, np.dtype(capturer.output_dtype_name))


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
