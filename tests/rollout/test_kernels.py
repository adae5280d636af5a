"""The stand-ins for vLLM's kernels: same parameters, and the same results as the kernel's text says."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rollout.vllm_plugin import UnsupportedVllmError, check_version
from rollout.vllm_plugin import kernels_batch as batch
from rollout.vllm_plugin import kernels_sample as sample
from rollout.vllm_plugin.standins import STAND_INS


def kernel_parameters(name: str) -> list[str]:
    """The parameters of a Triton kernel, read from vLLM's source: without Triton nothing of it can be imported."""
    module, function = name.rsplit(".", 1)
    root = importlib.util.find_spec("vllm")
    assert root is not None and root.submodule_search_locations is not None
    path = Path(root.submodule_search_locations[0], *module.split(".")[1:]).with_suffix(".py")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name == function:
            return [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    raise AssertionError(f"vLLM has no kernel {name} any more")


@pytest.mark.parametrize("name", STAND_INS)
def test_parameters_are_the_kernels_own(name: str) -> None:
    assert list(inspect.signature(STAND_INS[name]).parameters) == kernel_parameters(name)


def test_any_other_vllm_is_refused() -> None:
    for good in ("0.32.0", "0.32.1", "0.32.0+cpu"):
        check_version(good)
    for bad in ("0.31.2", "0.33.0", "1.32.0", "0.3.2", "0.320.0"):
        with pytest.raises(UnsupportedVllmError, match=r"install vllm==0\.32\.0"):
            check_version(bad)


def murmur3(data: bytes) -> int:
    """MurmurHash3_x86_32 with seed 0, word by word in plain integers (A. Appleby's public-domain algorithm)."""
    mask, state = 0xFFFFFFFF, 0
    for i in range(0, len(data), 4):
        key = int.from_bytes(data[i : i + 4], "little") * 0xCC9E2D51 & mask
        key = (key << 15 | key >> 17) * 0x1B873593 & mask
        state ^= key
        state = (state << 13 | state >> 19) & mask
        state = (state * 5 + 0xE6546B64) & mask
    state ^= len(data)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        state = (state ^ state >> shift) * factor & mask
    return state ^ state >> 16


def test_hash_is_murmur3() -> None:
    assert murmur3(b"test") == 0xBA6BD213  # a published test vector
    seeds = np.array([0, 1, 2**40 + 5, 2**63 - 1, -3], np.int64)
    positions = np.array([0, 7, 4095, 12, 2**20], np.int64)
    ids = np.array([0, 98, 151935, 5, 1], np.int64)
    expected = [
        murmur3(int(s).to_bytes(8, "little", signed=True) + int(p).to_bytes(4, "little") + int(i).to_bytes(4, "little"))
        for s, p, i in zip(seeds, positions, ids, strict=True)
    ]
    assert sample.murmur3_hash(seeds, positions, ids).tolist() == expected


def call(kernel: Callable[..., None], **given: Any) -> None:
    """Calls a stand-in with the arguments that matter to it; the others (strides, block sizes) are None."""
    kernel(**dict.fromkeys(inspect.signature(kernel).parameters) | given)


def draw(logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    rows = len(logits)
    best = torch.zeros(rows, 1, dtype=torch.int64)
    call(
        sample.gumbel_sample,
        local_argmax_ptr=best,
        local_max_ptr=torch.zeros(rows, 1),
        logits_ptr=logits,
        expanded_idx_mapping_ptr=torch.arange(rows),
        seeds_ptr=seeds,
        pos_ptr=positions,
        temp_ptr=torch.full((rows,), temperature),
        IS_DRAFTING=False,
        APPLY_TEMPERATURE=False,
        USE_FP64=False,
    )
    return best[:, 0]


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    count = 40_000
    tokens = draw(probabilities.log().repeat(count, 1), torch.arange(count), torch.arange(count) % 17)
    frequencies = torch.bincount(tokens, minlength=5) / count
    # Four standard deviations of a frequency.
    assert ((frequencies - probabilities).abs() <= 4 * (probabilities * (1 - probabilities) / count).sqrt()).all()


def test_a_draw_depends_on_seed_and_position_only() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    seeds, positions = torch.arange(6) + 100, torch.arange(6)
    tokens = draw(logits, seeds, positions)
    reverse = draw(logits.flip(0), seeds.flip(0), positions.flip(0)).flip(0)
    assert tokens.tolist() == reverse.tolist()
    same = logits[:1].repeat(200, 1)
    assert len(set(draw(same, torch.arange(200), torch.zeros(200, dtype=torch.int64)).tolist())) > 10
    assert draw(logits, seeds, positions, temperature=0.0).tolist() == logits.argmax(-1).tolist()


def test_kept_sets_narrow_wide_and_inactive() -> None:
    vocabulary, width = 21, 4
    logits = torch.full((3, vocabulary), -torch.inf)
    sets = [[3, 20], [0, 1, 5, 8, 13, 19], [7]]
    for row, ids in enumerate(sets):
        logits[row, ids] = torch.linspace(-1, 1, len(ids))
    token_ids = torch.full((3, width), -9, dtype=torch.int32)
    packed, counts = torch.zeros(3, 3, dtype=torch.uint8), torch.zeros(3, dtype=torch.int32)
    bounds, drawn = torch.arange(4, dtype=torch.int32), torch.tensor([1, 1, 0], dtype=torch.int32)
    strides = (vocabulary, 1), (width,), (3,)
    sample.compact_sampling_mask(
        logits, *strides[0], bounds, drawn, token_ids, *strides[1], packed, *strides[2], counts, vocabulary, width, 1, 8
    )
    assert counts.tolist() == [2, 6, 0]
    assert token_ids[0, :2].tolist() == sets[0] and token_ids[1].tolist() == sets[1][:4]
    bits = np.unpackbits(packed[1].numpy(), count=vocabulary, bitorder="little")
    assert np.flatnonzero(bits).tolist() == sets[1]


def test_logprobs_ranks_temperature_and_min_p() -> None:
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(1)) * 5
    logits[:, 25:] = -torch.inf
    ids = torch.tensor([[1, 2], [3, 3], [0, 24], [7, 8]])
    out = torch.empty(4, 2)
    sample.topk_log_softmax(out, logits, 30, ids, 2, 2, 30, 1024, 2)
    torch.testing.assert_close(out, logits.double().log_softmax(-1).gather(-1, ids).float())
    rank = torch.empty(4, dtype=torch.int64)
    sample.ranks(rank, logits, 30, ids[:, 0], 30, 1024)
    order = logits.argsort(-1, descending=True)
    assert rank.tolist() == [order[row].tolist().index(ids[row, 0].item()) + 1 for row in range(4)]

    slots, values = torch.tensor([2, 0, 1, 2]), torch.tensor([1.0, 0.0, 0.5])
    scaled = logits.clone()
    sample.apply_temperature(scaled, 30, slots, values, 30, 1024)
    torch.testing.assert_close(scaled, logits / torch.tensor([0.5, 1.0, 1.0, 0.5])[:, None])
    cut = logits.clone()
    sample.apply_min_p(cut, 30, slots, torch.tensor([0.0, 0.0, 0.1]), 30, 1024)
    probabilities = logits.softmax(-1)
    likely = probabilities >= 0.1 * probabilities.amax(-1, keepdim=True)
    likely[1:3] = True
    assert torch.equal(cut, logits.masked_fill(~likely, -torch.inf))


def test_staged_writes_go_to_their_rows() -> None:
    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    table = torch.zeros(4, 6, dtype=torch.int32)
    contents, ends = ints(11, 12, 13, 21, 31, 32), ints(3, 4, 6)
    batch.apply_write(table, 6, ints(2, 0, 3), ints(1, 5, 0), contents, ends, None, 1024, False)
    assert table.tolist() == [[0, 0, 0, 0, 0, 21], [0] * 6, [0, 11, 12, 13, 0, 0], [31, 32, 0, 0, 0, 0]]

    first, second = torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, 5, dtype=torch.int32)
    call(
        batch.apply_write,
        output_ptr=torch.tensor([first.data_ptr(), second.data_ptr()], dtype=torch.uint64),
        output_stride=torch.tensor([3, 5]),
        write_indices_ptr=ints(1, 1, 0),
        write_starts_ptr=ints(1, 2, 4),
        write_contents_ptr=ints(7, 8, 9, 5),
        write_cu_lens_ptr=ints(1, 3, 4),
        write_group_ids_ptr=ints(0, 1, 1),
        MULTI_GROUP=True,
    )
    assert first.tolist() == [[0, 0, 0], [0, 7, 0]]
    assert second.tolist() == [[0, 0, 0, 0, 5], [0, 0, 8, 9, 0]]


