"""The receiving end of a weight update inside vLLM: the weight-transfer backend `keel`.

Buckets of checkpoint tensors come in as Python objects. What is known to lie in the kernels' tensors as it comes is
copied there (`direct_load.py`). The rest, in a first update all of it, goes through vLLM's layerwise reload, which
packs each layer again for its kernels and keeps the storage that graphs point to. Two things are added to that: the CPU
build's reload of expert weights is put right, and an update that stopped half way can be taken back and begun anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors, get_layerwise_info
from vllm.platforms import current_platform

from rollout.vllm_plugin.direct_load import DirectLoad
from rollout.vllm_plugin.whole_experts import WholeExperts
from rollout.weight_sync import DeviceBuffer, WeightBucket

BACKEND = "keel"


class WeightLoadError(RuntimeError):
    """A tensor of the update does not fit the model."""


class IncompleteUpdateError(RuntimeError):
    """The update ended before every tensor of the checkpoint had come."""


@dataclass
class BucketInit(WeightTransferInitInfo):
    """Nothing has to be agreed on: buckets carry their own description."""


@dataclass
class BucketUpdate(WeightTransferUpdateInfo):
    """One bucket of an update."""

    bucket: WeightBucket


class _Layers:
    """Some layers of a model: as much of it as vLLM's reload asks for."""

    def __init__(self, modules: Iterable[torch.nn.Module]) -> None:
        self._modules = list(modules)

    def modules(self) -> Iterator[Any]:
        return iter(self._modules)


