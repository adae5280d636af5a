"""What changes between two steps of decoding alone, in Triton: one kernel before the model, one after the draw.

Imported on a GPU only; `rollout/vllm_plugin/decode_runner.py` launches them. Parameters come in the order of
`rollout.vllm_plugin.launch.Launcher`: tensors of the step, its numbers, what stays, constants.

Shapes: B = rows of the step, P = rows of the CUDA graph that it replays, each of one token, R = request slots.
"""

# ruff: noqa: PLR0913  the parameters are the kernels' own
# pyright: reportMissingImports=false, reportInvalidTypeForm=false
# The kernel language is not typed for checkers.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

NO_CACHE_SLOT = tl.constexpr(-1)


@triton.jit(do_not_specialize=["slots_ptr", "num_rows"])
def place_rows(
    slots_ptr,  # int64 [B]
    num_rows,  # B
    num_computed_ptr,  # int32 [R]
    last_tokens_ptr,  # int64 [R]
    input_ids_ptr,  # int32 [P], written
    positions_ptr,  # int64 [P], written
    seq_lens_ptr,  # int32 [P], written
    query_starts_ptr,  # int32 [P + 1], written; the first is 0 for good
    is_padding_ptr,  # bool [P], written
    blocks_ptr,  # int32 [R, most_blocks]
    row_blocks_ptr,  # int32 [P, most_blocks], written
    cache_slots_ptr,  # int64 [P], written
    most_blocks,  # of a sequence
    block_size,
    BLOCK: tl.constexpr,
):
    """A row's next input, and where its keys and values go in one group of the cache; grid (P,)."""
    row = tl.program_id(0).to(tl.int64)
    is_real = row < num_rows
    slot = tl.load(slots_ptr + row, mask=is_real, other=0)
    position = tl.load(num_computed_ptr + slot)
    tl.store(input_ids_ptr + row, tl.load(last_tokens_ptr + slot).to(tl.int32), mask=is_real)
    tl.store(positions_ptr + row, position.to(tl.int64), mask=is_real)
    tl.store(seq_lens_ptr + row, tl.where(is_real, position + 1, 0))
    tl.store(query_starts_ptr + row + 1, tl.minimum(row + 1, num_rows).to(tl.int32))
    tl.store(is_padding_ptr + row, row >= num_rows)
    num_own = tl.where(is_real, position // block_size + 1, 0)
    num_written = tl.where(is_real, num_own, most_blocks)
    for start in range(0, num_written, BLOCK):
        places = start + tl.arange(0, BLOCK)
        blocks = tl.load(blocks_ptr + slot * most_blocks + places, mask=places < num_own, other=0)
        tl.store(row_blocks_ptr + row * most_blocks + places, blocks, mask=places < num_written)
    block = tl.load(blocks_ptr + slot * most_blocks + position // block_size, mask=is_real, other=0).to(tl.int64)
    cache_slot = tl.where(is_real, block * block_size + position % block_size, NO_CACHE_SLOT)
    tl.store(cache_slots_ptr + row, cache_slot)


@triton.jit(do_not_specialize=["slots_ptr", "sampled_ptr", "num_rows"])
def take_in_tokens(
    slots_ptr,  # int64 [B]
    sampled_ptr,  # int64 [B]
    num_rows,  # B
    num_computed_ptr,  # int32 [R], counted up
    last_tokens_ptr,  # int64 [R], written
    lengths_ptr,  # int32 [R], counted up
    token_ids_ptr,  # int32 [R, most_tokens], written
    most_tokens,
    BLOCK: tl.constexpr,
):
    """Appends each row's token to its sequence; grid (ceil(B / BLOCK),)."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_real = rows < num_rows
    slots = tl.load(slots_ptr + rows, mask=is_real, other=0)
    tokens = tl.load(sampled_ptr + rows, mask=is_real, other=0)
    lengths = tl.load(lengths_ptr + slots, mask=is_real, other=0)
    num_computed = tl.load(num_computed_ptr + slots, mask=is_real, other=0)
    tl.store(token_ids_ptr + slots * most_tokens + lengths, tokens.to(tl.int32), mask=is_real)
    tl.store(last_tokens_ptr + slots, tokens, mask=is_real)
    tl.store(lengths_ptr + slots, lengths + 1, mask=is_real)
    tl.store(num_computed_ptr + slots, num_computed + 1, mask=is_real)
