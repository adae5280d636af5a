"""Weights that go past vLLM's loaders: every parameter of the engine, bit by bit, after updates of every kind.

vLLM's CPU build packs its linear layers. A switch of its own leaves them as they are, as on a GPU; embedding and head
stay packed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rollout.config import RolloutConfig
from rollout.engine import EngineError
from rollout.weight_sync import DeviceBuffer, WeightBucket, pack_buckets, unpack_bucket
from rollout.worker import RolloutWorker
from tests.rollout.direct_reference import (
    LINEAR,
    NORMS,
    Tensors,
    call,
    changed,
    differing,
    direct_layers,
    error_of,
    forget,
    fused,
    live_parameters,
    send,
    send_buckets,
    shuffled,
)
from tests.rollout.engine_reference import load_reference
from tests.tiny_models import make_qwen3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def worker(folder: Path) -> Iterator[RolloutWorker]:
    from vllm.model_executor.layers.linear import LinearBase

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LinearBase, "_cpu_skip_gemm_dispatch", True, raising=False)
        config = RolloutConfig(dtype="float32")
        worker = RolloutWorker(str(folder), config, max_model_len=128, record_kept=True, record_routing=True)
        yield worker
        asyncio.run(worker.shutdown())


@pytest.fixture
def model(folder: Path, worker: RolloutWorker) -> PreTrainedModel:
    """A model to send, whose places the engine does not know yet."""
    call(worker, forget)
    return load_reference(folder)


@pytest.mark.parametrize("order", [list, shuffled], ids=["in order", "shuffled"])
@pytest.mark.parametrize("max_bytes", [1, 70_001, 10_000_000])
def test_weights_are_the_senders(
    worker: RolloutWorker, model: PreTrainedModel, order: Callable[[Tensors], Tensors], max_bytes: int
) -> None:
    for update in range(3):
        tensors = changed(model, seed=update)
        send(worker, order(tensors), max_bytes=max_bytes)
        assert differing(worker, tensors) == []
        assert call(worker, direct_layers) == LINEAR | NORMS
    assert error_of(worker, model) < 2e-5


def test_order_and_buckets_may_change_between_updates(worker: RolloutWorker, model: PreTrainedModel) -> None:
    for update, max_bytes in enumerate([50_000, 1_000_000, 1, 50_000]):
        tensors = changed(model, seed=update)
        send(worker, shuffled(tensors) if update % 2 else tensors, max_bytes=max_bytes)
        assert differing(worker, tensors) == []
    assert error_of(worker, model) < 2e-5


@pytest.mark.parametrize("max_bytes", [3_000, 200_000])
def test_nothing_stays_in_the_senders_memory(worker: RolloutWorker, model: PreTrainedModel, max_bytes: int) -> None:
    memory = torch.empty(300_000, dtype=torch.uint8)

    def shared(buckets: Iterable[WeightBucket]) -> Iterator[WeightBucket]:
        for bucket in buckets:
            memory[: bucket.num_bytes] = torch.from_numpy(bucket.buffer)
            yield replace(bucket, buffer=DeviceBuffer(lambda: memory, (), bucket.num_bytes))
            memory.fill_(77)

    for update in range(2):
        tensors = changed(model, seed=update)
        send_buckets(worker, shared(pack_buckets(tensors, max_bytes=max_bytes)))
        assert differing(worker, tensors) == []
        assert call(worker, direct_layers) == LINEAR | NORMS


def test_a_wrong_plan_shows(worker: RolloutWorker, model: PreTrainedModel) -> None:
    def mix_up(transfer: Any) -> None:
        known = transfer._direct._tensors
        first, second = (f"model.layers.1.self_attn.{part}_proj.weight" for part in "kv")
        known[first], known[second] = known[second], known[first]

    send(worker, changed(model, seed=0))
    call(worker, mix_up)
    tensors = changed(model, seed=1)
    send(worker, tensors)
    assert differing(worker, tensors) == ["model.layers.1.self_attn.qkv_proj.weight"]
    assert error_of(worker, model) > 1e-3


@pytest.mark.parametrize(
    ("left_out", "layer"),
    [
        ("layers.1.self_attn.k_proj", "model.layers.1.self_attn.qkv_proj"),
        ("model.norm", "model.norm"),
        ("layers.2.mlp.up_proj", "model.layers.2.mlp.gate_up_proj"),
    ],
)
def test_missing_tensors_are_named_by_their_layer(
    worker: RolloutWorker, model: PreTrainedModel, left_out: str, layer: str
) -> None:
    send(worker, changed(model, seed=0))
    tensors = changed(model, seed=1)
    with pytest.raises(EngineError, match=rf"IncompleteUpdateError: 1 layers did not get all .* first {layer};"):
        send(worker, [(name, tensor) for name, tensor in tensors if left_out not in name])
    with pytest.raises(EngineError, match="run a complete one before generating"):
        error_of(worker, model)
    send(worker, tensors)
    assert differing(worker, tensors) == [] and error_of(worker, model) < 2e-5


def cut(tensors: Tensors, index: int) -> Tensors:
    name, tensor = tensors[index]
    return [*tensors[:index], (name, tensor[..., :-1].contiguous()), *tensors[index + 1 :]]


@pytest.mark.parametrize("index", [0, 5, 13], ids=["embedding", "first layer", "second layer"])
def test_a_misshapen_tensor_is_named(worker: RolloutWorker, model: PreTrainedModel, index: int) -> None:
    send(worker, changed(model, seed=0))
    tensors = changed(model, seed=1)
    with pytest.raises(EngineError, match=rf"WeightLoadError: tensor \['{tensors[index][0]}'\] does not fit"):
        send(worker, cut(tensors, index), max_bytes=30_000)
    for update in (1, 2):
        tensors = changed(model, seed=update)
        send(worker, tensors)
        assert differing(worker, tensors) == []
    assert call(worker, direct_layers) == LINEAR | NORMS


def test_an_unknown_tensor_and_a_damaged_one_are_named(worker: RolloutWorker, model: PreTrainedModel) -> None:
    send(worker, changed(model, seed=0))
    tensors = changed(model, seed=1)
    with pytest.raises(EngineError, match=r"tensor \['model\.layers\.1\.mlp\.sideways\.weight'\] does not fit"):
        send(worker, [*tensors, ("model.layers.1.mlp.sideways.weight", torch.ones(3))])
    (bucket,) = pack_buckets(tensors, max_bytes=10_000_000)
    spec = bucket.specs[5]
    for wrong in (replace(spec, offset=spec.offset + 2), replace(spec, dtype="float3"), replace(spec, num_bytes=8)):
        damaged = replace(bucket, specs=(*bucket.specs[:5], wrong, *bucket.specs[6:]))
        with pytest.raises(EngineError, match=rf"WeightLoadError: .*tensor '{spec.name}'"):
            send_buckets(worker, [damaged])
    send(worker, tensors)
    assert differing(worker, tensors) == [] and error_of(worker, model) < 2e-5


@pytest.mark.parametrize("is_first", [True, False])
def test_an_update_that_was_left_alone(worker: RolloutWorker, model: PreTrainedModel, is_first: bool) -> None:
    if not is_first:
        send(worker, changed(model, seed=0))
    half = list(pack_buckets(changed(model, seed=1), max_bytes=50_000))[::2]
    send_buckets(worker, half, finish=False)
    for update in (2, 3):
        tensors = changed(model, seed=update)
        send(worker, shuffled(tensors))
        assert differing(worker, tensors) == []
    assert call(worker, direct_layers) == LINEAR | NORMS
    assert error_of(worker, model) < 2e-5


def test_names_may_change_between_updates(worker: RolloutWorker, model: PreTrainedModel) -> None:
    for update, names in enumerate([list, fused, fused, list, list]):
        tensors = changed(model, seed=update)
        send(worker, names(tensors))
        assert differing(worker, tensors) == []
        assert call(worker, direct_layers) == LINEAR | NORMS


def test_names_that_change_within_a_layer_begin_anew(worker: RolloutWorker, model: PreTrainedModel) -> None:
    send(worker, changed(model, seed=0))
    tensors = changed(model, seed=1)
    mixed = [pair for pair in tensors if ".k_proj." in pair[0]] + fused(tensors)
    with pytest.raises(EngineError, match=r"self_attn.qkv_proj.weight'\] does not fit .* begin it anew"):
        send(worker, mixed)
    for given in (fused(tensors), tensors):
        send(worker, given)
        assert differing(worker, tensors) == []


def test_what_must_be_converted_stays_with_vllm(worker: RolloutWorker, model: PreTrainedModel) -> None:
    send(worker, changed(model, seed=0))
    for update, dtype in enumerate([torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]):
        tensors = [(name, tensor.to(dtype)) for name, tensor in changed(model, seed=update)]
        send(worker, tensors)
        assert differing(worker, [(name, tensor.float()) for name, tensor in tensors]) == []
        assert call(worker, direct_layers) == set()


def test_parameters_that_moved_are_found_again(worker: RolloutWorker, model: PreTrainedModel) -> None:
    def move(transfer: Any) -> None:
        layer: Any = transfer.model.get_submodule("model.layers.1.self_attn.o_proj")
        layer.weight.data = layer.weight.data.clone()

    send(worker, changed(model, seed=0))
    call(worker, move)
    tensors = changed(model, seed=1)
    send(worker, tensors)
    assert differing(worker, tensors) == [] and error_of(worker, model) < 2e-5


def test_what_is_rearranged_after_loading_stays_with_vllm(
    worker: RolloutWorker, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.layers.linear import RowParallelLinear, UnquantizedLinearMethod

    original = UnquantizedLinearMethod.process_weights_after_loading

    def turn(method: Any, layer: Any) -> None:
        original(method, layer)
        matrix = layer.weight.data
        if isinstance(layer, RowParallelLinear):
            matrix.copy_(matrix.roll(1, 0))

    monkeypatch.setattr(UnquantizedLinearMethod, "process_weights_after_loading", turn)
    turned = {name for name in LINEAR if name.endswith(("o_proj", "down_proj"))}
    for update in range(3):
        tensors = changed(model, seed=update)
        send(worker, tensors)
        assert {name.removesuffix(".weight") for name in differing(worker, tensors)} == turned
        assert call(worker, direct_layers) == (LINEAR | NORMS) - turned
        rolled = [(name, t.roll(1, 0) if name.removesuffix(".weight") in turned else t) for name, t in tensors]
        assert differing(worker, rolled) == []


def test_what_a_loader_changes_stays_with_vllm(worker: RolloutWorker, model: PreTrainedModel) -> None:
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    def halve(param: Tensor, loaded_weight: Tensor) -> None:  # vLLM knows the arguments by name
        param.data.copy_(loaded_weight / 2)

    def set_loader(transfer: Any, loader: Any) -> Any:
        parameters, _ = get_layerwise_info(transfer.model.get_submodule("model.norm")).restore_metadata
        weight: Any = parameters["weight"]
        before, weight.weight_loader = weight.weight_loader, loader
        return before

    send(worker, changed(model, seed=0))
    before = call(worker, lambda transfer: set_loader(transfer, halve))
    call(worker, forget)
    for update in range(2):
        tensors = changed(model, seed=update)
        send(worker, tensors)
        halved = [(name, t / 2 if name == "model.norm.weight" else t) for name, t in tensors]
        assert differing(worker, halved) == []
        assert call(worker, direct_layers) == (LINEAR | NORMS) - {"model.norm"}
    call(worker, lambda transfer: set_loader(transfer, before))


@pytest.mark.parametrize(
    ("owner", "affected"),
    [
        ("model.norm", {"model.norm"}),
        ("model.layers.1", {name for name in LINEAR | NORMS if name.startswith("model.layers.1.")}),
        ("", LINEAR | NORMS),
    ],
    ids=["layer", "decoder layer", "model"],
)
def test_where_tensors_may_have_been_derived_vllm_loads(
    worker: RolloutWorker, model: PreTrainedModel, owner: str, affected: set[str]
) -> None:
    def put(transfer: Any) -> None:
        transfer.model.get_submodule(owner).derived = torch.ones(3)

    def take(transfer: Any) -> None:
        del transfer.model.get_submodule(owner).derived

    call(worker, put)
    for update in range(2):
        tensors = changed(model, seed=update)
        send(worker, tensors)
        assert differing(worker, tensors) == []
        assert call(worker, direct_layers) == (LINEAR | NORMS) - affected
    call(worker, take)


def test_a_copy_of_several_tensors_is_seen_as_one_of_each() -> None:
    """As `WholeExperts` hands a layer's experts to vLLM in one piece."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    from rollout.vllm_plugin.direct_learn import Lesson

    experts = torch.nn.Linear(5, 12, device="meta")
    experts.weight = torch.nn.Parameter(torch.empty(3, 4, 5, device="meta"), requires_grad=False)
    get_layerwise_info(experts).load_numel_total = 60  # open, waiting for its tensors
    (bucket,) = pack_buckets([(f"expert.{i}", torch.full((2, 5), float(i))) for i in range(3)], max_bytes=1_000)
    lesson = Lesson({"experts": experts}, ())
    with lesson.watch(unpack_bucket(bucket), keep=True) as tensors:
        first, second, _ = (tensor for _, tensor in tensors)
        distance = second.storage_offset() - first.storage_offset()
        experts.weight[:, 2:].copy_(first.as_strided((3, 2, 5), (distance, 5, 1)))
    live = torch.zeros(3, 4, 5)
    for place, source in lesson._seen["experts"].items():
        assert (place.shape, place.offset, place.parameter) == ((2, 5), 0, "weight")
        assert (source == float(place.tensor.removeprefix("expert."))).all()
        place.within(live).add_(source + 1)
    assert torch.equal(live[:, 2:], torch.arange(1.0, 4.0)[:, None, None].expand(3, 2, 5)) and not live[:, :2].any()


@pytest.mark.slow
def test_a_head_tied_to_its_embedding(
    worker: RolloutWorker, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU nothing packs these two, and most vocabularies need no padding; then they are loaded directly too."""
    from vllm.model_executor.layers import utils

    def leave_unpacked(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    asyncio.run(worker.shutdown())  # last user of the module's engine; a process runs one at a time
    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", leave_unpacked)
    config = AutoConfig.from_pretrained(folder, vocab_size=128, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    other = RolloutWorker(
        str(tmp_path), RolloutConfig(dtype="float32"), max_model_len=128, record_kept=True, record_routing=True
    )
    try:
        model = load_reference(tmp_path)
        for update in range(3):
            tensors = [(name, tensor) for name, tensor in changed(model, seed=update) if name != "lm_head.weight"]
            send(other, tensors)
            live = call(other, live_parameters)
            assert torch.equal(live["model.embed_tokens.weight"], dict(tensors)["model.embed_tokens.weight"])
            assert call(other, direct_layers) == LINEAR | NORMS | {"model.embed_tokens"}
            assert error_of(other, model) < 2e-5
    finally:
        asyncio.run(other.shutdown())
