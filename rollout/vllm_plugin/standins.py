"""Which kernels are replaced on the CPU build, and how they are put in place.

vLLM has a door for platforms without Triton, `vllm.triton_utils.dispatcher.register_kernels`; the only gate in front of
Model Runner V2 is one flag. The grid of a launch does not reach a stand-in: each one does the work of the whole grid.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

from rollout.vllm_plugin import kernels_batch as batch
from rollout.vllm_plugin import kernels_sample as sample

_RUNNER = "vllm.v1.worker.gpu."

STAND_INS: dict[str, Callable[..., None]] = {
    _RUNNER + "buffer_utils._apply_write_kernel": batch.apply_write,
    _RUNNER + "block_table._gather_block_tables_kernel": batch.gather_block_tables,
    _RUNNER + "block_table._compute_slot_mappings_kernel": batch.compute_slot_mappings,
    _RUNNER + "input_batch._prepare_prefill_inputs_kernel": batch.prepare_prefill_inputs,
    _RUNNER + "input_batch._prepare_pos_seq_lens_kernel": batch.prepare_pos_seq_lens,
    _RUNNER + "input_batch._combine_sampled_and_draft_tokens_kernel": batch.combine_sampled_and_draft_tokens,
    _RUNNER + "input_batch._get_num_sampled_and_rejected_kernel": batch.get_num_sampled_and_rejected,
    _RUNNER + "input_batch._post_update_kernel": batch.post_update,
    _RUNNER + "input_batch._post_update_num_computed_tokens_kernel": batch.post_update_num_computed_tokens,
    _RUNNER + "input_batch._expand_idx_mapping_kernel": batch.expand_idx_mapping,
    _RUNNER + "sample.gumbel._temperature_kernel": sample.apply_temperature,
    _RUNNER + "sample.gumbel._gumbel_sample_kernel": sample.gumbel_sample,
    _RUNNER + "sample.min_p._min_p_kernel": sample.apply_min_p,
    _RUNNER + "sample.logit_bias._bias_kernel": sample.apply_bias,
    _RUNNER + "sample.output._compact_sampling_mask_kernel": sample.compact_sampling_mask,
    _RUNNER + "sample.logprob._topk_log_softmax_kernel": sample.topk_log_softmax,
    _RUNNER + "sample.logprob._ranks_kernel": sample.ranks,
}
"""Kernel's full name -> what computes the same on numpy arrays and torch tensors, under the same parameter names."""


def install() -> None:
    """Puts the stand-ins in place for this process. To be called before the model runner is built."""
    import vllm.config.vllm
    import vllm.v1.worker.cpu.shm
    from vllm.triton_utils import triton
    from vllm.triton_utils.dispatcher import register_kernels

    setattr(vllm.config.vllm, "HAS_TRITON", True)  # noqa: B010  not an exported name
    if not hasattr(triton, "next_power_of_2"):
        triton.next_power_of_2 = _next_power_of_2
    _give_llvm_a_dict()
    register_kernels({name: _without_launch_options(kernel) for name, kernel in STAND_INS.items()})


def _give_llvm_a_dict() -> None:
    """For `register_kernels`, which looks for the kernels in the `__dict__` of everything that is imported.

    The library that Numba compiles with answers to any name, and so to this one, with one of LLVM's functions.
    """
    from llvmlite.binding import ffi

    library: Any = ffi.lib

    class Library(type(library)):
        __slots__ = ()
        __dict__ = MappingProxyType({})

    library.__class__ = Library


def _next_power_of_2(n: int) -> int:
    return 1 << max(int(n) - 1, 0).bit_length()


def _without_launch_options(kernel: Callable[..., None]) -> Callable[..., None]:
    """Drops the options that steer a GPU launch (`num_warps` and the like) and mean nothing here."""

    @functools.wraps(kernel)
    def launch(
        *args: Any, num_warps: Any = None, num_stages: Any = None, launch_pdl: Any = None, **kwargs: Any
    ) -> None:
        kernel(*args, **kwargs)

    return launch
