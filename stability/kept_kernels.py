"""Triton kernels of `kept_triton`: log-probabilities over sets of kept ids, and their gradients.

N = rows, M = kept ids in all (CSR), d = hidden width (WIDTH), V = vocabulary. Sums are float32 whatever the inputs'
type. Scalars join vectors through `tl.where` on bounds, and loops carry tensors: the interpreter needs both.
"""

# ruff: noqa: PLR0913  the parameters are the kernels' own
# pyright: reportMissingImports=false, reportInvalidTypeForm=false

# Launches and the kernel language are not typed for checkers.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

NO_KEY = tl.constexpr(2**31 - 1)
"""Sorts behind every id: a pair without a gradient."""


@triton.jit
def _nothing():
    """Running numbers of a softmax, over no logits yet: the highest z, sum of e = exp(z - highest), sum of e z."""
    return tl.full((), -float("inf"), tl.float32), tl.zeros((), tl.float32), tl.zeros((), tl.float32)


@triton.jit
def _include(highest, total, weighted, z, real):
    """Takes a block of logits with at least one real one into the running numbers."""
    z = tl.where(real, z, -float("inf"))
    higher = tl.maximum(highest, tl.max(z, 0))
    exps, shrink = tl.exp(z - higher), tl.exp(highest - higher)
    weighted = weighted * shrink + tl.sum(tl.where(real, exps * z, 0.0), 0)
    return higher, total * shrink + tl.sum(exps, 0), weighted


@triton.jit
def check_kernel(
    OFFSETS,
    IDS,
    UNTRUNCATED,
    TARGETS,
    KEYS,
    ROWS,
    COUNTS,
    widest,
    num_rows,
    PAIRS: tl.constexpr,
    ROWS_BLOCK: tl.constexpr,
    IDS_BLOCK: tl.constexpr,
):
    """One program per block of rows: counts targets outside their set, and dense rows; lists the (id, row) pairs."""
    rows = tl.program_id(0) * ROWS_BLOCK + tl.arange(0, ROWS_BLOCK)
    begin = tl.load(OFFSETS + rows, mask=rows < num_rows, other=0)
    end = tl.load(OFFSETS + rows + 1, mask=rows < num_rows, other=0)
    target = tl.load(TARGETS + rows, mask=rows < num_rows, other=-1)
    gathered = (end - begin > 1) & (end - begin <= widest)
    dense = (tl.load(UNTRUNCATED + rows, mask=rows < num_rows, other=1) != 0) | (end - begin > widest)
    found = tl.zeros((ROWS_BLOCK,), tl.int32)
    for start in range(0, tl.max(end - begin, 0), IDS_BLOCK):
        places = begin[:, None] + start + tl.arange(0, IDS_BLOCK)[None, :]
        real = places < end[:, None]
        ids = tl.load(IDS + places, mask=real, other=-1).to(tl.int32)
        found += tl.sum((real & (ids == target[:, None])).to(tl.int32), 1)
        if PAIRS:
            tl.store(KEYS + places, tl.where(gathered[:, None], ids, NO_KEY), mask=real)
            tl.store(ROWS + places, tl.zeros((ROWS_BLOCK, IDS_BLOCK), tl.int32) + rows[:, None], mask=real)
    num_missing = tl.sum(((found == 0) & (dense == 0)).to(tl.int32), 0)
    num_dense = tl.sum((dense & (rows < num_rows)).to(tl.int32), 0)
    tl.atomic_add(COUNTS, num_missing, mask=num_missing > 0, sem="relaxed")
    tl.atomic_add(COUNTS + 1, num_dense, mask=num_dense > 0, sem="relaxed")


