"""Stand-ins for the kernels that build the model's input: block tables, positions, token ids, counters.

Each function has the parameters of the kernel it replaces, in its order and under its names (a test compares them), and
writes into the same arguments. `*_ptr` arguments are torch tensors on the CPU, strides count elements. Speculative
decoding and context parallelism are not covered: they raise.

Shapes: B = requests in the step, N = tokens in the step, R = request slots, G = KV cache groups.
"""

# ruff: noqa: PLR0913  the parameters are the kernels' own
from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from torch import Tensor


def apply_write(
    output_ptr: Tensor,  # [R, width] any dtype; MULTI_GROUP: addresses of int32 tables, uint64 [G]
    output_stride: Any,  # int; MULTI_GROUP: int64 [G]
    write_indices_ptr: Tensor,  # int32 [W] row of each write
    write_starts_ptr: Tensor,  # int32 [W] first column of each write
    write_contents_ptr: Tensor,  # [sum of lengths]
    write_cu_lens_ptr: Tensor,  # int32 [W] cumulated lengths
    write_group_ids_ptr: Tensor | None,  # int32 [W], MULTI_GROUP only
    BLOCK_SIZE: int,
    MULTI_GROUP: bool,
) -> None:
    """Copies runs of staged values into rows of a table, or of one table per group."""
    ends = write_cu_lens_ptr.numpy().astype(np.int64)
    lengths = np.diff(ends, prepend=0)
    strides = (
        output_stride.numpy()[write_group_ids_ptr.numpy()]
        if MULTI_GROUP and write_group_ids_ptr is not None
        else output_stride
    )
    first = write_indices_ptr.numpy().astype(np.int64) * strides + write_starts_ptr.numpy()
    targets = _runs(first, lengths)
    contents = write_contents_ptr.numpy()[: len(targets)]
    if write_group_ids_ptr is None:
        output_ptr.view(-1).numpy()[targets] = contents
        return
    groups = np.repeat(write_group_ids_ptr.numpy(), lengths)
    for group in np.unique(groups):
        mine = groups == group
        table = _int32_at(int(output_ptr[group]), int(targets[mine].max()) + 1)
        table[targets[mine]] = contents[mine]


def gather_block_tables(
    batch_idx_to_req_idx: Tensor,  # [B]
    src_block_table_ptrs: Tensor,  # uint64 [G]
    dst_block_table_ptrs: Tensor,  # uint64 [G]
    block_table_strides: Tensor,  # int64 [G]
    num_blocks_ptr: Tensor,  # int32 [G, R]
    num_blocks_stride: int,
    num_reqs: int,
    BLOCK_SIZE: int,
) -> None:
    """Copies the block-table rows of this step's requests side by side.

    Only eager mode runs here, so there are no padded rows to clear; ids past a row's own count are never read.
    """
    slots = batch_idx_to_req_idx.numpy()[:num_reqs]
    num_blocks = num_blocks_ptr.numpy()
    for group, stride in enumerate(block_table_strides.tolist()):
        width = int(num_blocks[group, slots].max(initial=0))
        source = _int32_at(int(src_block_table_ptrs[group]), num_blocks.shape[1] * stride).reshape(-1, stride)
        target = _int32_at(int(dst_block_table_ptrs[group]), num_reqs * stride).reshape(-1, stride)
        target[:, :width] = source[slots, :width]


