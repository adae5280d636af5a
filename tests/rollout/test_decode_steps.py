"""The kernels of steps of decoding alone, through Triton's interpreter against the stand-ins of vLLM's own kernels, and
compiled for an H100. Each half runs in a process of its own: this file run as a module with the half's name.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rollout.vllm_plugin import kernels_batch as vllms
from rollout.vllm_plugin.launch import Launcher
from tests.triton_process import run_halves

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

NUM_SLOTS, MOST_BLOCKS, BLOCK_SIZE, MOST_TOKENS = 11, 9, 4, 36
STALE = 77
"""What lies in a buffer from the step before."""


def make_state() -> dict[str, Tensor]:
    """Of all request slots: sequences of 3 to 35 computed tokens, in cache blocks with nothing in common."""
    generator = torch.Generator().manual_seed(0)
    computed = torch.randint(3, MOST_TOKENS, (NUM_SLOTS,), generator=generator, dtype=torch.int32)
    computed[:3] = torch.tensor([MOST_TOKENS - 1, 4, 7])  # at the end, and at both ends of a block
    blocks = torch.randperm(NUM_SLOTS * MOST_BLOCKS, generator=generator).view(NUM_SLOTS, MOST_BLOCKS)
    return {
        "computed": computed,
        "last": torch.randint(0, 1000, (NUM_SLOTS, 1), generator=generator),
        "lengths": computed + 0,
        "token_ids": torch.randint(0, 1000, (NUM_SLOTS, MOST_TOKENS), generator=generator, dtype=torch.int32),
        "blocks": blocks.int(),
    }


def make_inputs(num_padded: int) -> dict[str, Tensor]:
    """The graph's buffers, full of what an earlier step left."""
    query_starts = torch.full((num_padded + 1,), STALE, dtype=torch.int32)
    query_starts[0] = 0
    return {
        "input_ids": torch.full((num_padded,), STALE, dtype=torch.int32),
        "positions": torch.full((num_padded,), STALE),
        "seq_lens": torch.full((num_padded,), STALE, dtype=torch.int32),
        "query_starts": query_starts,
        "is_padding": torch.arange(num_padded) % 2 == 0,
        "row_blocks": torch.full((num_padded, MOST_BLOCKS), STALE, dtype=torch.int32),
        "cache_slots": torch.full((num_padded,), STALE),
    }


