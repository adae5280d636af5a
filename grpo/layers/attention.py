"""Attention for packed rows: several sequences end to end in one row, none seeing another.

`packed` is registered with transformers and needs no mask tensor. On CUDA in half precision it is one call of a
variable-length flash kernel (`grpo.layers.flash`, or torch's own for what that does not know); elsewhere sequences of
similar length are laid into one padded batch per bucket and attended causally. Right padding needs no mask there:
causality hides it from every real token.

Models whose attention needs more than q, k, v (attention sinks, lightning indexers) take one of the masked modes,
which hold a T x T mask: `choose_attention` in grpo/model_check.py tries the modes in order and keeps the first that
is right.

Shapes: T = packed tokens, S = sequences, H = heads, G = key/value heads, D = head width.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, create_causal_mask, create_sliding_window_causal_mask

AttentionMode = Literal["packed", "sdpa", "eager", "eager_masks"]
MODES: tuple[AttentionMode, ...] = ("packed", "sdpa", "eager", "eager_masks")

FLASH_WIDTHS = (16, 32, 64, 128)
"""Head widths that Keel's own kernels attend over; others, and sliding windows, go to torch's."""
BUCKET_FILL = 0.75
"""A sequence shares a bucket with a longer one if it fills at least this share of it..."""
BUCKET_SLACK = 8
"""...or is at most this many tokens shorter."""


class UnsupportedAttentionError(ValueError):
    """A model whose attention asks for something that the packed kernel does not do."""


@dataclass(frozen=True)
class _Bucket:
    """Sequences attended in one call: slots `start : start + num * length` of the padded layout."""

    start: int
    num: int
    length: int


@dataclass(frozen=True)
class _Padding:
    """Packed tokens <-> the buckets' padded slots (P in all)."""

    buckets: tuple[_Bucket, ...]
    token_of_slot: Tensor  # int64 [P]; a padding slot repeats its sequence's last token
    slot_of_token: Tensor  # int64 [T]
    padding_slots: Tensor  # int64 [P - T]


class PackedLayout:
    """Where the sequences of a packed row begin and end; travels to the attention function as a model keyword."""

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int) -> None:
        self.cu_seqlens = cu_seqlens  # int32 [S + 1]
        self.max_seqlen = max_seqlen

    @cached_property
    def padding(self) -> _Padding:
        """The bucketed layout, made once per batch and used by every layer."""
        device = self.cu_seqlens.device
        starts, lengths = self.cu_seqlens[:-1].long().cpu(), self.cu_seqlens.diff().long().cpu()
        order = lengths.argsort(descending=True, stable=True)
        buckets, token_of_slot, is_real, begin, slot = [], [], [], 0, 0
        for num in _bucket_sizes(lengths[order].tolist()):
            chosen = order[begin : begin + num]
            length = int(lengths[chosen[0]])
            column, last = torch.arange(length), lengths[chosen, None] - 1
            token_of_slot.append((starts[chosen, None] + torch.minimum(column, last)).flatten())
            is_real.append((column <= last).flatten())
            buckets.append(_Bucket(slot, num, length))
            begin, slot = begin + num, slot + num * length
        tokens, real = torch.cat(token_of_slot), torch.cat(is_real)
        slot_of_token = torch.empty(int(lengths.sum()), dtype=torch.int64)
        slot_of_token[tokens[real]] = real.nonzero()[:, 0]
        padding_slots = (~real).nonzero()[:, 0]
        return _Padding(tuple(buckets), tokens.to(device), slot_of_token.to(device), padding_slots.to(device))