@triton.jit
def forward_kernel(
    HIDDEN,
    WEIGHT,
    OFFSETS,
    IDS,
    TARGETS,
    TEMPERATURE,
    LOGPROBS,
    ENTROPY,
    LSE,
    Z,
    hidden_stride,
    weight_stride,
    widest,
    WIDTH: tl.constexpr,
    SAVE: tl.constexpr,
    IDS_BLOCK: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
):
    """One program per row: logits of its set, with a running log-sum-exp and entropy; 0 where nothing is gathered."""
    row = tl.program_id(0)
    begin, end = tl.load(OFFSETS + row), tl.load(OFFSETS + row + 1)
    target, temperature = tl.load(TARGETS + row), tl.load(TEMPERATURE + row)
    gathered = (end - begin > 1) & (end - begin <= widest)
    stop = tl.where(gathered, end, begin)
    lanes, columns = tl.arange(0, IDS_BLOCK), tl.arange(0, WIDTH_BLOCK)
    highest, total, weighted = _nothing()
    z_target = tl.zeros((), tl.float32)
    for start in range(begin, stop, IDS_BLOCK):
        real = start + lanes < stop
        ids = tl.load(IDS + start + lanes, mask=real, other=0).to(tl.int64)
        products = tl.zeros((IDS_BLOCK, WIDTH_BLOCK), tl.float32)
        for first in tl.static_range(0, WIDTH, WIDTH_BLOCK):
            inside = first + columns < WIDTH
            h = tl.load(HIDDEN + row.to(tl.int64) * hidden_stride + first + columns, mask=inside, other=0.0)
            places = WEIGHT + ids[:, None] * weight_stride + (first + columns)[None, :]
            w = tl.load(places, mask=real[:, None] & inside[None, :], other=0.0)
            products += w.to(tl.float32) * h.to(tl.float32)[None, :]
        z = tl.sum(products, 1) / temperature
        z_target += tl.sum(tl.where(real & (ids == target), z, 0.0), 0)
        highest, total, weighted = _include(highest, total, weighted, z, real)
        if SAVE:
            tl.store(Z + start + lanes, z, mask=real)
    total = tl.where(gathered, total, 1.0)
    lse = tl.where(gathered, highest + tl.log(total), 0.0)
    tl.store(LOGPROBS + row, z_target - lse)
    tl.store(ENTROPY + row, lse - weighted / total)
    tl.store(LSE + row, lse)


@triton.jit
def order_kernel(KEYS, ORDER, ROWS, SORTED_ROWS, SLOTS, COUNTS, num_ids, BLOCK: tl.constexpr):
    """Brings rows into the keys' order, inverts the order, and counts the pairs in front of NO_KEY."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = place < num_ids
    source = tl.load(ORDER + place, mask=real, other=0)
    key = tl.load(KEYS + place, mask=real, other=NO_KEY)
    following = tl.load(KEYS + place + 1, mask=place + 1 < num_ids, other=NO_KEY)
    tl.store(SORTED_ROWS + place, tl.load(ROWS + source, mask=real, other=0), mask=real)
    tl.store(SLOTS + source, place, mask=real)
    tl.store(COUNTS + 2 + place * 0, place + 1, mask=(key != NO_KEY) & (following == NO_KEY))


@triton.jit
def hidden_grad_kernel(
    WEIGHT,
    OFFSETS,
    IDS,
    TARGETS,
    TEMPERATURE,
    Z,
    LSE,
    GRAD,
    SLOTS,
    GRAD_HIDDEN,
    DZ,
    weight_stride,
    widest,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    PAIRS: tl.constexpr,
    IDS_BLOCK: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
):
    """One program per row and slice of its width: dz = (1[target] - p) grad / temperature, and dz W."""
    row = tl.program_id(0)
    begin, end = tl.load(OFFSETS + row), tl.load(OFFSETS + row + 1)
    target, lse = tl.load(TARGETS + row), tl.load(LSE + row)
    scale = tl.load(GRAD + row) / tl.load(TEMPERATURE + row)
    stop = tl.where((end - begin > 1) & (end - begin <= widest), end, begin)
    lanes = tl.arange(0, IDS_BLOCK)
    columns = tl.program_id(1) * WIDTH_BLOCK + tl.arange(0, WIDTH_BLOCK)
    inside = columns < WIDTH
    acc = tl.zeros((WIDTH_BLOCK,), tl.float32)
    for start in range(begin, stop, IDS_BLOCK):
        real = start + lanes < stop
        ids = tl.load(IDS + start + lanes, mask=real, other=0).to(tl.int64)
        z = tl.load(Z + start + lanes, mask=real, other=-float("inf"))
        dz = ((ids == target).to(tl.float32) - tl.exp(z - lse)) * scale
        if PAIRS and tl.program_id(1) == 0:
            tl.store(DZ + tl.load(SLOTS + start + lanes, mask=real, other=0), dz, mask=real)
        if HIDDEN:
            read = start + lanes < tl.where(scale != 0, stop, begin)
            places = WEIGHT + ids[:, None] * weight_stride + columns[None, :]
            w = tl.load(places, mask=read[:, None] & inside[None, :], other=0.0)
            acc += tl.sum(w.to(tl.float32) * tl.where(real, dz, 0.0)[:, None], 0)
    if HIDDEN:
        tl.store(GRAD_HIDDEN + row.to(tl.int64) * WIDTH + columns, acc, mask=inside)


@triton.jit
def _load_pair(HIDDEN, ROWS, DZ, place, end, columns, hidden_stride, WIDTH: tl.constexpr):
    """A pair's row of the input, not read where its dz is 0, and the dz."""
    dz = tl.load(DZ + place, mask=place < end, other=0.0)
    row = tl.load(ROWS + place, mask=place < end, other=0).to(tl.int64)
    return tl.load(HIDDEN + row * hidden_stride + columns, mask=columns < tl.where(dz != 0, WIDTH, 0), other=0.0), dz