def place_as_vllm(slots: Tensor, state: dict[str, Tensor], inputs: dict[str, Tensor]) -> None:
    """By the stand-ins of vLLM's kernels, which its runner launches one after the other."""
    num_rows, num_padded = len(slots), len(inputs["input_ids"])
    inputs["query_starts"][:] = torch.arange(num_padded + 1).clamp(max=num_rows)
    inputs["is_padding"][:] = torch.arange(num_padded) >= num_rows
    vllms.prepare_pos_seq_lens(
        inputs["positions"], inputs["seq_lens"], slots, inputs["query_starts"], state["computed"], num_padded, 8
    )
    vllms.combine_sampled_and_draft_tokens(
        inputs["input_ids"],
        slots,
        state["last"],
        inputs["query_starts"],
        inputs["seq_lens"],
        torch.ones(NUM_SLOTS, dtype=torch.int32),
        torch.zeros(NUM_SLOTS, 0),
        0,
        torch.arange(num_rows + 1, dtype=torch.int32),
        torch.empty(num_rows, dtype=torch.int64),
        1,
    )
    inputs["row_blocks"][num_rows:] = 0  # where the stand-in leaves padding alone, vLLM's kernel clears it
    strides, sizes = torch.tensor([MOST_BLOCKS]), torch.tensor([BLOCK_SIZE], dtype=torch.int32)
    addresses = torch.tensor([state["blocks"].data_ptr()], dtype=torch.uint64)
    num_blocks = (state["computed"] // BLOCK_SIZE + 1)[None]
    targets = torch.tensor([inputs["row_blocks"].data_ptr()], dtype=torch.uint64)
    vllms.gather_block_tables(slots, addresses, targets, strides, num_blocks, NUM_SLOTS, num_rows, 8)
    enabled = torch.tensor([True])
    cache_slots = inputs["cache_slots"][None]
    vllms.compute_slot_mappings(
        num_padded,
        slots,
        inputs["query_starts"],
        inputs["positions"],
        addresses,
        strides,
        sizes,
        enabled,
        enabled,
        cache_slots,
        num_padded,
        0,
        1,
        1,
        -1,
        8,
    )


def place(slots: Tensor, state: dict[str, Tensor], inputs: dict[str, Tensor]) -> None:
    """By the kernel."""
    from rollout.vllm_plugin.decode_kernels import place_rows

    written = [inputs[name] for name in ("input_ids", "positions", "seq_lens", "query_starts", "is_padding")]
    tables = state["blocks"], inputs["row_blocks"], inputs["cache_slots"], MOST_BLOCKS, BLOCK_SIZE
    launch = Launcher(place_rows, (state["computed"], state["last"], *written, *tables), {"BLOCK": 4}, ())
    launch((len(inputs["input_ids"]), 1, 1), 0, (slots,), (len(slots),))


def take_in(slots: Tensor, sampled: Tensor, state: dict[str, Tensor], *, as_vllm: bool) -> None:
    """By the kernel, or by the stand-in of vLLM's."""
    if as_vllm:
        ones, starts = torch.ones(len(slots), dtype=torch.int32), torch.arange(len(slots) + 1, dtype=torch.int32)
        counts = state["computed"], state["last"], None, 0, sampled, 1, ones, torch.zeros_like(ones), starts
        vllms.post_update(slots, *counts, state["token_ids"], MOST_TOKENS, state["lengths"])
        return
    from rollout.vllm_plugin.decode_kernels import take_in_tokens

    stays = state["computed"], state["last"], state["lengths"], state["token_ids"], MOST_TOKENS
    Launcher(take_in_tokens, stays, {"BLOCK": 4}, ())((-(-len(slots) // 4), 1, 1), 0, (slots, sampled), (len(slots),))


def interpret() -> list[str]:
    """The arrays in which kernels and stand-ins differ, over two steps of each of some batches."""
    wrong = []
    for num_rows, num_padded in ((7, 7), (5, 8), (1, 4)):
        results = []
        for as_vllm in (False, True):
            state, inputs = make_state(), make_inputs(num_padded)
            slots = torch.randperm(NUM_SLOTS, generator=torch.Generator().manual_seed(num_rows))[:num_rows]
            state["computed"][slots] -= 2
            state["lengths"][slots] -= 2
            seen = {}
            for step in range(2):
                (place_as_vllm if as_vllm else place)(slots, state, inputs)
                seen |= {f"{name} {step}": values.clone() for name, values in inputs.items()}
                # A row's blocks beyond its own are never read.
                for row, slot in enumerate(slots.tolist()):
                    seen[f"row_blocks {step}"][row, int(state["computed"][slot]) // BLOCK_SIZE + 1 :] = 0
                take_in(slots, torch.arange(num_rows)[:, None] + 500 + step, state, as_vllm=as_vllm)
            results.append(seen | state)
        ours, wanted = results
        wrong += [f"{name} of {num_rows}" for name in wanted if not torch.equal(ours[name], wanted[name])]
    return wrong


def compile_kernels() -> dict[str, int]:
    """Size in bytes of the kernels' machine code for compute capability 9.0."""
    import triton  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

    from rollout.vllm_plugin import decode_kernels, decode_runner

    types: dict[str, Any] = dict.fromkeys(("slots_ptr", "sampled_ptr", "last_tokens_ptr", "positions_ptr"), "*i64")
    types |= {"cache_slots_ptr": "*i64", "is_padding_ptr": "*i1"}
    sizes = {}
    for kernel, constants in (
        (decode_kernels.place_rows, decode_runner.PLACE),
        (decode_kernels.take_in_tokens, decode_runner.TAKE_IN),
    ):
        signature = {
            name: types.get(name, "*i32" if name.endswith("_ptr") else "constexpr" if name == "BLOCK" else "i32")
            for name in kernel.arg_names
        }
        source = ASTSource(fn=kernel, signature=signature, constexprs={"BLOCK": constants["BLOCK"]})
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        sizes[kernel.__name__] = len(compiled.asm["cubin"])
    return sizes


def test_the_kernels_do_what_vllms_do_and_compile() -> None:
    halves = run_halves(__name__)
    assert halves.interpreted == []
    assert len(halves.compiled) == 2 and min(halves.compiled.values()) > 1000


def test_the_reference_moves() -> None:
    """The stand-ins change every array that the kernels are compared in."""
    state, inputs = make_state(), make_inputs(8)
    before = {name: values.clone() for name, values in (state | inputs).items()}
    slots = torch.arange(3, 8)
    place_as_vllm(slots, state, inputs)
    take_in(slots, torch.full((5, 1), 2000), state, as_vllm=True)
    same = [name for name, values in (state | inputs).items() if torch.equal(values, before[name])]
    assert same == ["blocks"]
    assert np.array_equal(inputs["cache_slots"][5:], [-1] * 3)


if __name__ == "__main__":
    print(json.dumps({"interpret": interpret, "compile_kernels": compile_kernels}[sys.argv[1]]()))
