"""The worker's half of recording: what was sampled and the routes leave the device as arrays of a whole step.

Put into a running model runner by `start_recording`. vLLM's own recording prepares everything per request, in Python;
here a step carries one array with its sampling, its routes and the cache slots that these belong to
(`rollout/vllm_plugin/support.py`), and the scheduler (`rollout/vllm_plugin/scheduler.py`) keeps them. On a GPU one set
of kernels draws and records (`rollout/vllm_plugin/draw.py`); on a CPU vLLM's sampler draws.

Shapes: B = requests in the step, V = vocabulary, L = decoder layers, K = experts per token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker.gpu.input_batch import get_num_sampled_and_rejected
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler

from rollout.vllm_plugin.decode_runner import run_decode_steps
from rollout.vllm_plugin.draw import Rows, Settings, StepDrawer
from rollout.vllm_plugin.record import EngineError
from rollout.vllm_plugin.support import PackedStep, RouteBuffers, pack_on_cpu


def start_recording(wrapper: Any) -> None:
    """For `collective_rpc`: replaces the worker's sampler, its recorder of routes if it has one, and how it decodes."""
    runner = wrapper.worker.model_runner
    connector = runner.aux_output_connector
    buffers = None if connector is None else find_route_buffers(connector._capturer, runner)
    runner.sampler = RecordingSampler.adopt(runner.sampler, buffers, runner.device)
    if connector is not None:
        runner.aux_output_connector = None
        connector.close()
    run_decode_steps(runner)


class RecordingSampler(Sampler):
    """vLLM's sampler for requests that all want the log-probability of what is drawn, and no other.

    Draws as vLLM's does. With `return_sampling_mask` it records the support of the rows that truncate; the others cost
    nothing.
    """

    _buffers: RouteBuffers | None
    _drawer: StepDrawer | None  # None on a CPU
    _ones: Tensor  # int32 [most requests]
    _zeros: Tensor
    _truncates: np.ndarray  # bool [most requests]
    _has_staged: bool

    @classmethod
    def adopt(cls, sampler: Sampler, buffers: RouteBuffers | None, device: torch.device) -> RecordingSampler:
        """The same sampler, with all its state, as one of these."""
        if type(sampler) is not Sampler or sampler.logprobs_mode != "processed_logprobs":
            raise EngineError(f"vLLM's {type(sampler).__name__} with {sampler.logprobs_mode} cannot be recorded from")
        if sampler.use_fp64_gumbel:
            raise EngineError("vLLM's noise in float64 cannot be recorded from; leave use_fp64_gumbel off")
        adopted = cls.__new__(cls)
        vars(adopted).update(vars(sampler))
        states = sampler.sampling_states
        adopted._buffers = buffers
        adopted._drawer = None
        if device.type != "cpu":
            adopted._drawer = StepDrawer(
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
        """vLLM's, where there is anything to write; it would copy every setting of every request in every step.

        vLLM leaves the settings in the host's memory, where each program of a kernel would fetch them from.
        """
        if self._has_staged:
            super().apply_staged_writes()
            if self._drawer is not None:
                states = self.sampling_states
                filled = Settings(states.temperature.gpu, states.top_k.gpu, states.top_p.gpu, states.seeds.gpu)
                for setting, values in zip(self._drawer.settings, filled, strict=True):
                    setting.copy_(values)
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
        where = slice(input_batch.num_reqs) if decodes else input_batch.logits_indices
        num_sampled, num_rejected = self._count_sampled(input_batch, decodes=decodes)
        truncates = self._truncates[input_batch.idx_mapping_np]
        if self._drawer is None:
            sampled, step = self._draw_on_cpu(logits, input_batch, where, num_sampled, truncates)
        else:
            rows = Rows(logits, input_batch.expanded_idx_mapping, input_batch.positions[where], num_sampled)
            sampled, step = self._drawer(
                rows,
                input_batch.num_tokens,
                truncates=bool(truncates.any()),
                records=self.return_sampling_mask,
            )
        pending: Any = step
        return SamplerOutput(sampled.view(-1, 1), None, None, num_sampled, num_rejected, pending)

    def _draw_on_cpu(
        self, logits: Tensor, input_batch: Any, where: slice | Tensor, num_sampled: Tensor, truncates: np.ndarray
    ) -> tuple[Tensor, PackedStep]:
        """vLLM's own draw, and the record of what it leaves."""
        sampled, processed = self.sample(
            logits,
            input_batch.expanded_idx_mapping,
            input_batch.idx_mapping,
            input_batch.idx_mapping_np,
            input_batch.positions[where],
            input_batch.input_ids[where],
            input_batch.expanded_local_pos,
            input_batch.seq_lens_cpu_upper_bound.numpy(),
            return_logprobs=True,
        )
        recorded = truncates if self.return_sampling_mask and truncates.any() else None
        step = pack_on_cpu(processed, sampled, num_sampled, recorded, input_batch.num_tokens, self._buffers)
        return sampled, step

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
