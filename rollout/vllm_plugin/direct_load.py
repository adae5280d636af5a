"""Weights copied from a bucket straight into the kernels' tensors, where it is known which go where.

vLLM's own way costs half a millisecond of Python per tensor. The first update goes that way and is watched
(`direct_learn.py`); from the second on, a bucket's tensors are one call of `torch._foreach_copy_`. Layers that are
packed for their kernels, whole models that are quantized and attention layers (which may derive tensors of their own)
stay with vLLM, always.

The kernels' tensors are written to while an update is under way. What an update that stops half way leaves behind is
neither old nor new, until a complete one has come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from rollout.vllm_plugin.direct_learn import Lesson, Place, is_trusted, keeps_tensors
from rollout.weight_sync import TensorSpec, WeightBucket, check_spec, copy_all, elements_of, open_bucket, unpack_bucket

_Form = tuple[str, tuple[int, ...]]
"""A tensor's dtype and shape."""


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """A layer that is loaded directly."""

    module: nn.Module
    places: tuple[Place, ...]
    addresses: dict[str, int]
    """Of its tensors, as they were when their places were learned."""

    def has_moved(self) -> bool:
        return any(getattr(self.module, name).data_ptr() != address for name, address in self.addresses.items())


@dataclass(frozen=True, slots=True, eq=False)
class _Tensor:
    """A checkpoint tensor that is loaded directly."""

    form: _Form
    parts: tuple[tuple[Place, Tensor], ...]
    """Its places, and the kernels' tensors as views there."""


@dataclass(slots=True)
class _Copies:
    """What a bucket brings of one dtype."""

    targets: list[Tensor] = field(default_factory=list)
    sources: list[tuple[tuple[int, ...], tuple[int, ...], int]] = field(default_factory=list)
    """Shape, stride and first element within the bucket."""

    def make(self, elements: Tensor) -> None:
        """Copies from the bucket's bytes, seen as elements of this dtype."""
        copy_all(self.targets, [elements.as_strided(*source) for source in self.sources])


@dataclass(frozen=True, slots=True, eq=False)
class _Route:
    """Where the tensors of one bucket go. The next update's buckets are cut like this one's, as a rule."""

    specs: tuple[TensorSpec, ...]
    num_bytes: int
    copies: dict[torch.dtype, _Copies]
    names: frozenset[str]
    """Of the tensors that are copied."""
    rest: tuple[TensorSpec, ...]
    """For vLLM."""


