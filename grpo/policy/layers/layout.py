"""Where the sequences of a packed row are: for attention in buckets, and for the kernels of `flash_kernels`.

Shapes: T = packed tokens, S = sequences, P = slots of the padded layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

BUCKET_FILL = 0.75
"""A sequence shares a bucket with a longer one if it fills at least this share of it..."""
BUCKET_SLACK = 8
"""...or is at most this many tokens shorter."""


@dataclass(frozen=True)
class Parent:
    """Where the padded layout has the sequence that a bucket's sequences go on from."""

    bucket: int
    row: int
    length: int


@dataclass(frozen=True)
class Bucket:
    """Sequences attended in one call: the next `num * length` slots of the padded layout."""

    num: int
    length: int
    parent: Parent | None


@dataclass(frozen=True)
class Padding:
    """Packed tokens <-> the buckets' padded slots (P in all)."""

    buckets: tuple[Bucket, ...]
    token_of_slot: Tensor  # int64 [P]; a padding slot repeats its sequence's last token
    slot_of_token: Tensor  # int64 [T]
    padding_slots: Tensor  # int64 [P - T]


class PackedLayout:
    """Where the sequences of a packed row begin and end, and which go on from which; travels to the attention function
    as a model keyword."""

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int, parents: Tensor | None = None) -> None:
        """`parents` int32 [S] as in `TrainBatch`; None = no sequence has one."""
        self.cu_seqlens = cu_seqlens  # int32 [S + 1]
        self.max_seqlen = max_seqlen
        self.parents = parents

    @cached_property
    def padding(self) -> Padding:
        """The bucketed layout, made once per batch and used by every layer."""
        device = self.cu_seqlens.device
        starts, lengths = self.cu_seqlens[:-1].long().cpu(), self.cu_seqlens.diff().long().cpu()
        buckets: list[Bucket] = []
        places: dict[int, Parent] = {}
        token_of_slot, is_real = [], []
        for parent, members in self._families():
            order = members[lengths[members].argsort(descending=True, stable=True)]
            for chosen in order.split(_bucket_sizes(lengths[order].tolist())):
                length = int(lengths[chosen[0]])
                column, last = torch.arange(length), lengths[chosen, None] - 1
                token_of_slot.append((starts[chosen, None] + torch.minimum(column, last)).flatten())
                is_real.append((column <= last).flatten())
                if parent < 0:
                    places |= {int(s): Parent(len(buckets), i, int(lengths[s])) for i, s in enumerate(chosen)}
                buckets.append(Bucket(len(chosen), length, places.get(parent)))
        tokens, real = torch.cat(token_of_slot), torch.cat(is_real)
        slot_of_token = torch.empty(int(lengths.sum()), dtype=torch.int64)
        slot_of_token[tokens[real]] = real.nonzero()[:, 0]
        padding_slots = (~real).nonzero()[:, 0]
        return Padding(tuple(buckets), tokens.to(device), slot_of_token.to(device), padding_slots.to(device))

    @cached_property
    def tree(self) -> Tensor | None:
        """What `flash_kernels` reads of the parents; made on their device, without waiting for it."""
        if self.parents is None:
            return None
        num_sequences, parents = len(self.parents), self.parents.long()
        begins, lengths = self.cu_seqlens[:-1].long(), self.cu_seqlens.diff().long()
        numbers = torch.arange(num_sequences, device=parents.device)
        is_child, parent = parents >= 0, parents.clamp(min=0)
        before = torch.where(is_child, lengths[parent], 0)
        first_child = torch.searchsorted(parents, numbers).clamp(max=num_sequences - 1)
        # A run of children with about as many tokens as the longest sequence is as long a program as any other.
        oldest = first_child[parent]
        run = (begins - begins[oldest]) // self.max_seqlen
        leads = is_child & ((numbers == oldest) | (run != run.roll(1)))
        later = torch.where(leads, numbers, num_sequences).flip(0).cummin(0).values.flip(0)
        stop = torch.where(leads, torch.cat([later[1:], later.new_full((1,), num_sequences)]), 0)
        rows = torch.where(leads, before, 0)
        place = rows.cumsum(0) - rows
        num_runs = torch.zeros_like(parents).index_add_(0, parent, leads.long())
        return torch.stack([begins[parent], before, stop, place, place[first_child], num_runs], 1).int()

    def _families(self) -> list[tuple[int, Tensor]]:
        """Parents (-1 = none, which comes first) and the sequences that go on from each, int64 [n]."""
        if self.parents is None:
            return [(-1, torch.arange(len(self.cu_seqlens) - 1))]
        parents = self.parents.cpu()
        return [(int(parent), (parents == parent).nonzero()[:, 0]) for parent in parents.unique()]


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
