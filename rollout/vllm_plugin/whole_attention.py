"""Attention over whole sequences in steps that decode many of them.

FlashAttention 3 can cut a sequence's cache into parts, so that few sequences keep a whole GPU busy; a second kernel
joins the parts' results. CUDA graphs fix at capture how many parts there may be, and vLLM allows 32 in each: then every
layer of every step pays for the joining kernel, also where the batch is so large that nothing is ever cut.

Whether a batch needs parts follows from its size and from how long a sequence can get: with T = sequences x key/value
heads, a sequence of up to 4 T tokens among short ones holds up nobody. That is measured on a GPU of 132 multiprocessors
(docs/performance.md).
"""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

_TOKENS_PER_TILE = 4


def attends_whole(*, num_sequences: int, num_kv_heads: int, max_model_len: int) -> bool:
    """Whether a decoding step of so many sequences, each of at most `max_model_len` tokens, is best left uncut."""
    return max_model_len <= _TOKENS_PER_TILE * num_sequences * num_kv_heads


class WholeAttentionBuilder(FlashAttentionMetadataBuilder):
    """vLLM's, with the number of parts chosen for each size of batch; a graph and its replays have the same size."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._most_splits = self.max_num_splits
        """0 without CUDA graphs, where the kernel chooses."""

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> FlashAttentionMetadata:
        """vLLM's."""
        is_whole = attends_whole(
            num_sequences=common_attn_metadata.num_reqs,
            num_kv_heads=self.num_heads_kv,
            max_model_len=self.model_config.max_model_len,
        )
        self.max_num_splits = min(self._most_splits, 1) if is_whole else self._most_splits
        return super().build(common_prefix_len, common_attn_metadata, fast_build)


class WholeAttentionBackend(FlashAttentionBackend):
    """vLLM's, with that builder."""

    @staticmethod
    def get_builder_cls() -> type[WholeAttentionBuilder]:
        """Chooses the parts."""
        return WholeAttentionBuilder


def attend_whole() -> None:
    """Has every model that vLLM builds from now on in this process do so, where it uses FlashAttention."""
    register_backend(AttentionBackendEnum.FLASH_ATTN)(WholeAttentionBackend)
