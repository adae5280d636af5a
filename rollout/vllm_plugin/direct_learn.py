"""Finds out where vLLM puts each tensor of a checkpoint, by watching it load one.

vLLM's layerwise reload calls a layer's loader with empty tensors first: what will be copied, from where to where, shows
there. Whether the kernels' own parameters hold these very bits at these very places shows once the layer is finished.
A layer where all of it is so, and of a kind that keeps nothing else of its weights, may be loaded without vLLM.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear, _GateLinearMethod
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.layernorm import LayerNorm, RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import SKIP_LOAD_TENSORS
from vllm.model_executor.model_loader.reload.utils import get_layer_tensors
from vllm.platforms import current_platform

from rollout.vllm_plugin.precision import keep_float32_sums
from rollout.vllm_plugin.whole_experts import holds_all_experts
from rollout.weight_sync import copy_all

_TRUSTED: dict[type, tuple[type, ...]] = {
    ReplicatedLinear: (UnquantizedLinearMethod,),
    ColumnParallelLinear: (UnquantizedLinearMethod,),
    MergedColumnParallelLinear: (UnquantizedLinearMethod,),
    QKVParallelLinear: (UnquantizedLinearMethod,),
    RowParallelLinear: (UnquantizedLinearMethod,),
    GateLinear: (UnquantizedLinearMethod, _GateLinearMethod),
    VocabParallelEmbedding: (UnquantizedEmbeddingMethod,),
    ParallelLMHead: (UnquantizedEmbeddingMethod,),
    RoutedExperts: (UnquantizedFusedMoEMethod,),
    RMSNorm: (type(None),),
    LayerNorm: (type(None),),
}
"""Layers that under these quant methods compute with their parameters as they stand and derive nothing from them, on
CUDA; on a CPU `is_trusted` asks more of them."""

_EXPERT_KERNELS = (UnquantizedMoeBackend.TRITON, UnquantizedMoeBackend.BATCHED_TRITON)
"""They read the experts as the checkpoint has them; the others swap, shuffle or pack."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes per element: a comparison that tells -0 from 0, and takes NaN for itself."""


def is_trusted(layer: nn.Module) -> bool:
    """Whether what the layer computes depends on its parameters alone, as they are at that moment.

    That is known of some classes (of their subclasses only those of `precision.py`). A tensor beside parameters and
    buffers may have been derived from them, and so may what the CPU build calls instead of torch's own matrix product.
    """
    kind: type = type(layer)
    if kind.__module__ == keep_float32_sums.__module__:
        kind = kind.__base__ or kind
    method = getattr(layer, "quant_method", None)
    if type(method) not in _TRUSTED.get(kind, ()):
        return False
    if keeps_tensors(layer):
        return False
    if isinstance(layer, RoutedExperts):
        return getattr(method, "unquantized_backend", None) in _EXPERT_KERNELS and holds_all_experts(layer)
    if current_platform.is_cpu():
        return getattr(layer, "cpu_linear", nn.functional.linear) is nn.functional.linear
    return current_platform.is_cuda()


def keeps_tensors(module: nn.Module) -> bool:
    """Whether a module has tensors beside its parameters and buffers."""
    return any(isinstance(value, Tensor) for value in vars(module).values())


@dataclass(frozen=True, slots=True)
class Place:
    """A part of a checkpoint tensor, and where it lies in a parameter. Offsets and strides count elements."""

    tensor: str
    """The checkpoint's name."""
    shape: tuple[int, ...]
    offset: int
    """From the tensor's first element."""
    stride: tuple[int, ...]
    parameter: str
    """Name within its layer."""
    to_offset: int
    """From the parameter's first element."""
    to_stride: tuple[int, ...]

    def within(self, parameter: Tensor) -> Tensor:
        """The place in a parameter, or in any tensor laid out like it, as a view."""
        return parameter.detach().as_strided(self.shape, self.to_stride, parameter.storage_offset() + self.to_offset)


