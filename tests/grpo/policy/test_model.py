"""Loading, start-up checks, attention over packed rows, sharding and the checkpoint stream."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from grpo.logprobs import token_logprobs
from grpo.policy import check
from grpo.policy.check import ModelCheckError, choose_attention
from grpo.policy.layers import attention
from grpo.policy.layers.attention import PackedLayout, attention_kwargs, packed_attention, set_attention
from grpo.policy.model import PolicyModel, checkpoint_tensors, load_policy, prepare_policy, reshard, shard_policy
from tests.grpo.batches import pack_by_hand, random_sequences
from tests.moe_models import MOE_MODELS, VOCAB_SIZE, build_model

LENGTHS = (10, 1, 14, 7, 40, 38)
EXPECTED_ATTENTION = {"gpt_oss": "eager_masks", "deepseek_v32": "sdpa", "glm_moe_dsa": "sdpa"}


def packed_row(lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor, Tensor]:
    token_ids = torch.randint(3, VOCAB_SIZE, (sum(lengths),), generator=torch.Generator().manual_seed(3))
    position_ids = torch.cat([torch.arange(n) for n in lengths])
    return token_ids, position_ids, torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


def grads_of(model: PreTrainedModel, logits: Tensor) -> list[Tensor]:
    parameters = [p for name, p in model.named_parameters() if ".indexer." not in name]
    return list(torch.autograd.grad(logits.square().mean(), parameters))


@pytest.mark.parametrize("name", [*MOE_MODELS, "qwen3"])
def test_packed_equals_separate(name: str) -> None:
    """The attention that start-up chooses, forward and backward, against one sequence at a time in stock attention."""
    model = build_model(name)
    token_ids, position_ids, cu_seqlens = packed_row()
    separate = [model(input_ids=part[None], use_cache=False).logits[0] for part in token_ids.split(LENGTHS)]
    want = torch.cat(separate)
    want_grads = grads_of(model, want)
    mode = choose_attention(model)
    assert mode == EXPECTED_ATTENTION.get(name, "packed")
    kwargs = attention_kwargs(model, mode, position_ids, cu_seqlens, max(LENGTHS))
    got = model(input_ids=token_ids[None], **kwargs).logits[0]
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
    torch.testing.assert_close(grads_of(model, got), want_grads, rtol=1e-3, atol=1e-6)


def test_sliding_windows_are_kept_in_packed_rows() -> None:
    """A window of 8 in sequences of up to 40 tokens."""
    model = build_model("mixtral", sliding_window=8)
    token_ids, position_ids, cu_seqlens = packed_row()
    want = torch.cat([model(input_ids=p[None], use_cache=False).logits[0] for p in token_ids.split(LENGTHS)])
    full = build_model("mixtral", sliding_window=None)
    assert (full(input_ids=token_ids[-38:][None], use_cache=False).logits[0] - want[-38:]).abs().max() > 1e-3
    set_attention(model, "packed")
    kwargs = attention_kwargs(model, "packed", position_ids, cu_seqlens, max(LENGTHS))
    torch.testing.assert_close(model(input_ids=token_ids[None], **kwargs).logits[0], want, rtol=0, atol=2e-6)


def tree_mask(lengths: tuple[int, ...], parents: tuple[int, ...]) -> Tensor:
    """What each token of a row sees, bool [T, T]: its sequence up to itself, and the whole of the parent."""
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    is_before = torch.ones(len(owner), len(owner), dtype=torch.bool).tril()
    return ((owner[:, None] == owner) & is_before) | (torch.tensor(parents)[owner][:, None] == owner)


def check_bucketed(lengths: tuple[int, ...], parents: tuple[int, ...], widths: tuple[int, int]) -> None:
    """Packed attention on a CPU against a mask over the whole row; `widths` of keys and of values."""
    generator, total = torch.Generator().manual_seed(5), sum(lengths)
    shapes = ((1, 4, total, widths[0]), (1, 2, total, widths[0]), (1, 2, total, widths[1]))
    states = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    q, k, v = states[0], *(s.repeat_interleave(2, 1) for s in states[1:])
    scores = (q @ k.mT * 0.3).masked_fill(~tree_mask(lengths, parents), -torch.inf)
    want = (scores.softmax(-1) @ v).transpose(1, 2)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    is_tree = any(parent >= 0 for parent in parents)
    layout = PackedLayout(cu_seqlens, max(lengths), torch.tensor(parents, dtype=torch.int32) if is_tree else None)
    query, key, value = states
    got, _ = packed_attention(torch.nn.Identity(), query, key, value, None, scaling=0.3, packed_layout=layout)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    upstream = torch.randn(want.shape, generator=generator, dtype=torch.float64)
    grads = [torch.autograd.grad((upstream * out).sum(), states) for out in (got, want)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


@pytest.mark.parametrize("lengths", [(1,), (7,), (3, 3, 3), (50, 1, 49, 2, 20), tuple(range(1, 30))], ids=str)
def test_bucketed_attention_equals_a_block_mask(lengths: tuple[int, ...]) -> None:
    check_bucketed(lengths, (-1,) * len(lengths), widths=(8, 6))


TREES = {
    "prompt of one": ((1, 5, 3), (-1, 0, 0)),
    "branches of one": ((7, 1, 1, 1), (-1, 0, 0, 0)),
    "two prompts and a whole sequence": ((9, 4, 20, 3, 2, 19, 30, 18, 1), (-1, -1, -1, 0, 0, 0, 1, 1, 1)),
    "unequal branches": ((50, 16, 1, 100, 2, 98), (-1, -1, 0, 0, 1, 1)),
}
"""Lengths and parents of a row's sequences."""


