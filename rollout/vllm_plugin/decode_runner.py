"""Steps of decoding alone, without what vLLM's model runner prepares for any kind of step.

vLLM gathers every request's state on the host and builds each step's inputs from it, with half a dozen kernels: on the
host 1.5 ms for 256 sequences, which is more than a small model computes. In a step in which each sequence decodes one
token (`DecodeStep`) all that is new is known on the device. While the sequences stay the same, a single kernel makes
the next inputs of the last ones, and the model's CUDA graph, which is vLLM's, is replayed. What attention needs
is built by vLLM, and brought up to date by the way that vLLM has for the steps of a draft model.

Steps for which there is no such graph, and models that need more, go vLLM's way. What is computed is the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from vllm.config.compilation import CUDAGraphMode
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.kv_connector import NO_OP_KV_CONNECTOR
from vllm.v1.worker.gpu.model_runner import ExecuteModelState
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from rollout.vllm_plugin.decoding import DecodeStep
from rollout.vllm_plugin.launch import Launcher

PLACE = {"BLOCK": 256, "num_warps": 4}
TAKE_IN = {"BLOCK": 128, "num_warps": 4}


def run_decode_steps(runner: Any) -> None:
    """Has a vLLM model runner run such steps this way, if its model needs nothing more."""
    if _needs_nothing_more(runner):
        DecodeRunner(runner).install()


def _needs_nothing_more(runner: Any) -> bool:
    model_state, tables = runner.model_state, runner.block_tables
    return (
        runner.device.type == "cuda"
        and runner.cudagraph_manager is not None
        and type(model_state) is DefaultModelState
        and model_state.rope_state is None
        and runner.kv_connector is NO_OP_KV_CONNECTOR
        and runner.dp_size == tables.cp_size == 1
        and not (runner.use_pp or runner.uses_inputs_embeds or runner.use_aux_hidden_state_outputs)
        and not (runner.parallel_config.enable_eplb or runner.model_config.rswa_window)
        and runner.ubatch_runner is runner.batch_sharder is runner.pcp_manager is runner.adaptive_verification is None
        and runner.fast_prefill is None
        and tables.num_kv_cache_groups > 0
        and all(tables._slot_mapping_enabled)
    )


class _Rows(NamedTuple):
    """The sequences of a step."""

    request_ids: list[str]
    batch: InputBatch
    """What vLLM would make of the step; but for `num_computed_tokens_np` and the bounds of the lengths it holds for the
    steps after it, too."""
    graph: Any
    """Which one is replayed."""
    block_tables: tuple[Tensor, ...]
    cache_slots: Tensor


class DecodeRunner:
    """Stands before a runner's `execute_model`, and does the rest of such a step where it is cheaper, too."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._execute, self._postprocess = runner.execute_model, runner.postprocess_sampled
        self._numbers = torch.arange(runner.max_num_reqs + 1, dtype=torch.int32, device=runner.device)
        self._zeros = torch.zeros_like(self._numbers)
        self._rows: _Rows | None = None
        """Of the last step, if it was run here."""
        self._metadata: dict[str, Any] | None = None
        """Of attention, for the same sequences; by layer."""
        self._groups = [group for groups in runner.attn_groups for group in groups]
        self._can_refresh = all(group.supports_draft_decode_metadata_update for group in self._groups)
        """Whether all that changes of that from step to step lies on the device, but for the longest length."""
        self._place, self._take_in = self._make_launchers()

    def install(self) -> None:
        """Puts this in place."""
        self._runner.execute_model = self.execute_model
        self._runner.postprocess_sampled = self.postprocess_sampled

    def execute_model(self, step: Any, *args: Any, **kwargs: Any) -> Any:
        """vLLM's: runs the model, and leaves its output for `sample_tokens`."""
        if isinstance(step, DecodeStep) and (rows := self._find_rows(step)) is not None:
            if rows is not self._rows:
                self._rows, self._metadata = rows, None
            self._run(step, rows)
            return None
        self._rows = None
        return self._execute(step, *args, **kwargs)

    def postprocess_sampled(self, idx_mapping: Tensor, sampled_tokens: Tensor, *args: Any, **kwargs: Any) -> None:
        """vLLM's: takes in what was drawn."""
        rows = self._rows
        if rows is None or idx_mapping is not rows.batch.idx_mapping:
            self._postprocess(idx_mapping, sampled_tokens, *args, **kwargs)
            return
        num_rows = rows.batch.num_reqs
        self._take_in((-(-num_rows // TAKE_IN["BLOCK"]), 1, 1), 0, (idx_mapping, sampled_tokens), (num_rows,))

    def _find_rows(self, step: DecodeStep) -> _Rows | None:
        """The step's sequences; None if it is vLLM's to run."""
        if step.new_block_ids_to_zero or step.kv_cache_block_copies:
            return None
        request_ids = step.scheduled_cached_reqs.req_ids
        if self._rows is not None and self._rows.request_ids == request_ids:
            return self._rows
        runner, num_rows = self._runner, len(request_ids)
        graph = runner.cudagraph_manager.dispatch(num_rows, num_rows, 1, 0, max_query_len=1)
        index = runner.req_states.req_id_to_index
        slots = np.fromiter((index[request_id] for request_id in request_ids), np.intp, num_rows)
        # A sequence whose next token is its prompt's last does not continue with a sampled one.
        is_drawn = step.computed >= runner.req_states.prefill_len.np[slots]
        if graph.cg_mode != CUDAGraphMode.FULL or graph.num_reqs != graph.num_tokens or not is_drawn.all():
            return None
        return self._make_rows(step, slots, graph)

    def _make_rows(self, step: DecodeStep, slots: np.ndarray, graph: Any) -> _Rows:
        runner, buffers, tables = self._runner, self._runner.input_buffers, self._runner.block_tables
        request_ids, num_rows = step.scheduled_cached_reqs.req_ids, len(slots)
        num_padded = graph.num_tokens  # and as many requests
        slots_there = async_tensor_h2d(slots, device=runner.device, dtype=torch.int64)
        prefills = runner.req_states.prefill_len.np[slots]
        rows: Any = slice(num_rows)  # for a view of the hidden states, where indices would copy them
        batch = InputBatch(
            req_ids=request_ids,
            num_reqs=num_rows,
            num_reqs_after_padding=num_padded,
            idx_mapping=slots_there,
            idx_mapping_np=slots,
            expanded_idx_mapping=slots_there,
            expanded_local_pos=self._zeros[:num_rows],
            num_scheduled_tokens=np.ones(num_rows, np.int32),
            num_tokens=num_rows,
            num_tokens_after_padding=num_padded,
            num_draft_tokens=0,
            num_draft_tokens_per_req=None,
            query_start_loc=buffers.query_start_loc[: num_padded + 1],
            query_start_loc_np=np.minimum(np.arange(num_padded + 1, dtype=np.int32), num_rows, dtype=np.int32),
            seq_lens=buffers.seq_lens[:num_padded],
            seq_lens_cpu_upper_bound=torch.zeros(num_padded, dtype=torch.int32),
            dcp_local_seq_lens=None,
            num_computed_tokens_np=np.zeros(num_rows, np.int32),
            prefill_len_np=prefills,
            num_computed_prefill_tokens_np=prefills,
            is_prefilling_np=np.zeros(num_rows, bool),
            has_prefill=False,
            decode_graph_eligible=True,
            input_ids=buffers.input_ids[:num_padded],
            positions=buffers.positions[:num_padded],
            is_padding=buffers.is_padding[:num_padded],
            logits_indices=rows,
            cu_num_logits=self._numbers[: num_rows + 1],
            cu_num_logits_np=np.arange(num_rows + 1, dtype=np.int32),
            has_structured_output_reqs=False,
            prompt_lens=None,
        )
        block_tables = tuple(table[:num_padded] for table in tables.input_block_tables)
        return _Rows(request_ids, batch, graph, block_tables, tables.slot_mappings[:, :num_padded])

    def _run(self, step: DecodeStep, rows: _Rows) -> None:
        runner, batch = self._runner, rows.batch
        runner.finish_requests(step)
        self._grow(step, batch.idx_mapping_np)
        states = runner.req_states
        states.num_computed_tokens_np[batch.idx_mapping_np] = batch.num_computed_tokens_np[:] = step.computed
        batch.seq_lens_cpu_upper_bound.numpy()[: batch.num_reqs] = step.computed + 1
        for place in self._place:
            place((rows.graph.num_tokens, 1, 1), 0, (batch.idx_mapping,), (batch.num_reqs,))
        metadata = self._metadata = self._prepare_attention(rows, int(step.computed.max()) + 1)
        runner.execute_model_state = ExecuteModelState(
            input_batch=batch,
            attn_metadata=metadata,
            slot_mappings_by_layer=None,
            hidden_states=runner.cudagraph_manager.run_fullgraph(rows.graph),
            aux_hidden_states=None,
            dp_sync_state=None,
            finished_req_ids=step.finished_req_ids,
            ec_connector_output=None,
            cudagraph_stats=None,
            num_spec_tokens_to_schedule=0,
        )

    def _prepare_attention(self, rows: _Rows, longest: int) -> dict[str, Any]:
        """What vLLM's attention layers need, by layer; `longest` is the length of the longest sequence."""
        runner = self._runner
        if self._metadata is None or not self._can_refresh:
            return runner.model_state.prepare_attn(
                rows.batch,
                CUDAGraphMode.FULL,
                rows.block_tables,
                rows.cache_slots,
                runner.attn_groups,
                runner.kv_cache_config,
            )
        for group in self._groups:
            metadata = self._metadata[group.layer_names[0]]
            if hasattr(metadata, "max_seq_len"):
                metadata.max_seq_len = longest
            group.update_draft_decode_metadata(self._metadata)
        return self._metadata

    def _grow(self, step: DecodeStep, slots: np.ndarray) -> None:
        """Appends the sequences' new cache blocks."""
        if not step.grown:
            return
        tables, new_block_ids = self._runner.block_tables, step.scheduled_cached_reqs.new_block_ids
        for row in step.grown:
            tables.append_block_ids(int(slots[row]), new_block_ids[row], overwrite=False)
        tables.apply_staged_writes()

    def _make_launchers(self) -> tuple[tuple[Launcher, ...], Launcher]:
        """Of `place_rows`, by cache group, and `take_in_tokens`."""
        from rollout.vllm_plugin import decode_kernels as kernels  # needs Triton

        states, buffers, tables = self._runner.req_states, self._runner.input_buffers, self._runner.block_tables
        num_computed, last_tokens = states.num_computed_tokens.gpu, states.last_sampled_tokens
        inputs = buffers.input_ids, buffers.positions, buffers.seq_lens, buffers.query_start_loc, buffers.is_padding
        groups = zip(
            tables.block_tables, tables.input_block_tables, tables.slot_mappings, tables.block_sizes, strict=True
        )
        place = [
            (num_computed, last_tokens, *inputs, table.gpu, rows, cache_slots, table.gpu.stride(0), size)
            for table, rows, cache_slots, size in groups
        ]
        token_ids = states.all_token_ids.gpu
        take_in = num_computed, last_tokens, states.total_len.gpu, token_ids, token_ids.stride(0)
        return (
            tuple(Launcher(kernels.place_rows, stays, PLACE, ()) for stays in place),
            Launcher(kernels.take_in_tokens, take_in, TAKE_IN, ()),
        )
