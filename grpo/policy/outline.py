"""Objects without their weights, so that one rank reads a model and the others take only what must not be read twice:
its structure, its buffers and what was found out about it.

With every rank of a node reading for itself, 30 billion float32 parameters on eight ranks would take 960 GB of host
memory, and as much again for a reference.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._seen: dict[nn.Parameter, int] = {}

    def persistent_id(self, obj: Any) -> tuple[int, torch.Size, torch.dtype, bool] | None:
        if not isinstance(obj, nn.Parameter):
            return None
        return self._seen.setdefault(obj, len(self._seen)), obj.shape, obj.dtype, obj.requires_grad


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._made: dict[int, nn.Parameter] = {}

    def persistent_load(self, pid: tuple[int, torch.Size, torch.dtype, bool]) -> nn.Parameter:
        number, shape, dtype, requires_grad = pid
        if number not in self._made:  # tied parameters stay one
            self._made[number] = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=requires_grad)
        return self._made[number]


def take_outline(obj: Any) -> bytes:
    """Pickles an object, all but the values of its parameters."""
    file = io.BytesIO()
    # Hooks keep the numbers they have; reading a handle makes torch number the next ones in that process after them.
    _Pickler(file).dump((obj, RemovableHandle(OrderedDict())))
    return file.getvalue()


def from_outline(outline: bytes) -> Any:
    """The object with parameters on the CPU that hold no values yet, and no memory: pages that nobody has written."""
    obj, _ = _Unpickler(io.BytesIO(outline)).load()
    return obj