def compute_slot_mappings(
    max_num_tokens: int,
    idx_mapping: Tensor,  # [B]; -1 marks a request that owns no blocks
    query_start_loc: Tensor,  # int32 [B + 1]
    pos: Tensor,  # int64 [N]
    block_table_ptrs: Tensor,  # uint64 [G]
    block_table_strides: Tensor,  # int64 [G]
    block_sizes: Tensor,  # int32 [G]
    slot_mapping_enabled: Tensor,  # bool [G]
    dcp_sharded: Tensor,  # bool [G]
    slot_mappings_ptr: Tensor,  # int64 [G, max_num_tokens]
    slot_mappings_stride: int,
    cp_rank: int,
    CP_SIZE: int,
    CP_INTERLEAVE: int,
    PAD_ID: int,
    TRITON_BLOCK_SIZE: int,
) -> None:
    """The KV-cache slot of every token: its block's number times the block size, plus its place in the block."""
    if CP_SIZE != 1:
        raise NotImplementedError("context parallelism has no CPU stand-in; set decode_context_parallel_size = 1")
    slots = idx_mapping.numpy()
    starts = query_start_loc.numpy()[: len(slots) + 1]
    num_tokens = int(starts[-1])
    rows = np.repeat(slots, np.diff(starts))
    positions = pos.numpy()[:num_tokens]
    out = slot_mappings_ptr.numpy()
    for group, (stride, size) in enumerate(zip(block_table_strides.tolist(), block_sizes.tolist(), strict=True)):
        out[group, num_tokens:max_num_tokens] = PAD_ID
        if not slot_mapping_enabled[group]:
            out[group, :num_tokens] = PAD_ID
            continue
        table = _int32_at(int(block_table_ptrs[group]), (int(rows.max(initial=0)) + 1) * stride).reshape(-1, stride)
        blocks = table[np.maximum(rows, 0), positions // size].astype(np.int64)
        out[group, :num_tokens] = np.where(rows >= 0, blocks * size + positions % size, PAD_ID)


def prepare_prefill_inputs(
    input_ids_ptr: Tensor,  # int32 [max tokens]
    next_prefill_tokens_ptr: Tensor,  # int32 [lookahead, R]
    next_prefill_tokens_stride: int,
    num_lookahead: int,
    idx_mapping_ptr: Tensor,  # [B]
    query_start_loc_ptr: Tensor,  # int32 [B + 1]
    all_token_ids_ptr: Tensor,  # int32 [R, max length]
    all_token_ids_stride: int,
    prefill_lens_ptr: Tensor,  # int32 [R]
    num_computed_tokens_ptr: Tensor,  # int32 [R]
    BLOCK_SIZE: int,
    LOOKAHEAD_BLOCK: int,
) -> None:
    """Lays this step's share of each prompt into the input ids, and notes the token that follows it."""
    slots = idx_mapping_ptr.numpy()
    prefill_lens = prefill_lens_ptr.numpy()[slots].astype(np.int64)
    computed = num_computed_tokens_ptr.numpy()[slots].astype(np.int64)
    prefilling = computed < prefill_lens
    if not prefilling.any():
        return
    starts = query_start_loc_ptr.numpy()[: len(slots) + 1].astype(np.int64)
    lengths = np.diff(starts)[prefilling]
    slots, computed, prefill_lens = slots[prefilling], computed[prefilling], prefill_lens[prefilling]
    token_ids = all_token_ids_ptr.numpy()
    columns = _runs(computed, lengths)
    input_ids_ptr.numpy()[_runs(starts[:-1][prefilling], lengths)] = token_ids[np.repeat(slots, lengths), columns]
    following = next_prefill_tokens_ptr.numpy()
    for ahead in range(num_lookahead):
        place = computed + lengths + ahead
        known = place < prefill_lens
        following[ahead, slots] = np.where(known, token_ids[slots, np.where(known, place, 0)], 0)


def prepare_pos_seq_lens(
    pos_ptr: Tensor,  # int64 [max tokens]
    seq_lens_ptr: Tensor,  # int32 [R]
    idx_mapping_ptr: Tensor,  # [B]
    query_start_loc_ptr: Tensor,  # int32 [B + 1]
    num_computed_tokens_ptr: Tensor,  # int32 [R]
    max_num_reqs: int,
    BLOCK_SIZE: int,
) -> None:
    """Each token's position in its sequence, and each sequence's length after this step."""
    slots = idx_mapping_ptr.numpy()
    starts = query_start_loc_ptr.numpy()[: len(slots) + 1].astype(np.int64)
    computed = num_computed_tokens_ptr.numpy()[slots].astype(np.int64)
    lengths = np.diff(starts)
    seq_lens = seq_lens_ptr.numpy()
    seq_lens[: len(slots)] = computed + lengths
    seq_lens[len(slots) : max_num_reqs] = 0
    pos_ptr.numpy()[: starts[-1]] = _runs(computed, lengths)


def combine_sampled_and_draft_tokens(
    input_ids_ptr: Tensor,  # int32 [max tokens]
    idx_mapping_ptr: Tensor,  # [B]
    last_sampled_tokens_ptr: Tensor,  # [R, 1]
    query_start_loc_ptr: Tensor,  # int32 [B + 1]
    seq_lens_ptr: Tensor,  # int32 [R]
    prefill_len_ptr: Tensor,  # int32 [R]
    draft_tokens_ptr: Tensor,  # [R, speculative steps]
    draft_tokens_stride: int,
    cu_num_logits_ptr: Tensor,  # int32 [B + 1]
    logits_indices_ptr: Tensor,  # int64 [logits]
    BLOCK_SIZE: int,
    NUM_NEW_SAMPLED_TOKENS: int = 1,
) -> None:
    """Feeds each decoding request its last sampled token, and says which rows need logits."""
    slots = idx_mapping_ptr.numpy()
    num_logits = np.diff(cu_num_logits_ptr.numpy()[: len(slots) + 1])
    if NUM_NEW_SAMPLED_TOKENS != 1 or (num_logits != 1).any():
        raise NotImplementedError("speculative decoding has no CPU stand-in; leave speculative_config unset")
    last_rows = query_start_loc_ptr.numpy()[1 : len(slots) + 1].astype(np.int64) - 1
    logits_indices_ptr.numpy()[: len(slots)] = last_rows
    decoding = seq_lens_ptr.numpy()[: len(slots)] > prefill_len_ptr.numpy()[slots]
    input_ids_ptr.numpy()[last_rows[decoding]] = last_sampled_tokens_ptr.view(-1).numpy()[slots[decoding]]


def get_num_sampled_and_rejected(
    num_sampled_ptr: Tensor,  # int32 [B]
    num_rejected_ptr: Tensor,  # int32 [B]
    seq_lens_ptr: Tensor,  # int32 [B]
    cu_num_logits_ptr: Tensor,  # int32 [B + 1]
    idx_mapping_ptr: Tensor,  # [B]
    prefill_len_ptr: Tensor,  # int32 [R]
) -> None:
    """A request whose prompt is not finished draws no token, and so rejects none."""
    slots = idx_mapping_ptr.numpy()
    unfinished = seq_lens_ptr.numpy()[: len(slots)] < prefill_len_ptr.numpy()[slots]
    num_sampled = num_sampled_ptr.numpy()
    num_sampled[unfinished] = 0
    num_logits = np.diff(cu_num_logits_ptr.numpy()[: len(slots) + 1])
    num_rejected_ptr.numpy()[:] = np.where(unfinished, 0, num_logits - num_sampled)


def post_update(
    idx_mapping_ptr: Tensor,  # [B]; negative = leave alone
    num_computed_tokens_ptr: Tensor,  # int32 [R]
    last_sampled_tokens_ptr: Tensor,  # [R, 1]
    output_bin_counts_ptr: Tensor | None,  # int32 [R, vocab]
    output_bin_counts_stride: int,
    sampled_tokens_ptr: Tensor,  # int64 [B, 1]
    sampled_tokens_stride: int,
    num_sampled_ptr: Tensor,  # int32 [B]
    num_rejected_ptr: Tensor,  # int32 [B]
    query_start_loc_ptr: Tensor | None,  # int32 [B + 1]
    all_token_ids_ptr: Tensor,  # int32 [R, max length]
    all_token_ids_stride: int,
    total_len_ptr: Tensor,  # int32 [R]
) -> None:
    """Appends the sampled tokens to their requests and moves the counters of computed tokens on."""
    slots = idx_mapping_ptr.numpy()
    num_sampled = num_sampled_ptr.numpy()[: len(slots)]
    if (num_sampled > 1).any():
        raise NotImplementedError("speculative decoding has no CPU stand-in; leave speculative_config unset")
    drew = (num_sampled > 0) & (slots >= 0)
    rows, tokens = slots[drew], sampled_tokens_ptr.numpy()[: len(slots), 0][drew]
    total_len = total_len_ptr.numpy()
    all_token_ids_ptr.numpy()[rows, total_len[rows]] = tokens
    last_sampled_tokens_ptr.view(-1).numpy()[rows] = tokens
    total_len[rows] += 1
    if output_bin_counts_ptr is not None:
        output_bin_counts_ptr.numpy()[rows, tokens] += 1
    real = slots >= 0
    delta = -num_rejected_ptr.numpy()[: len(slots)]
    if query_start_loc_ptr is not None:
        delta = delta + np.diff(query_start_loc_ptr.numpy()[: len(slots) + 1])
    num_computed_tokens_ptr.numpy()[slots[real]] += delta[real]


def post_update_num_computed_tokens(
    idx_mapping_ptr: Tensor,  # [B]
    num_computed_tokens_ptr: Tensor,  # int32 [R]
    query_start_loc_ptr: Tensor,  # int32 [B + 1]
) -> None:
    """Moves the counters of computed tokens on after a step that drew nothing."""
    slots = idx_mapping_ptr.numpy()
    num_computed_tokens_ptr.numpy()[slots] += np.diff(query_start_loc_ptr.numpy()[: len(slots) + 1])


def expand_idx_mapping(
    idx_mapping_ptr: Tensor,  # [B]
    expanded_idx_mapping_ptr: Tensor,  # [logits]
    expanded_local_pos_ptr: Tensor,  # int32 [logits]
    cu_num_logits_ptr: Tensor,  # int32 [B + 1]
    BLOCK_SIZE: int,
) -> None:
    """Repeats each request's slot once per row of logits, and numbers the rows of a request from 0."""
    slots = idx_mapping_ptr.numpy()
    counts = np.diff(cu_num_logits_ptr.numpy()[: len(slots) + 1])
    expanded_idx_mapping_ptr.numpy()[:] = np.repeat(slots, counts)
    expanded_local_pos_ptr.numpy()[:] = _runs(np.zeros(len(slots), np.int64), counts)


def _runs(first: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The runs first[i], first[i] + 1, ..., `lengths[i]` numbers each, one after another: int64 [sum of lengths]."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(first - (ends - lengths), lengths) + np.arange(total)


def _int32_at(address: int, length: int) -> np.ndarray:
    """The int32 array at an address that vLLM handed over; vLLM's tables outlive the call."""
    return np.ctypeslib.as_array((ctypes.c_int32 * length).from_address(address))
