"""Stand-ins for the sampler's kernels: temperature, min-p, bias, Gumbel noise, kept sets, log-probs.

Each function has the parameters of the kernel it replaces, in its order and under its names (a test compares them), and
writes into the same arguments. The Gumbel noise is the GPU kernel's own: MurmurHash3 of (seed, position, token id).
So a draw is a pure function of the request's seed and the place, whatever the batch.

Shapes: B = rows of logits in the step, V = vocabulary, R = request slots.
"""

# ruff: noqa: PLR0913  the parameters are the kernels' own
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def apply_temperature(
    logits_ptr: Tensor,  # float32 [B, V], changed in place
    logits_stride: int,
    expanded_idx_mapping_ptr: Tensor,  # [B]
    temperature_ptr: Tensor,  # float32 [R]
    vocab_size: int,
    BLOCK_SIZE: int,
) -> None:
    """Divides each row by its request's temperature; 0 (greedy) leaves the row alone."""
    temperature = temperature_ptr[expanded_idx_mapping_ptr.long()]
    logits_ptr.div_(torch.where(temperature == 0, 1.0, temperature)[:, None])


def apply_min_p(
    logits_ptr: Tensor,  # float32 [B, V], changed in place
    logits_stride: int,
    expanded_idx_mapping_ptr: Tensor,  # [B]
    min_p_ptr: Tensor,  # float32 [R]
    vocab_size: int,
    BLOCK_SIZE: int,
) -> None:
    """Removes what is less likely than `min_p` times the likeliest token."""
    min_p = min_p_ptr[expanded_idx_mapping_ptr.long()][:, None]
    threshold = logits_ptr.amax(-1, keepdim=True) + min_p.log()
    logits_ptr.masked_fill_((min_p > 0) & (logits_ptr < threshold), -torch.inf)


def apply_bias(
    logits_ptr: Tensor,  # float32 [B, V], changed in place
    logits_stride: int,
    vocab_size: int,
    expanded_idx_mapping_ptr: Tensor,  # [B]
    num_allowed_token_ids_ptr: Tensor,  # int32 [R]
    allowed_token_ids_ptr: Tensor,  # int32 [R, most]
    allowed_token_ids_stride: int,
    num_logit_bias_ptr: Tensor,  # int32 [R]
    bias_token_ids_ptr: Tensor,  # int32 [R, most]
    bias_token_ids_stride: int,
    bias_ptr: Tensor,  # float32 [R, most]
    bias_stride: int,
    pos_ptr: Tensor,  # int64 [B]
    min_lens_ptr: Tensor,  # int32 [R]
    num_stop_token_ids_ptr: Tensor,  # int32 [R]
    restore_when_all_masked_ptr: Tensor,  # int32 [R]
    stop_token_ids_ptr: Tensor,  # int32 [R, most]
    stop_token_ids_stride: int,
    BLOCK_SIZE: int,
    LOGITS_BLOCK_SIZE: int,
    CHECK_ALL_MASKED_ROWS: bool,
) -> None:
    """Allowed ids, logit bias and the ban on stop tokens before the least length, row by row (they are rare)."""
    for row, slot in enumerate(expanded_idx_mapping_ptr.tolist()):
        logits = logits_ptr[row]
        if count := int(num_allowed_token_ids_ptr[slot]):
            ids = allowed_token_ids_ptr[slot, :count].long()
            kept = logits[ids]
            logits.fill_(-torch.inf)
            logits[ids] = kept
        if count := int(num_logit_bias_ptr[slot]):
            logits[bias_token_ids_ptr[slot, :count].long()] += bias_ptr[slot, :count]
        count = int(num_stop_token_ids_ptr[slot])
        if count and int(pos_ptr[row]) + 1 < int(min_lens_ptr[slot]):
            ids = stop_token_ids_ptr[slot, :count].long()
            before = logits[ids]
            logits[ids] = -torch.inf
            restore = CHECK_ALL_MASKED_ROWS and bool(restore_when_all_masked_ptr[slot])
            if restore and bool((logits == -torch.inf).all()):
                logits[ids] = torch.where(before.isfinite(), before, -torch.inf)


def gumbel_sample(
    local_argmax_ptr: Tensor,  # int64 [B, blocks], written
    local_argmax_stride: int,
    local_max_ptr: Tensor,  # float32 | float64 [B, blocks], written
    local_max_stride: int,
    logits_cache_ptr: Tensor | None,
    logits_cache_stride_0: int,
    logits_cache_stride_1: int,
    logits_cache_col_ptr: Tensor | None,
    logits_cache_source_ptr: Tensor | None,
    logits_cache_source_stride: int,
    logits_ptr: Tensor,  # [B, V]
    logits_stride: int,
    expanded_idx_mapping_ptr: Tensor,  # [B]
    seeds_ptr: Tensor,  # int64 [R]
    pos_ptr: Tensor,  # int64 [B]
    temp_ptr: Tensor,  # float32 [R]
    vocab_size: int,
    BLOCK_SIZE: int,
    IS_DRAFTING: bool,
    APPLY_TEMPERATURE: bool,
    USE_FP64: bool,
    PER_TOKEN_COL: bool,
) -> None:
    """Draws one token per row by the Gumbel-max trick; at temperature 0 it is the argmax.

    The caller reduces over blocks of the vocabulary; all of the answer goes into the first block. Noise is computed for
    ids of finite logit only, so the cost follows the kept sets.
    """
    if logits_cache_ptr is not None or IS_DRAFTING or USE_FP64:
        raise NotImplementedError("speculative decoding and fp64 Gumbel noise have no CPU stand-in; leave both off")
    slots = expanded_idx_mapping_ptr.long()
    logits = logits_ptr.float()
    temperature = temp_ptr[slots]
    if APPLY_TEMPERATURE:
        logits = logits / torch.where(temperature == 0, 1.0, temperature)[:, None]
    scores = np.array(logits.numpy())
    rows, ids = np.nonzero(np.isfinite(scores) & (temperature.numpy() != 0)[:, None])
    scores[rows, ids] += gumbel_noise(seeds_ptr[slots].numpy()[rows], pos_ptr.numpy()[rows], ids)
    local_max_ptr.fill_(-torch.inf)
    local_max_ptr[:, 0] = 0
    local_argmax_ptr.numpy()[:, 0] = scores.argmax(-1)


