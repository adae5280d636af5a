"""Which decoding steps are left uncut, against times measured on an H200; and that vLLM takes up the builder."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rollout.vllm_plugin.whole_attention import attends_whole

MEASURED = [
    # sequences, key/value heads, longest sequence, microseconds in one part, in up to 32 (one long, the rest of 256)
    (256, 8, 1024, 89.8, 97.3),
    (256, 8, 8192, 103.6, 102.6),
    (256, 8, 16384, 166.8, 108.5),
    (128, 8, 4096, 58.7, 58.1),
    (128, 8, 8192, 88.5, 59.8),
    (64, 8, 2048, 33.5, 34.6),
    (64, 8, 4096, 48.1, 36.0),
    (256, 4, 4096, 54.1, 60.3),
    (256, 4, 8192, 89.5, 61.7),
    (64, 4, 1024, 16.1, 17.7),
    (64, 4, 2048, 24.8, 20.3),
]


@pytest.mark.parametrize(("num_sequences", "num_kv_heads", "longest", "whole_us", "parts_us"), MEASURED)
def test_a_step_is_left_uncut_where_that_costs_nothing(num_sequences, num_kv_heads, longest, whole_us, parts_us):
    is_whole = attends_whole(num_sequences=num_sequences, num_kv_heads=num_kv_heads, max_model_len=longest)
    assert is_whole == (whole_us <= 1.02 * parts_us)


@pytest.mark.slow
def test_vllm_builds_with_it():
    code = """
from rollout.vllm_plugin.whole_attention import WholeAttentionBuilder, attend_whole
from vllm.v1.attention.backends.registry import AttentionBackendEnum
attend_whole()
backend = AttentionBackendEnum.FLASH_ATTN.get_class()
assert backend.get_name() == "FLASH_ATTN"
assert backend.get_builder_cls() is WholeAttentionBuilder
"""
    subprocess.run([sys.executable, "-c", code], check=True)