@pytest.mark.parametrize("name", TREES)
def test_bucketed_attention_equals_a_tree_mask(name: str) -> None:
    check_bucketed(*TREES[name], widths=(16, 16))


@pytest.mark.parametrize("seed", range(10))
def test_runs_of_children_are_whole_and_their_sums_have_room(seed: int) -> None:
    """The kernels' table against a loop: each run is as long as the longest sequence before another child is added."""
    generator = torch.Generator().manual_seed(seed)
    num_prompts = 1 + seed % 4
    lengths = torch.randint(1, 90, (num_prompts + 14,), generator=generator)
    parents = torch.randint(num_prompts - 1, (12,), generator=generator) if num_prompts > 1 else torch.zeros(12).long()
    parents = torch.cat([-torch.ones(num_prompts + 2, dtype=torch.int64), parents.sort().values])
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    longest = int(lengths.max())
    tree = PackedLayout(cu_seqlens, longest, parents.int()).tree
    assert tree is not None and tree.dtype == torch.int32
    begins, row = cu_seqlens.tolist(), 0
    for number, (begin, before, stop, place, first_place, num_runs) in enumerate(tree.tolist()):
        parent = int(parents[number])
        assert before == (int(lengths[parent]) if parent >= 0 else 0)
        if parent >= 0:
            assert begin == begins[parent]
        if stop:
            assert place == row and set(parents[number:stop].tolist()) == {parent}
            assert begins[stop] - begins[number] < 2 * longest
            row += before
        children = (parents == number).nonzero()[:, 0].tolist()
        leaders = [child for child in children if tree[child, 2]]
        assert num_runs == len(leaders)
        if children:
            assert leaders[0] == children[0] and first_place == tree[leaders[0], 3]
            assert [*tree[leaders, 2].tolist()] == [*leaders[1:], children[-1] + 1]
    assert row <= int(lengths.sum())


@pytest.mark.parametrize("width, options", [(16, {"sliding_window": 100}), (24, {})], ids=["window", "width"])
def test_attention_that_no_kernel_of_ours_knows_refuses_parents(width: int, options: dict[str, Any]) -> None:
    states = torch.zeros(1, 4, 3, width)
    cu_seqlens, parents = torch.tensor([0, 1, 3], dtype=torch.int32), torch.tensor([-1, 0], dtype=torch.int32)
    with pytest.raises(attention.UnsupportedAttentionError, match="go on from another"):
        packed_attention(
            torch.nn.Identity(), states, states, states, None,
            packed_layout=PackedLayout(cu_seqlens, 2, parents), **options,
        )  # fmt: skip
    with pytest.raises(attention.UnsupportedAttentionError, match="in attention mode sdpa"):
        attention_kwargs(build_model("qwen3"), "sdpa", torch.tensor([0, 1, 2]), cu_seqlens, 2, parents)