def compact_sampling_mask(
    logits_ptr: Tensor,  # [rows, V]; -inf = removed by truncation
    logits_row_stride: int,
    logits_col_stride: int,
    cu_num_logits_ptr: Tensor,  # int32 [requests + 1]
    num_sampled_tokens_ptr: Tensor,  # int32 [requests]
    token_ids_ptr: Tensor,  # int32 [output rows, max_num_kept], written
    token_ids_row_stride: int,
    packed_mask_ptr: Tensor,  # uint8 [output rows, ceil(V / 8)], written for rows wider than max_num_kept
    packed_mask_row_stride: int,
    counts_ptr: Tensor,  # int32 [output rows], written
    vocab_size: int,
    max_num_kept: int,
    ROWS_PER_REQUEST: int,
    BLOCK_SIZE: int,
) -> None:
    """The kept set of each output row: its first ids, ascending, its size, and the whole set as bits if it is wide."""
    output_rows = np.arange(counts_ptr.shape[0])
    requests, places = np.divmod(output_rows, ROWS_PER_REQUEST)
    active = output_rows[places < num_sampled_tokens_ptr.numpy()[requests]]
    sources = cu_num_logits_ptr.numpy()[requests[active]] + places[active]
    kept = np.isfinite(logits_ptr.float().numpy())[sources]  # [active rows, V]
    rows, ids = np.nonzero(kept)
    sizes = np.bincount(rows, minlength=len(active))
    counts = counts_ptr.numpy()
    counts[:] = 0
    counts[active] = sizes
    column = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    fits = column < max_num_kept
    token_ids_ptr.numpy()[active[rows[fits]], column[fits]] = ids[fits]
    wide = sizes > max_num_kept
    if wide.any():
        packed_mask_ptr.numpy()[active[wide]] = np.packbits(kept[wide], axis=1, bitorder="little")


def topk_log_softmax(
    output_ptr: Tensor,  # float32 [B, topk], written
    logits_ptr: Tensor,  # [B, V]
    logits_stride: int,
    topk_ids_ptr: Tensor,  # int64 [B, topk]
    topk_ids_stride: int,
    topk: int,
    vocab_size: int,
    BLOCK_SIZE: int,
    TOPK_BLOCK_SIZE: int,
) -> None:
    """log-softmax over the row, at the asked ids only, in float32."""
    logits = logits_ptr.float()
    shifted = logits - logits.amax(-1, keepdim=True)
    output_ptr.copy_(shifted.gather(-1, topk_ids_ptr) - shifted.exp().sum(-1, keepdim=True).log())


def ranks(
    output_ptr: Tensor,  # int64 [B], written
    logits_ptr: Tensor,  # [B, V]
    logits_stride: int,
    token_ids_ptr: Tensor,  # int64 [B]
    vocab_size: int,
    BLOCK_SIZE: int,
) -> None:
    """How many ids are at least as likely as the given one (1 = the likeliest)."""
    output_ptr.copy_((logits_ptr >= logits_ptr.gather(-1, token_ids_ptr.view(-1, 1))).sum(-1))


def gumbel_noise(seeds: np.ndarray, positions: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Gumbel noise of (seed, position, token id), float32 [n], as vLLM's GPU sampler draws it.

    Source: vLLM 0.32, `murmur3_uniform32` and `gumbel_noised_argmax`: u = (hash + 1/2) / 2^32 and -log(-log(1 - u)).
    """
    uniform = (murmur3_hash(seeds, positions, ids).astype(np.float64) + 0.5) * 2.0**-32
    return (-np.log(-np.log1p(-uniform))).astype(np.float32)


def murmur3_hash(seeds: np.ndarray, positions: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """MurmurHash3_x86_32 (hash seed 0) of the words seed low, seed high, position, token id: uint32 [n]."""
    wide = seeds.astype(np.int64).view(np.uint64)
    words = (wide, wide >> np.uint64(32), positions.astype(np.int64).view(np.uint64), ids.astype(np.uint64))
    state = np.zeros(len(ids), np.uint32)
    for word in words:
        key = word.astype(np.uint32) * np.uint32(0xCC9E2D51)
        state ^= _rotate(key, 15) * np.uint32(0x1B873593)
        state = _rotate(state, 13) * np.uint32(5) + np.uint32(0xE6546B64)
    state ^= np.uint32(16)
    state ^= state >> np.uint32(16)
    state *= np.uint32(0x85EBCA6B)
    state ^= state >> np.uint32(13)
    state *= np.uint32(0xC2B2AE35)
    return state ^ (state >> np.uint32(16))


def _rotate(value: np.ndarray, bits: int) -> np.ndarray:
    return (value << np.uint32(bits)) | (value >> np.uint32(32 - bits))