@dataclass(frozen=True, slots=True, eq=False)
class _Home:
    layer: str
    parameter: str
    tensor: Tensor
    """Kept, so that its storage stays the only one of its number."""


class Lesson:
    """One update, watched.

    `layers` are those among the opened ones whose places are to be learned. `closed` are parameters that vLLM must not
    write to: a copy into one of them raises RuntimeError.
    """

    def __init__(self, layers: dict[str, nn.Module], closed: Iterable[Tensor]) -> None:
        self._layers = layers
        self._seen: dict[str, dict[Place, Tensor]] = {name: {} for name in layers}
        """What the loaders copied, with what they read."""
        self._learned: dict[str, tuple[Place, ...]] = {}
        self._spoilt: set[str] = set()
        """Tensors that vLLM must load, in the next update too."""
        self._homes: dict[int, _Home] = {}
        for name, layer in layers.items():
            for parameter, tensor in get_layer_tensors(layer).items():
                if parameter in SKIP_LOAD_TENSORS:  # vLLM loads them past its reload, into the live tensors
                    continue
                self._homes.setdefault(_storage(tensor), _Home(name, parameter, tensor))
        self._closed = {_storage(tensor) for tensor in closed}

    @contextmanager
    def watch(self, tensors: Iterable[tuple[str, Tensor]], *, keep: bool) -> Iterator[Iterator[tuple[str, Tensor]]]:
        """Hands out one bucket's tensors for vLLM to load, sees where they go, and judges the layers that are finished.

        What the others have got is compared when they are: `keep` holds a copy of it, as the memory is not ours.
        """
        mode = _Watch(list(tensors), self._homes, self._closed)
        with mode:
            yield mode.hand_out()
        self._spoilt |= mode.spoilt
        for home, place, source in mode.copies:
            self._seen[home.layer].setdefault(place, source)
        self._judge_finished()
        for home, place, source in mode.copies if keep else ():
            if self._seen[home.layer].get(place) is source:
                self._seen[home.layer][place] = source.clone()

    def finish(self) -> dict[str, tuple[Place, ...]]:
        """Layer -> places of all its elements, for the layers that may be loaded directly from now on."""
        self._judge_finished()
        while spoilt := self._layers_with_spoilt():
            for name in spoilt:
                self._spoilt |= {place.tensor for place in self._learned.pop(name)}
        return self._learned

    def _layers_with_spoilt(self) -> list[str]:
        """Layers with a tensor that vLLM must load, or that another layer takes from too."""
        tensors = {name: {place.tensor for place in places} for name, places in self._learned.items()}
        owners = Counter(tensor for own in tensors.values() for tensor in own)
        return [name for name, own in tensors.items() if any(t in self._spoilt or owners[t] > 1 for t in own)]

    def _judge_finished(self) -> None:
        for name, seen in self._seen.items():
            if seen and not get_layerwise_info(self._layers[name]).can_load():
                self._judge(name, seen)
                self._seen[name] = {}

    def _judge(self, name: str, seen: dict[Place, Tensor]) -> None:
        layer = self._layers[name]
        loaded = {home.parameter: home.tensor for home in self._homes.values() if home.layer == name}
        if is_trusted(layer) and _is_laid_out_as(layer, loaded) and _is_covered(layer, seen) and _holds(layer, seen):
            self._learned[name] = tuple(seen)
        else:
            self._spoilt |= {place.tensor for place in seen}