def _bucket_sizes(lengths: list[int]) -> list[int]:
    """How many of the lengths (descending) share each bucket."""
    sizes: list[int] = []
    longest = 0
    for length in lengths:
        if sizes and (length >= BUCKET_FILL * longest or longest - length <= BUCKET_SLACK):
            sizes[-1] += 1
        else:
            sizes.append(1)
            longest = length
    return sizes


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface for one packed row: [1, H, T, D] to [1, T, H, D]; grouped queries allowed.

    Of the options it reads `packed_layout` (from `attention_kwargs`) and `sliding_window`.

    Raises:
        UnsupportedAttentionError: a mask, attention sinks or a logit cap is asked for, or the layout is missing.
    """
    refused = {"attention_mask": attention_mask, "s_aux": options.get("s_aux"), "softcap": options.get("softcap")}
    asked = [name for name, what in refused.items() if what is not None]
    layout: PackedLayout | None = options.get("packed_layout")
    if asked or layout is None or len(query) != 1:
        raise UnsupportedAttentionError(
            f"packed attention of {type(module).__name__} cannot honour: "
            f"{', '.join(asked) or 'a batch without packed_layout'}"
        )
    # `squeeze` is a view in both directions, `[0]` would copy every gradient into zeros.
    q, k, v = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    return attend(q, k, v, layout, scaling, options.get("sliding_window")).unsqueeze(0), None


def attend(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scaling: float | None, sliding_window: int | None
) -> Tensor:
    """Causal attention within each sequence: [T, H, D], key and value [T, G, D] with G a divisor of H, to [T, H, D].

    `scaling` of the scores, None = D ** -0.5; `sliding_window` = tokens seen, itself included, None = all before.
    """
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return _bucketed(query, key, value, layout, scaling, sliding_window)
    width = query.shape[2]
    is_cut = sliding_window is not None and 0 < sliding_window < layout.max_seqlen
    if is_cut or width not in FLASH_WIDTHS or value.shape != key.shape:
        return _varlen(query, key, value, layout, scaling, sliding_window)
    from grpo.layers.flash import flash_attention  # Triton comes with CUDA builds of torch only

    scale = width**-0.5 if scaling is None else scaling
    return flash_attention(query, key, value, layout.cu_seqlens, layout.max_seqlen, scale)


def _bucketed(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scaling: float | None, sliding_window: int | None
) -> Tensor:
    """[T, H, D] to [T, H, D], one causal sdpa per bucket."""
    padding, is_grouped = layout.padding, query.shape[1] != key.shape[1]
    padded = [_Rearrange.apply(x, padding.token_of_slot, padding.slot_of_token, None) for x in (query, key, value)]
    outputs = []
    for bucket in padding.buckets:
        stop = bucket.start + bucket.num * bucket.length
        q, k, v = (x[bucket.start : stop].unflatten(0, (bucket.num, bucket.length)).transpose(1, 2) for x in padded)
        band = _band_mask(bucket.length, sliding_window, q.device)
        is_causal = band is None and bucket.length > 1
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=band, is_causal=is_causal, scale=scaling, enable_gqa=is_grouped
        )
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    out: Any = _Rearrange.apply(torch.cat(outputs), padding.slot_of_token, padding.token_of_slot, padding.padding_slots)
    return out


class _Rearrange(torch.autograd.Function):
    """`x[index]` along the first axis whose gradient is a gather too: every token has exactly one slot that matters.

    `void` names the inputs that no output reads; their gradient is zero.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, void: Tensor | None) -> Tensor:
        ctx.inverse, ctx.void = inverse, void
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        gradient = grads[0].index_select(0, ctx.inverse)
        if ctx.void is not None:
            gradient.index_fill_(0, ctx.void, 0)
        return gradient, None, None, None


def _band_mask(length: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    """Causal mask limited to the window, bool [length, length]; None where plain causality says the same."""
    if not sliding_window or length <= sliding_window:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < sliding_window)


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scaling: float | None, sliding_window: int | None
) -> Tensor:
    """[T, H, D] to [T, H, D] through torch's variable-length flash kernel; a narrower value (MLA) is padded to D."""
    from torch.nn.attention.varlen import varlen_attn

    known = _varlen_parameters()
    window = (sliding_window - 1, 0) if sliding_window else (-1, 0)
    options: dict[str, Any] = {"scale": scaling}
    if "window_size" in known:
        options["window_size"] = window
    elif sliding_window:
        raise UnsupportedAttentionError(
            "this torch's varlen_attn has no window_size, which sliding-window attention needs"
        )
    else:
        options["is_causal"] = True
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            repeats = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    width = value.shape[-1]
    value = F.pad(value, (0, query.shape[-1] - width))
    cu_seqlens, longest = layout.cu_seqlens, layout.max_seqlen
    out: Any = varlen_attn(query, key, value, cu_seqlens, cu_seqlens, longest, longest, **options)
    return out[..., :width]


@cache
def _varlen_parameters() -> frozenset[str]:
    """What this torch's kernel can be told: `enable_gqa` came after `window_size`."""
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def _no_mask(*_: Any, **__: Any) -> None:
    """The packed kernel needs no mask tensor."""


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", _no_mask)


def set_attention(module: PreTrainedModel, mode: AttentionMode) -> None:
    """Makes the model attend in a mode; ValueError if the model does not allow it."""
    module.set_attn_implementation("eager" if mode == "eager_masks" else mode)


def attention_kwargs(
    module: PreTrainedModel, mode: AttentionMode, position_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> dict[str, Any]:
    """What a forward over one packed row must be called with, besides `input_ids` [1, T].

    `use_cache` must be off and `attention_mask` absent: otherwise transformers silently lets sequences see each other.
    """
    kwargs: dict[str, Any] = {"position_ids": position_ids[None], "use_cache": False}
    if mode == "packed":
        kwargs["packed_layout"] = PackedLayout(cu_seqlens, max_seqlen)
    if mode == "eager_masks":
        kwargs["attention_mask"] = _block_masks(module, position_ids)
    return kwargs


def _block_masks(module: PreTrainedModel, position_ids: Tensor) -> dict[str, Any]:
    """Masks per layer type for models that do not give position_ids to their own mask functions."""
    config = module.config.get_text_config()
    shape_only = torch.empty(1, len(position_ids), 0, device=position_ids.device)
    arguments: dict[str, Any] = {
        "config": config,
        "inputs_embeds": shape_only,
        "attention_mask": None,
        "past_key_values": None,
        "position_ids": position_ids[None],
    }
    masks: dict[str, Any] = {"full_attention": create_causal_mask(**arguments)}
    if getattr(config, "sliding_window", None):
        masks["sliding_attention"] = create_sliding_window_causal_mask(**arguments)
    return masks