def test_slot_mappings_of_two_groups() -> None:
    tables = [torch.arange(12, dtype=torch.int32).reshape(3, 4), torch.arange(6, dtype=torch.int32).reshape(3, 2) + 50]
    sizes, positions = [2, 4], [1, 2, 3, 0, 6, 7]
    out = torch.zeros(2, 8, dtype=torch.int64)
    call(
        batch.compute_slot_mappings,
        max_num_tokens=8,
        idx_mapping=torch.tensor([2, -1, 0]),
        query_start_loc=torch.tensor([0, 3, 4, 6], dtype=torch.int32),
        pos=torch.tensor(positions),
        block_table_ptrs=torch.tensor([table.data_ptr() for table in tables], dtype=torch.uint64),
        block_table_strides=torch.tensor([4, 2]),
        block_sizes=torch.tensor(sizes, dtype=torch.int32),
        slot_mapping_enabled=torch.tensor([True, True]),
        slot_mappings_ptr=out,
        CP_SIZE=1,
        PAD_ID=-1,
    )
    for group, (table, size) in enumerate(zip(tables, sizes, strict=True)):
        expected = [
            -1 if row < 0 else int(table[row, place // size]) * size + place % size
            for row, place in zip([2, 2, 2, -1, 0, 0], positions, strict=True)
        ]
        assert out[group].tolist() == [*expected, -1, -1]


def test_what_has_no_stand_in_says_so() -> None:
    with pytest.raises(NotImplementedError, match="speculative decoding"):
        call(
            batch.combine_sampled_and_draft_tokens,
            idx_mapping_ptr=torch.tensor([0]),
            cu_num_logits_ptr=torch.tensor([0, 2], dtype=torch.int32),
            NUM_NEW_SAMPLED_TOKENS=1,
        )
    with pytest.raises(NotImplementedError, match="context parallelism"):
        call(batch.compute_slot_mappings, CP_SIZE=2)
