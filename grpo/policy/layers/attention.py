"""Attention for packed rows: several sequences end to end in one row, none seeing another.

`packed` is registered with transformers and needs no mask tensor. On CUDA in half precision it is one call of a
variable-length flash kernel (`grpo.policy.layers.flash`, or torch's own for what that does not know); elsewhere
sequences of similar length are laid into one padded batch per bucket and attended causally. Right padding needs no mask
there: causality hides it from every real token.

A sequence may go on from another one, its parent, as samples do from a prompt that is computed once for all of them: it
then attends to all of the parent, which has none itself, and causally to itself. Only attention that Keel's kernel can
do knows parents, on every device: what start-up finds out on a CPU then holds on a GPU.

Models whose attention needs more than q, k, v (attention sinks, lightning indexers) take one of the masked modes,
which hold a T x T mask: `choose_attention` in grpo/policy/check.py tries the modes in order and keeps the first that
is right.

Shapes: T = packed tokens, S = sequences, H = heads, G = key/value heads, D = head width.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, create_causal_mask, create_sliding_window_causal_mask

from grpo.policy.layers.layout import Bucket, PackedLayout, Padding

AttentionMode = Literal["packed", "sdpa", "eager", "eager_masks"]
MODES: tuple[AttentionMode, ...] = ("packed", "sdpa", "eager", "eager_masks")

FLASH_WIDTHS = (16, 32, 64, 128)
"""Head widths that Keel's own kernels attend over; others, and sliding windows, go to torch's."""


class UnsupportedAttentionError(ValueError):
    """A model whose attention asks for something that the packed kernel does not do."""


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

    Raises:
        UnsupportedAttentionError: some sequence has a parent, which this kind of attention does not know.
    """
    width = query.shape[2]
    is_known = width in FLASH_WIDTHS and value.shape == key.shape
    if layout.parents is not None and (sliding_window or not is_known):
        raise UnsupportedAttentionError("no sequence can go on from another one in this kind of attention")
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return _bucketed(query, key, value, layout, scaling, sliding_window)
    is_cut = sliding_window is not None and 0 < sliding_window < layout.max_seqlen
    if is_cut or not is_known:
        return _varlen(query, key, value, layout, scaling, sliding_window)
    from grpo.policy.layers.flash import flash_attention  # Triton comes with CUDA builds of torch only

    scale = width**-0.5 if scaling is None else scaling
    return flash_attention(query, key, value, layout.cu_seqlens, layout.max_seqlen, scale, layout.tree)


def _bucketed(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scaling: float | None, sliding_window: int | None
) -> Tensor:
    """[T, H, D] to [T, H, D], one causal sdpa per bucket."""
    padding, is_grouped = layout.padding, query.shape[1] != key.shape[1]
    states = [_Rearrange.apply(x, padding.token_of_slot, padding.slot_of_token, None) for x in (query, key, value)]
    queries, keys, values = (_in_buckets(x, padding.buckets) for x in states)
    outputs = []
    for bucket, q, k, v in zip(
        padding.buckets, queries, _after_parents(keys, padding), _after_parents(values, padding), strict=True
    ):
        mask = _mask(bucket, sliding_window, q.device)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        is_causal = mask is None and bucket.length > 1
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, scale=scaling, enable_gqa=is_grouped
        )
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    out: Any = _Rearrange.apply(torch.cat(outputs), padding.slot_of_token, padding.token_of_slot, padding.padding_slots)
    return out


def _in_buckets(padded: Tensor, buckets: Sequence[Bucket]) -> list[Tensor]:
    """[P, H, D] as one [num, length, H, D] per bucket."""
    parts = padded.split([bucket.num * bucket.length for bucket in buckets])
    return [part.unflatten(0, (bucket.num, bucket.length)) for part, bucket in zip(parts, buckets, strict=True)]


def _after_parents(states: Sequence[Tensor], padding: Padding) -> Iterator[Tensor]:
    """Keys or values of every bucket with those of the parent in front, [num, parent's + length, G, D].

    Rows are unbound and expanded, not gathered: a parent's gradient is then a sum in a fixed order.
    """
    rows: dict[int, tuple[Tensor, ...]] = {}
    for own, bucket in zip(states, padding.buckets, strict=True):
        parent = bucket.parent
        if parent is None:
            yield own
            continue
        if parent.bucket not in rows:
            rows[parent.bucket] = states[parent.bucket].unbind()
        before = rows[parent.bucket][parent.row][: parent.length]
        yield torch.cat([before.expand(bucket.num, *before.shape), own], 1)


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


def _mask(bucket: Bucket, sliding_window: int | None, device: torch.device) -> Tensor | None:
    """What a bucket's queries see, bool [length, parent's + length]; None where plain causality says the same."""
    length = bucket.length
    if bucket.parent is not None:
        before = bucket.parent.length
        return torch.ones(length, before + length, dtype=torch.bool, device=device).tril(before)
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
    module: PreTrainedModel,
    mode: AttentionMode,
    position_ids: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    parents: Tensor | None = None,
) -> dict[str, Any]:
    """What a forward over one packed row must be called with, besides `input_ids` [1, T].

    `use_cache` must be off and `attention_mask` absent: otherwise transformers silently lets sequences see each other.

    Raises:
        UnsupportedAttentionError: a sequence has a parent, and the mode is not `packed`.
    """
    if parents is not None and mode != "packed":
        raise UnsupportedAttentionError(f"no sequence can go on from another one in attention mode {mode}")
    kwargs: dict[str, Any] = {"position_ids": position_ids[None], "use_cache": False}
    if mode == "packed":
        kwargs["packed_layout"] = PackedLayout(cu_seqlens, max_seqlen, parents)
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