class DirectLoad:
    """What of a model is loaded directly; with `enabled=False`, nothing.

    In an update, `begin` comes first; whenever vLLM has opened layers, `learn`; for each bucket `load` and, if that
    leaves something, `reopen` and `hand_to_vllm`; at last `find_missing` and `finish`.
    """

    def __init__(self, model: nn.Module, *, enabled: bool) -> None:
        self.model = model
        self._modules = dict(model.named_modules())
        self._left_to_vllm = {name for name in self._modules if not enabled} | _attention_layers(self._modules)
        """Layers that are not (or never again) learned."""
        self._empty: set[str] = set()
        """Layers that nothing was loaded into: vLLM would put back what it took out."""
        self._layers: dict[str, _Layer] = {}
        self._tensors: dict[str, _Tensor] = {}
        self._routes: dict[str, _Route] = {}
        """By the name of the bucket's first tensor."""
        self._forms: dict[str, _Form] = {}
        """What vLLM loaded in the last complete update."""
        self._arrived: set[str] = set()
        """What was copied in this update."""
        self._handed: dict[str, _Form] = {}
        """What vLLM loaded in this update."""
        self._is_mixed = False
        """In this update tensors have come that no complete one had."""
        self._lesson: Lesson | None = None

    @property
    def num_layers(self) -> int:
        """Of the whole model, however they are loaded."""
        return len(self._modules)

    def begin(self) -> dict[str, nn.Module]:
        """Starts an update. Returns the layers that vLLM must open, by name."""
        self._forget(name for name, layer in self._layers.items() if self._is_mixed or layer.has_moved())
        if self._is_mixed:
            self._empty.clear()
        self._arrived, self._handed = set(), {}
        self._is_mixed, self._lesson = False, None
        closed = self._layers.keys() | self._empty
        return {name: module for name, module in self._modules.items() if name not in closed}

    def learn(self) -> None:
        """Watches the layers that vLLM has opened from here on, as far as they may be loaded directly next time."""
        known = self._left_to_vllm | self._layers.keys() | self._empty
        layers = {name: m for name, m in self._modules.items() if name not in known and self._may_be_direct(name, m)}
        closed = [getattr(layer.module, name) for layer in self._layers.values() for name in layer.addresses]
        self._lesson = Lesson(layers, closed) if layers else None

    def load(self, bucket: WeightBucket) -> WeightBucket:
        """Copies what it knows the places of. Returns the bucket with the rest.

        Raises ValueError if a tensor's spec does not fit its bucket.
        """
        route = self._find_route(bucket)
        if route.names:
            data = open_bucket(bucket).to(self._device)
            for dtype, copies in route.copies.items():
                copies.make(elements_of(data, dtype))
            self._arrived |= route.names
        return replace(bucket, specs=route.rest)

    def reopen(self, rest: WeightBucket) -> dict[str, nn.Module]:
        """The layers that vLLM must open too, by name, because of a tensor that the last update did not have like this.

        It may be for any layer, but not for one that has got tensors in this update: those stay closed.
        """
        if all(self._forms.get(spec.name) == _form(spec) for spec in rest.specs):
            return {}
        untouched = [
            name
            for name, layer in self._layers.items()
            if self._arrived.isdisjoint(place.tensor for place in layer.places)
        ]
        names = self._empty | set(untouched)
        self._is_mixed = self._is_mixed or bool(self._layers)
        self._forget(untouched)
        self._empty = set()
        return {name: module for name, module in self._modules.items() if name in names}

    @contextmanager
    def hand_to_vllm(self, rest: WeightBucket, *, keep: bool) -> Iterator[Iterator[tuple[str, Tensor]]]:
        """The rest of a bucket for vLLM to load; `keep` if the bucket's memory is another's.

        Raises ValueError as `load` does; a copy into a layer that is loaded directly raises RuntimeError.
        """
        if self._lesson is None:
            yield unpack_bucket(rest)
        else:
            with self._lesson.watch(unpack_bucket(rest), keep=keep) as tensors:
                yield tensors
        self._handed.update((spec.name, _form(spec)) for spec in rest.specs)

    def find_missing(self) -> Iterator[str]:
        """Layers that are loaded directly and did not get all their tensors."""
        for name, layer in self._layers.items():
            if not self._arrived.issuperset(place.tensor for place in layer.places):
                yield name

    def finish(self, finalize: Callable[[], None]) -> None:
        """Closes a complete update by `finalize`, vLLM's part of it, and takes over what was learned."""
        known = self._left_to_vllm | self._layers.keys()
        infos = {name: get_layerwise_info(module) for name, module in self._modules.items() if name not in known}
        self._empty |= {name for name, info in infos.items() if info.can_load() and not info.load_numel}
        finalize()
        for name, places in (self._lesson.finish() if self._lesson else {}).items():
            self._take_over(name, places)
        self._left_to_vllm |= self._modules.keys() - self._layers.keys() - self._empty
        self._forms, self._is_mixed, self._lesson = self._handed, False, None

    def _may_be_direct(self, name: str, module: nn.Module) -> bool:
        """Neither the layer nor what it is part of may have derived anything from its weights."""
        if not is_trusted(module):
            return False
        parts = name.split(".")
        around = (self._modules.get(".".join(parts[:end])) for end in range(1, len(parts)))
        return not any(keeps_tensors(outer) for outer in (self.model, *around) if outer is not None)

    @property
    def _device(self) -> torch.device:
        return next(iter(self._tensors.values())).parts[0][1].device

    def _take_over(self, name: str, places: tuple[Place, ...]) -> None:
        module = self._modules[name]
        addresses = {place.parameter: getattr(module, place.parameter).data_ptr() for place in places}
        self._layers[name] = _Layer(module, places, addresses)
        parts: dict[str, list[tuple[Place, Tensor]]] = {}
        for place in places:
            parts.setdefault(place.tensor, []).append((place, place.within(getattr(module, place.parameter))))
        self._tensors |= {tensor: _Tensor(self._handed[tensor], tuple(own)) for tensor, own in parts.items()}
        self._routes.clear()

    def _forget(self, names: Iterable[str]) -> None:
        for name in list(names):
            for place in self._layers.pop(name).places:
                self._tensors.pop(place.tensor, None)
            self._routes.clear()

    def _find_route(self, bucket: WeightBucket) -> _Route:
        first = bucket.specs[0].name if bucket.specs else ""
        route = self._routes.get(first)
        if route is None or route.num_bytes != bucket.num_bytes or route.specs != bucket.specs:
            route = self._routes[first] = self._make_route(bucket)
        return route

    def _make_route(self, bucket: WeightBucket) -> _Route:
        copies: dict[torch.dtype, _Copies] = {}
        names: set[str] = set()
        rest: list[TensorSpec] = []
        for spec in bucket.specs:
            tensor = self._tensors.get(spec.name)
            if tensor is None or tensor.form != _form(spec):
                rest.append(spec)
                continue
            check_spec(spec, bucket)
            names.add(spec.name)
            start = spec.offset // spec.torch_dtype.itemsize
            own = copies.setdefault(spec.torch_dtype, _Copies())
            for place, target in tensor.parts:
                own.targets.append(target)
                own.sources.append((place.shape, place.stride, start + place.offset))
        return _Route(bucket.specs, bucket.num_bytes, copies, frozenset(names), tuple(rest))


def _form(spec: TensorSpec) -> _Form:
    return spec.dtype, spec.shape


def _attention_layers(modules: Mapping[str, nn.Module]) -> set[str]:
    """Attention layers and what is inside them: they may derive tensors from weights, when an update is finished."""
    inside = {
        id(inner) for module in modules.values() if is_deferred_attention_layer(module) for inner in module.modules()
    }
    return {name for name, module in modules.items() if id(module) in inside}
