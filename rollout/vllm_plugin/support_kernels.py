"""What a step records beside its draw, in Triton: the kept ids of its rows, and the routes of its tokens.

Used by `draw_kernels.py`. Where the parts lie, and how the host reads them, is `support.py`'s.
"""

# pyright: reportMissingImports=false, reportInvalidTypeForm=false
# The kernel language is not typed for checkers.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place_ids(ids, kept, is_recorded, num_placed_ptr, ids_ptr, room):
    """Writes a row's kept ids, if it is recorded, behind those of the rows that came before, whichever they were.

    Returns where they begin and how many they are; 0 and the negative of it if there is no room.
    """
    size = tl.where(is_recorded, tl.sum(kept.to(tl.int32)), 0)
    start = tl.atomic_add(num_placed_ptr, size, sem="relaxed")
    if start + size <= room:
        rank = tl.cumsum(kept.to(tl.int32), axis=0) - 1
        tl.store(ids_ptr + start + rank, ids, mask=kept & (rank < size))
    else:
        start, size = tl.zeros((), tl.int32), -size
    return start, size


@triton.jit
def store_row(packed_ptr, logprobs_at, starts_at, logprob, size, start, RECORD: tl.constexpr):
    """A row's log-probability, and with RECORD how many ids it has and where they begin."""
    tl.store((packed_ptr + logprobs_at).to(tl.pointer_type(tl.float32)), logprob)
    if RECORD:
        tl.store(packed_ptr, size)
        tl.store(packed_ptr + starts_at, start)


@triton.jit
def copy_slots(source_ptr, packed_ptr, block, num_slots, BLOCK: tl.constexpr):
    """Int64 to int64, one block."""
    at = block.to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    slots = tl.load(source_ptr + at, mask=at < num_slots)
    tl.store(packed_ptr.to(tl.pointer_type(tl.int64)) + at, slots, mask=at < num_slots)


@triton.jit
def copy_routes(source_ptr, packed_ptr, block, num_ids, ROUTE_BYTES: tl.constexpr, BLOCK: tl.constexpr):
    """Int32 to uint8 or uint16, one block."""
    at = block.to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    routes = tl.load(source_ptr + at, mask=at < num_ids)
    if ROUTE_BYTES == 1:
        tl.store(packed_ptr.to(tl.pointer_type(tl.uint8)) + at, routes.to(tl.uint8), mask=at < num_ids)
    else:
        tl.store(packed_ptr.to(tl.pointer_type(tl.uint16)) + at, routes.to(tl.uint16), mask=at < num_ids)