class _Watch(TorchDispatchMode):
    """Sees every copy that is made while it is active."""

    def __init__(self, tensors: list[tuple[str, Tensor]], homes: Mapping[int, _Home], closed: Collection[int]) -> None:
        super().__init__()
        self.copies: list[tuple[_Home, Place, Tensor]] = []
        self.spoilt: set[str] = set()
        """Tensors that were copied changed, or to where nobody looks."""
        self._tensors = tensors
        self._by_address = sorted((tensor.data_ptr(), i) for i, (_, tensor) in enumerate(tensors) if tensor.numel())
        self._homes, self._closed = homes, closed
        self._current = ""

    def hand_out(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors, in their order."""
        for name, tensor in self._tensors:
            self._current = name
            yield name, tensor

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self._look(args[0], args[1])
        return func(*args, **(kwargs or {}))

    def _look(self, target: Tensor, source: Tensor) -> None:
        storage = _storage(target)
        if storage in self._closed:
            raise RuntimeError("its layer has got tensors under other names in this update; begin it anew")
        home = self._homes.get(storage)
        copies = [] if home is None else list(self._pieces(home, target, source))
        if copies:
            self.copies += copies
        elif target.is_meta:  # else it is vLLM's second pass, or nothing of the model's
            origin = self._origin(source)
            self.spoilt |= {self._current} | ({origin[0]} if origin else set())

    def _pieces(self, home: _Home, target: Tensor, source: Tensor) -> Iterator[tuple[_Home, Place, Tensor]]:
        """The copy in pieces of one checkpoint tensor each (`whole_experts.py` joins them); none if it changes them."""
        if target.shape != source.shape or target.dtype != source.dtype:
            return
        is_whole = self._origin(source) is not None or not source.dim()
        pairs = [(target, source)] if is_whole else zip(target.unbind(), source.unbind(), strict=True)
        for part, read in pairs:
            if (origin := self._origin(read)) is not None:
                name, offset = origin
                to_offset = int(part.storage_offset() - home.tensor.storage_offset())
                form = tuple(read.shape), offset, read.stride()
                yield home, Place(name, *form, home.parameter, to_offset, part.stride()), read.detach()

    def _origin(self, source: Tensor) -> tuple[str, int] | None:
        """The name of the tensor that this is a view of, and how many elements from its start."""
        if source.is_meta:
            return None
        index = bisect_right(self._by_address, (source.data_ptr(), len(self._tensors))) - 1
        if index < 0:
            return None
        name, tensor = self._tensors[self._by_address[index][1]]
        distance = source.data_ptr() - tensor.data_ptr()
        extent = 1 + sum((size - 1) * stride for size, stride in zip(source.shape, source.stride(), strict=True))
        inside = distance + extent * source.element_size() <= tensor.nbytes
        if not inside or source.dtype != tensor.dtype or not source.numel() or _storage(source) != _storage(tensor):
            return None
        return name, distance // tensor.element_size()


def _storage(tensor: Tensor) -> int:
    """A number of its own for each storage, of empty tensors too."""
    return tensor.untyped_storage()._cdata


def _is_laid_out_as(layer: nn.Module, loaded: Mapping[str, Tensor]) -> bool:
    """Whether the kernels' tensors have the form of the ones that vLLM loads into."""
    for name, tensor in loaded.items():
        live = getattr(layer, name)
        if live.shape != tensor.shape or live.stride() != tensor.stride() or live.dtype != tensor.dtype:
            return False
    return True


def _is_covered(layer: nn.Module, places: Iterable[Place]) -> bool:
    """Whether every element of every parameter comes from the checkpoint, once."""
    places = list(places)
    for name, parameter in layer.named_parameters(recurse=False):
        if name in SKIP_LOAD_TENSORS:
            continue
        if not parameter.is_contiguous():
            return False
        times = torch.zeros(parameter.shape, dtype=torch.uint8, device=parameter.device)
        for place in places:
            if place.parameter == name:
                place.within(times).add_(1)
        if not bool((times == 1).all()):
            return False
    return True


def _holds(layer: nn.Module, seen: Mapping[Place, Tensor]) -> bool:
    """Whether the layer's parameters, covered by these places, have the very bits of what was read."""
    for name in {place.parameter for place in seen}:
        live = getattr(layer, name).detach()
        expected = torch.empty_like(live)
        own = {place: source for place, source in seen.items() if place.parameter == name}
        copy_all([place.within(expected) for place in own], list(own.values()))
        bits = _BITS[live.element_size()]
        if not torch.equal(live.view(bits), expected.view(bits)):
            return False
    return True