@triton.jit
def _put(GRAD, key, grad_stride, columns, inside, value, ADD: tl.constexpr):
    places = GRAD + key.to(tl.int64) * grad_stride + columns
    if ADD:
        value += tl.load(places, mask=inside, other=0.0)
    tl.store(places, value, mask=inside)


@triton.jit
def weight_grad_kernel(
    HIDDEN,
    KEYS,
    ROWS,
    DZ,
    COUNTS,
    GRAD,
    PARTIALS,
    grad_stride,
    per_block,
    hidden_stride,
    WIDTH: tl.constexpr,
    ADD: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
):
    """One program per block of sorted pairs and slice of the width, all blocks of one slice first: it fits the cache.

    An id whose pairs all lie in the block is written to its row of GRAD; the block's first and last id may continue
    outside and then go to PARTIALS [blocks, 2, d]: 0 for the id the block starts with, 1 for a later one.
    """
    num_pairs = tl.load(COUNTS + 2)
    block = tl.program_id(0)
    begin = block * per_block
    end = tl.minimum(begin + per_block, num_pairs)
    columns = tl.program_id(1) * WIDTH_BLOCK + tl.arange(0, WIDTH_BLOCK)
    inside = columns < WIDTH
    partial = PARTIALS + block.to(tl.int64) * (2 * WIDTH) + columns
    before = tl.load(KEYS + begin - 1, mask=(begin > 0) & (begin < end), other=-1)
    acc = tl.zeros((WIDTH_BLOCK,), tl.float32)
    later = 0
    for start in range(begin, end, 4):  # four rows are on their way before the first is used
        h0, dz0 = _load_pair(HIDDEN, ROWS, DZ, start, end, columns, hidden_stride, WIDTH)
        h1, dz1 = _load_pair(HIDDEN, ROWS, DZ, start + 1, end, columns, hidden_stride, WIDTH)
        h2, dz2 = _load_pair(HIDDEN, ROWS, DZ, start + 2, end, columns, hidden_stride, WIDTH)
        h3, dz3 = _load_pair(HIDDEN, ROWS, DZ, start + 3, end, columns, hidden_stride, WIDTH)
        for i in tl.static_range(4):
            place = start + i
            h, dz = (h0, dz0) if i == 0 else (h1, dz1) if i == 1 else (h2, dz2) if i == 2 else (h3, dz3)
            acc += h.to(tl.float32) * dz
            key = tl.load(KEYS + place, mask=place < end, other=-1)
            following = tl.load(KEYS + place + 1, mask=place + 1 < num_pairs, other=-1)
            if (place < end) & ((place + 1 == end) | (following != key)):
                if (following == key) | ((later == 0) & (before == key)):
                    tl.store(partial + later * WIDTH, acc, mask=inside)
                else:
                    _put(GRAD, key, grad_stride, columns, inside, acc, ADD)
                acc = tl.zeros((WIDTH_BLOCK,), tl.float32)
                later = 1


@triton.jit
def join_kernel(
    KEYS,
    GRAD,
    PARTIALS,
    grad_stride,
    per_block,
    num_ids,
    WIDTH: tl.constexpr,
    ADD: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
):
    """One program per block and slice: if an id's pairs start in this block and go on, adds its parts in order."""
    block = tl.program_id(0)
    begin, after = block * per_block, (block + 1) * per_block
    key = tl.load(KEYS + after - 1, mask=after < num_ids, other=NO_KEY)
    following = tl.load(KEYS + after, mask=after < num_ids, other=NO_KEY)
    later = (tl.load(KEYS + begin) != key).to(tl.int32)
    before = tl.load(KEYS + begin - 1, mask=begin > 0, other=-1)
    if (key == following) & (key != NO_KEY) & ((later == 1) | (before != key)):
        columns = tl.program_id(1) * WIDTH_BLOCK + tl.arange(0, WIDTH_BLOCK)
        inside = columns < WIDTH
        total = tl.load(PARTIALS + (block.to(tl.int64) * 2 + later) * WIDTH + columns, mask=inside, other=0.0)
        parts = block + 1 + tl.arange(0, PARTS)
        num_more = PARTS
        while num_more == PARTS:
            places = parts * per_block
            more = tl.load(KEYS + places, mask=places < num_ids, other=-1) == key
            tile = PARTIALS + (parts.to(tl.int64) * (2 * WIDTH))[:, None] + columns[None, :]
            total += tl.sum(tl.load(tile, mask=more[:, None] & inside[None, :], other=0.0), 0)
            num_more = tl.sum(more.to(tl.int32), 0)
            parts += PARTS
        _put(GRAD, key, grad_stride, columns, inside, total, ADD)


