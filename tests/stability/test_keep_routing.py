"""Routing replay on nine transformers models: bit-exact for their own routing, decisive for another one, safe under
checkpointing.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from stability.keep_routing import UnknownRouterError, check_supported, decoder_layers, install
from tests.moe_models import MOE_MODELS, NUM_EXPERTS, NUM_LAYERS, NUM_SLOTS, VOCAB_SIZE, build_model

NUM_TOKENS = 24
FORCED = (1, 5, 9, 13)


def inputs() -> dict[str, Any]:
    """Two sequences of 10 and 14 tokens in one row."""
    token_ids = torch.randint(3, VOCAB_SIZE, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(1))
    position_ids = torch.cat([torch.arange(10), torch.arange(14)])[None]
    return {"input_ids": token_ids, "position_ids": position_ids, "use_cache": False}


def routers_of(model: PreTrainedModel) -> dict[int, tuple[nn.Module, nn.Module]]:
    """Router and experts by decoder layer, found by name."""
    found = {}
    for index, layer in enumerate(decoder_layers(model)):
        parts = dict(layer.named_modules())
        router = parts.get("mlp.gate") or parts.get("mlp.router")
        if router is not None and "mlp.experts" in parts:
            found[index] = (router, parts["mlp.experts"])
    return found


def own_routing(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Plain logits and the experts [T, L, K] behind them; rows of dense layers hold rubbish that nothing may read."""
    record = torch.full((NUM_TOKENS, NUM_LAYERS, NUM_SLOTS), 77, dtype=torch.int16)
    handles = []
    for index, (router, _) in routers_of(model).items():

        def keep(_module: nn.Module, _args: Any, output: tuple[Tensor, ...], index: int = index) -> None:
            record[:, index] = output[2].to(torch.int16)

        handles.append(router.register_forward_hook(keep))
    with torch.no_grad():
        logits = model(**inputs()).logits
    for handle in handles:
        handle.remove()
    return logits, record


def random_routing(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(NUM_TOKENS, NUM_LAYERS, NUM_EXPERTS, generator=generator)
    return scores.topk(NUM_SLOTS).indices.to(torch.int16)


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_of(model: PreTrainedModel, routing: Tensor) -> Tensor:
    return model(**inputs(), routed_experts=routing).logits.float().pow(2).mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MOE_MODELS)
def test_own_routing_replays_bit_exactly(name: str, dtype: torch.dtype) -> None:
    model = build_model(name)
    nn.Module.to(model, dtype)
    logits, record = own_routing(model)
    replay = install(model)
    assert replay is not None and replay.layer_indices == tuple(routers_of(model))
    with torch.no_grad():
        assert torch.equal(model(**inputs()).logits, logits), "without the keyword nothing changes"
        with replay.counting():
            assert torch.equal(model(**inputs(), routed_experts=record).logits, logits), "own routing"
        unknown = torch.full_like(record, -1)
        assert torch.equal(model(**inputs(), routed_experts=unknown).logits, logits), "no record: own routing"
        changed = model(**inputs(), routed_experts=random_routing(0)).logits
    assert (changed - logits).abs().max() > 0.02
    assert replay.agreement().tolist() == [[NUM_TOKENS * NUM_SLOTS] * 2] * len(replay.layer_indices)


@pytest.mark.parametrize("name", MOE_MODELS)
def test_only_replayed_experts_get_gradient(name: str) -> None:
    model = build_model(name)
    install(model)
    forced = torch.tensor(FORCED, dtype=torch.int16).expand(NUM_TOKENS, NUM_LAYERS, NUM_SLOTS)
    loss_of(model, forced).backward()
    for router, experts in routers_of(model).values():
        assert isinstance(weight := experts.down_proj, nn.Parameter) and weight.grad is not None
        assert tuple(weight.grad.flatten(1).abs().sum(1).nonzero()[:, 0].tolist()) == FORCED
        assert isinstance(gate := router.weight, nn.Parameter) and gate.grad is not None
        assert gate.grad[list(FORCED)].abs().amax(1).min() > 0, "the router still learns"


@pytest.mark.parametrize("name", MOE_MODELS)
def test_interleaved_checkpointed_micro_batches_keep_their_own_experts(name: str) -> None:
    """forward(a), forward(b), backward(a), backward(b): the recomputation of a must not see b's experts."""
    found = {}
    for checkpointed in (False, True):
        model = build_model(name)
        replay = install(model)
        assert replay is not None
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with replay.counting():
            losses = [loss_of(model, random_routing(seed)) for seed in (1, 2)]
        for loss in losses:
            loss.backward()
        found[checkpointed] = gradients(model)
        assert replay.agreement()[:, 1].tolist() == [2 * NUM_TOKENS * NUM_SLOTS] * len(replay.layer_indices)
    assert found[True].keys() == found[False].keys()
    for key, gradient in found[False].items():
        assert torch.equal(gradient, found[True][key]), key


def test_agreement_counts_recorded_rows_only() -> None:
    """Layer 1: three rows recorded, of which one has one slot exchanged and one in another order."""
    model = build_model("qwen3_moe")
    _, record = own_routing(model)
    replay = install(model)
    assert replay is not None
    spare = next(e for e in range(NUM_EXPERTS) if e not in record[1, 1].tolist())
    record[3:] = -1
    record[1, 1, 2] = spare
    record[2, 1] = record[2, 1].flip(0)
    with torch.no_grad():
        model(**inputs(), routed_experts=record)
        assert replay.agreement().sum() == 0, "counts only when asked to"
        with replay.counting():
            model(**inputs(), routed_experts=record)
    agreement = replay.agreement()
    assert agreement[:, 1].tolist() == [3 * NUM_SLOTS] * NUM_LAYERS
    assert agreement[0].tolist() == [3 * NUM_SLOTS, 3 * NUM_SLOTS]
    assert agreement[1].tolist() == [3 * NUM_SLOTS - 1, 3 * NUM_SLOTS]
    replay.reset()
    assert replay.agreement().sum() == 0


def test_wrong_shapes_are_refused() -> None:
    model = build_model("deepseek_v3")
    install(model)
    with pytest.raises(ValueError, match="3 decoder layers"):
        loss_of(model, random_routing(0)[:, :2])
    with pytest.raises(ValueError, match="its router chooses"):
        loss_of(model, random_routing(0)[:, :, :3])
    with pytest.raises(ValueError, match="its router chooses"):
        loss_of(model, random_routing(0)[:-1])


def test_dense_models_have_nothing_to_replay() -> None:
    assert install(build_model("qwen3")) is None


class _OddRouter(nn.Module):
    """Gates by the square of the logits, which no known model does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(NUM_EXPERTS, 64))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden @ self.weight.T
        weights, ids = logits.square().topk(NUM_SLOTS)
        return logits, weights, ids


def test_unknown_routers_are_refused_by_name() -> None:
    model = build_model("qwen3_moe")
    for layer in decoder_layers(model):
        layer.get_submodule("mlp").gate = _OddRouter()
    with pytest.raises(UnknownRouterError, match=r"_OddRouter.*stability\.keep_routing = false"):
        install(model)


@pytest.mark.parametrize("name", [*MOE_MODELS, "qwen3"])
def test_check_supported_needs_no_weights(name: str) -> None:
    """Full-size default configs: hundreds of billions of parameters, none of them allocated."""
    assert check_supported(AutoConfig.for_model(name)) is (name != "qwen3")


def test_check_supported_refuses_other_mixtures() -> None:
    with pytest.raises(UnknownRouterError, match=r"stability\.keep_routing = false"):
        check_supported(AutoConfig.for_model("granitemoe"))