@pytest.mark.parametrize("name", [*MOE_MODELS, "qwen3"])
def test_start_up_finds_out_which_models_can_share_prompts(name: str) -> None:
    policy = prepare_policy(build_model(name), keep_routing=False, gradient_checkpointing=False)
    unable = {"gpt_oss", "deepseek_v32", "glm_moe_dsa"} | {"deepseek_v3"}  # masks, and values of another width
    assert policy.shares_prompts is (name not in unable)


def test_start_up_finds_out_that_windows_and_forgotten_parents_cannot_share(monkeypatch: pytest.MonkeyPatch) -> None:
    windowed = prepare_policy(
        build_model("mixtral", sliding_window=200), keep_routing=False, gradient_checkpointing=False
    )
    assert windowed.attention == "packed" and not windowed.shares_prompts
    model = build_model("qwen3")
    mode = choose_attention(model)
    assert check.can_share_prompts(model, mode)
    monkeypatch.setattr(PackedLayout, "_families", lambda self: [(-1, torch.arange(len(self.cu_seqlens) - 1))])
    assert not check.can_share_prompts(model, mode)
    with pytest.raises(ModelCheckError, match="packed logits differ"):
        check.check_packing(model, mode, torch.float32, share_prompts=True)
    check.check_packing(model, mode, torch.float32, share_prompts=False)


def test_a_shared_row_that_is_not_a_number_is_an_error() -> None:
    model = build_model("qwen3")
    mode = choose_attention(model)

    def spoil(_: Any, __: Any, logits: Tensor) -> Tensor:
        return logits * torch.nan if logits.shape[1] > sum(check.LENGTHS) else logits

    head: Any = model.get_output_embeddings()
    head.register_forward_hook(spoil)
    check.check_packing(model, mode, torch.float32, share_prompts=False)
    with pytest.raises(ModelCheckError, match="packed logits differ from separate ones by nan"):
        check.check_packing(model, mode, torch.float32, share_prompts=True)


def test_buckets_are_few() -> None:
    """A thousand sequences of 10 to 20 tokens must not cost a thousand calls per layer."""
    lengths = 10 + torch.arange(1000) % 11
    layout = PackedLayout(torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int(), 20)
    assert len(layout.padding.buckets) <= 2
    assert len(layout.padding.token_of_slot) < 1.5 * int(lengths.sum())


@pytest.mark.parametrize("extra", [{"s_aux": torch.zeros(4)}, {"softcap": 30.0}, {"packed_layout": None}], ids=str)
def test_packed_attention_refuses_what_it_cannot_do(extra: dict[str, Any]) -> None:
    states = torch.zeros(1, 4, 3, 8)
    options = {"packed_layout": PackedLayout(torch.tensor([0, 3], dtype=torch.int32), 3), **extra}
    with pytest.raises(attention.UnsupportedAttentionError, match="packed attention of Identity"):
        packed_attention(torch.nn.Identity(), states, states, states, None, **options)


def test_a_model_that_leaks_between_sequences_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock eager attention of GPT-OSS sees across packed sequences; left with that alone, start-up must stop."""
    monkeypatch.setattr(check, "MODES", ("packed", "eager"))
    with pytest.raises(
        ModelCheckError, match=r"eager: logits differ by .* choose another|choose another .*eager: logits"
    ):
        choose_attention(build_model("gpt_oss"))


def test_a_head_that_is_not_the_logits_is_refused() -> None:
    """Granite divides its logits after the head, so log-probabilities taken in the head would be wrong."""
    from transformers import GraniteConfig, GraniteForCausalLM

    config = GraniteConfig(
        vocab_size=98,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        logits_scaling=8.0,
    )
    with pytest.raises(ModelCheckError, match="head are not those of its logits"):
        prepare_policy(GraniteForCausalLM(config), keep_routing=False, gradient_checkpointing=False)


def test_load_policy_reads_a_folder_and_turns_noise_off(tmp_path: Path) -> None:
    build_model("mixtral", attention_dropout=0.3, router_jitter_noise=0.1).bfloat16().save_pretrained(tmp_path)
    policy = load_policy(tmp_path, keep_routing=True, gradient_checkpointing=True)
    assert {p.dtype for p in policy.module.parameters()} == {torch.float32}
    assert policy.routing is not None and policy.module.is_gradient_checkpointing
    batch = pack_by_hand(random_sequences([(4, 5), (2, 9)], vocab_size=VOCAB_SIZE))
    first, second = (token_logprobs(policy, batch).logprobs for _ in range(2))
    assert torch.equal(first, second)


def test_the_reference_is_frozen_and_routes_by_itself(tmp_path: Path) -> None:
    build_model("qwen3_moe").save_pretrained(tmp_path)
    policy = load_policy(tmp_path, keep_routing=False, gradient_checkpointing=True, trainable=False)
    assert policy.routing is None and not policy.module.training
    assert not any(p.requires_grad for p in policy.module.parameters())


def test_indexers_are_frozen() -> None:
    policy = prepare_policy(build_model("deepseek_v32"), keep_routing=True, gradient_checkpointing=False)
    frozen = {name for name, p in policy.module.named_parameters() if not p.requires_grad}
    assert frozen and all(".indexer." in name for name in frozen)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one, as a sharded model needs."""
    place = tmp_path_factory.mktemp("rendezvous") / "store"
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def policy_of(name: str, **overrides: Any) -> PolicyModel:
    return prepare_policy(build_model(name, **overrides), keep_routing=True, gradient_checkpointing=True)