@triton.jit
def support_softmax_kernel(
    LOGITS,
    OFFSETS,
    IDS,
    UNTRUNCATED,
    TARGETS,
    TEMPERATURE,
    Z_TARGET,
    LSE,
    ENTROPY,
    num_logits,
    BLOCK: tl.constexpr,
):
    """One program per row of dense logits [n, V]: the softmax's numbers over its support."""
    row = tl.program_id(0)
    begin, end = tl.load(OFFSETS + row), tl.load(OFFSETS + row + 1)
    target, temperature = tl.load(TARGETS + row), tl.load(TEMPERATURE + row)
    logits = LOGITS + row.to(tl.int64) * num_logits
    lanes = tl.arange(0, BLOCK)
    highest, total, weighted = _nothing()
    found = (tl.load(UNTRUNCATED + row) != 0).to(tl.int32)
    if found == 1:
        for start in range(0, num_logits, BLOCK):
            real = start + lanes < num_logits
            z = tl.load(logits + start + lanes, mask=real, other=0.0) / temperature
            highest, total, weighted = _include(highest, total, weighted, z, real)
    else:
        for place in range(begin, end, BLOCK):
            listed = place + lanes < end
            ids = tl.load(IDS + place + lanes, mask=listed, other=0)
            found += tl.sum((listed & (ids == target)).to(tl.int32), 0)
            z_listed = tl.load(logits + ids, mask=listed, other=0.0) / temperature
            highest, total, weighted = _include(highest, total, weighted, z_listed, listed)
    total = tl.where(found > 0, total, 1.0)
    lse = highest + tl.log(total)
    tl.store(LSE + row, lse)
    tl.store(ENTROPY + row, lse - weighted / total)
    z_target = tl.load(logits + target, mask=found > 0, other=0.0) / temperature
    tl.store(Z_TARGET + row, tl.where(found > 0, z_target, -float("inf")))


@triton.jit
def support_logit_grad_kernel(
    LOGITS,
    OFFSETS,
    IDS,
    UNTRUNCATED,
    TARGETS,
    TEMPERATURE,
    LSE,
    GRAD,
    DZ,
    num_logits,
    BLOCK: tl.constexpr,
):
    """One program per row: dz [n, V] = (1[target] - p) grad / temperature on the support, 0 outside."""
    row = tl.program_id(0)
    begin, end = tl.load(OFFSETS + row), tl.load(OFFSETS + row + 1)
    target, temperature = tl.load(TARGETS + row), tl.load(TEMPERATURE + row)
    lse, scale = tl.load(LSE + row), tl.load(GRAD + row) / temperature
    logits = LOGITS + row.to(tl.int64) * num_logits
    dz = DZ + row.to(tl.int64) * num_logits
    lanes = tl.arange(0, BLOCK)
    if tl.load(UNTRUNCATED + row) != 0:
        for start in range(0, num_logits, BLOCK):
            real = start + lanes < num_logits
            p = tl.exp(tl.load(logits + start + lanes, mask=real, other=0.0) / temperature - lse)
            tl.store(dz + start + lanes, ((start + lanes == target).to(tl.float32) - p) * scale, mask=real)
    else:
        for start in range(0, num_logits, BLOCK):
            tl.store(dz + start + lanes, tl.zeros((BLOCK,), tl.float32), mask=start + lanes < num_logits)
        tl.debug_barrier()
        for place in range(begin, end, BLOCK):
            listed = place + lanes < end
            ids = tl.load(IDS + place + lanes, mask=listed, other=0)
            p_listed = tl.exp(tl.load(logits + ids, mask=listed, other=0.0) / temperature - lse)
            tl.store(dz + ids, ((ids == target).to(tl.float32) - p_listed) * scale, mask=listed)