class BucketWeightTransfer(WeightTransferEngine[BucketInit, BucketUpdate]):
    """Loads an update's buckets, in any order and chunking, as vLLM loads a checkpoint."""

    init_info_cls = BucketInit
    update_info_cls = BucketUpdate

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._moe_kernels: list[tuple[Any, Any]] = []
        self._opened: dict[str, torch.nn.Module] = {}
        self._direct_load: DirectLoad | None = None
        self._whole_experts: WholeExperts | None = None

    def init_transfer_engine(self, init_info: BucketInit) -> None:
        """Nothing to connect."""

    def start_weight_update(self) -> None:
        """Opens the layers that vLLM loads; what an earlier, unfinished update left behind is dropped first."""
        self.abandon()
        if current_platform.is_cpu():
            self._drop_moe_kernels()
        self._open(self._direct.begin())

    def receive_weights(self, update_info: BucketUpdate) -> None:
        """Loads one bucket; what vLLM loads is packed as soon as the last tensor of its layer is there.

        Raises WeightLoadError with the tensor's name if the model does not take it.
        """
        bucket = update_info.bucket
        is_shared = isinstance(bucket.buffer, DeviceBuffer)
        try:
            rest = self._direct.load(bucket)
        except ValueError as error:
            raise WeightLoadError(str(error)) from error
        if rest.specs:
            self._load_by_vllm(rest, is_shared)
        if is_shared and torch.accelerator.is_available():
            torch.accelerator.synchronize()  # the sender fills this memory again as soon as this returns

    def finish_weight_update(self) -> None:
        """Closes the update. Raises IncompleteUpdateError, with the layers named, if tensors are missing."""
        if missing := [*self._direct.find_missing(), *self._incomplete_layers()]:
            raise IncompleteUpdateError(
                f"{len(missing)} layers did not get all their weights, first {', '.join(missing[:3])}; "
                "an update must send every tensor of the checkpoint"
            )
        self._direct.finish(lambda: finalize_layerwise_reload(self._part(self._opened), self.model_config))
        self._opened = {}
        self._restore_moe_kernels()

    def abandon(self) -> None:
        """Takes back an update that never finished: open layers get their old tensors, half-loaded ones forget.

        Layers that were loaded directly keep what has come: only a complete update makes the model whole again.
        """
        for layer in self._opened.values():
            info = get_layerwise_info(layer)
            if info.can_load() and info.kernel_tensors is not None:
                _place_kernel_tensors(layer, info)
                info.reset()
        self._opened = {}
        self._restore_moe_kernels()

    def shutdown(self) -> None:
        """Nothing to release."""

    @property
    def _direct(self) -> DirectLoad:
        """Made for the model that is being updated."""
        if self._direct_load is None or self._direct_load.model is not self.model:
            self._direct_load = DirectLoad(self.model, enabled=self.model_config.quantization is None)
        return self._direct_load

    def _open(self, layers: dict[str, torch.nn.Module]) -> None:
        initialize_layerwise_reload(self._part(layers))
        self._opened |= layers
        self._direct.learn()
        self._whole_experts = WholeExperts(self._opened)

    def _part(self, layers: dict[str, torch.nn.Module]) -> Any:
        """What vLLM's reload is to take for the model; it leaves marks on a quantized one."""
        return self.model if len(layers) == self._direct.num_layers else _Layers(layers.values())

    def _load_by_vllm(self, bucket: WeightBucket, is_shared: bool) -> None:
        if layers := self._direct.reopen(bucket):
            self._open(layers)
        model: Any = self.model
        experts = self._whole_experts
        assert experts is not None, "vLLM has called start_weight_update before"
        names: list[str] = []
        addresses: set[int] = set()

        def note(tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in tensors:
                names.append(name)
                addresses.add(tensor.untyped_storage().data_ptr())
                yield name, tensor

        try:
            with self._direct.hand_to_vllm(bucket, keep=is_shared) as tensors:
                model.load_weights(experts.load(note(tensors)))
        except Exception as error:
            reason = f"{type(error).__name__} {error}".strip()
            raise WeightLoadError(f"tensor {names[-1:]} does not fit the engine's model ({reason})") from error
        if is_shared:
            self._copy_what_waits(addresses)

    def _copy_what_waits(self, addresses: set[int]) -> None:
        """A layer that waits for more of its tensors keeps those that came; they must not stay in the sender's memory,
        which begins at these addresses."""
        for layer in self._opened.values():
            for _, call in get_layerwise_info(layer).loaded_weights:
                for name, value in call.arguments.items():
                    if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in addresses:
                        call.arguments[name] = value.clone()

    def _drop_moe_kernels(self) -> None:
        # On a reload, vLLM's CPU build skips the expert prepack where a kernel object already exists, and raw weights
        # end up in packed buffers. Without the object it takes the way of the first load.
        methods = [m._quant_method for m in self.model.modules() if isinstance(m, MoERunner)]
        self._moe_kernels = [(method, method.moe_kernel) for method in methods]
        for method in methods:
            method.moe_kernel = None

    def _restore_moe_kernels(self) -> None:
        for method, kernel in self._moe_kernels:
            if method.moe_kernel is None:
                method.moe_kernel = kernel
        self._moe_kernels = []

    def _incomplete_layers(self) -> Iterator[str]:
        """Layers that are still open and should not be.

        A layer closes with its last element. Padding (of the vocabulary, of experts for some kernels) never comes, and
        a tied head has no tensor of its own; any other layer with parameters must have got all of them.
        """
        tied = getattr(self.model_config.hf_config, "tie_word_embeddings", False)
        for name, layer in self._opened.items():
            info = get_layerwise_info(layer)
            if not info.can_load() or info.kernel_tensors is None or is_deferred_attention_layer(layer):
                continue
            has_parameters = bool(info.kernel_tensors[0])
            is_vocabulary = isinstance(layer, VocabParallelEmbedding)
            if (has_parameters and info.load_numel == 0 and not (tied and is_vocabulary)) or (
                _is_never_padded(layer) and info.load_numel < (info.load_numel_total or 0)
            ):
                yield name


def _is_never_padded(layer: torch.nn.Module) -> bool:
    if isinstance(layer, RoutedExperts):
        moe = layer.moe_config
        return moe.hidden_dim == moe.hidden_dim_unpadded and (
            moe.intermediate_size_per_partition == moe.intermediate_size_per_partition_unpadded
        )
    return isinstance(layer, LinearBase)


def abandon_update(wrapper: Any) -> None:
    """For `collective_rpc`: forgets a weight update that failed or was never finished, so that one can begin anew."""
    worker = wrapper.worker
    engine = worker.weight_transfer_engine
    with torch.no_grad():
        engine.abandon()
    engine.reset_weight_update_target()
    worker._weight_update_active = False


def register_backend() -> None:
    """Makes `weight_transfer_config={"backend": "keel"}` known to vLLM in this process."""
    WeightTransferEngineFactory.register_engine(BACKEND, BucketWeightTransfer)