def backward(policy: PolicyModel) -> tuple[Tensor, dict[str, Tensor]]:
    batch = pack_by_hand(random_sequences([(5, 9), (3, 6)], vocab_size=VOCAB_SIZE, routes=(3, 16, 4)))
    loss = -(batch.loss_weights * token_logprobs(policy, batch).logprobs).sum()
    loss.backward()
    reshard(policy)
    named = policy.module.named_parameters()
    return loss.detach(), {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for name, p in named if p.grad is not None
    }


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_sharding_changes_no_number(one_rank: None, name: str, tied: bool) -> None:
    """FSDP2 wiring on one rank (asked for as if there were more): replay, checkpointing, head and tied weights
    included.
    """
    plain, sharded = policy_of(name, tie_word_embeddings=tied), policy_of(name, tie_word_embeddings=tied)
    shard_policy(plain, compute_dtype=torch.float32, world_size=1)
    assert not any(isinstance(p, DTensor) for p in plain.module.parameters())
    shard_policy(sharded, compute_dtype=torch.float32, world_size=2)
    assert all(isinstance(p, DTensor) for p in sharded.module.parameters())
    (want_loss, want), (loss, got) = backward(plain), backward(sharded)
    assert torch.equal(loss, want_loss) and got.keys() == want.keys()
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=0, atol=1e-7)


def test_half_precision_keeps_float32_masters_and_gradients(one_rank: None) -> None:
    plain, sharded = policy_of("qwen3_moe"), policy_of("qwen3_moe")
    shard_policy(sharded, compute_dtype=torch.bfloat16, world_size=1)
    (want_loss, _), (loss, got) = backward(plain), backward(sharded)
    assert {p.dtype for p in sharded.module.parameters()} == {g.dtype for g in got.values()} == {torch.float32}
    assert 0 < abs(float(loss - want_loss)) < 0.02


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "mixtral", "gpt_oss"])
def test_checkpoint_tensors_equal_the_saved_checkpoint(one_rank: None, tmp_path: Path, name: str, tied: bool) -> None:
    build_model(name, tie_word_embeddings=tied).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    policy = load_policy(tmp_path, keep_routing=True, gradient_checkpointing=False)
    shard_policy(policy, compute_dtype=torch.float32, world_size=2)
    streamed = dict(checkpoint_tensors(policy, torch.float32))
    assert streamed.keys() == saved.keys()
    for key, tensor in saved.items():
        assert torch.equal(streamed[key], tensor) and streamed[key].is_contiguous(), key
    assert ("lm_head.weight" in streamed) is not tied


def test_checkpoint_tensors_cast_weights_but_not_the_routing_bias() -> None:
    streamed = dict(checkpoint_tensors(policy_of("deepseek_v3"), torch.bfloat16))
    biases = {key for key in streamed if key.endswith("e_score_correction_bias")}
    assert len(biases) == 2 and {streamed[key].dtype for key in biases} == {torch.float32}
    assert {tensor.dtype for key, tensor in streamed.items() if key not in biases} == {torch.bfloat16}
