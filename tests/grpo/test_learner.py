"""One learner process: packing does not change gradients, several updates, save and load, streamed weights, export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from grpo.batch import TrainBatch, Update, pack, plan_updates
from grpo.config import LearnerConfig
from grpo.learner import Learner, LearnerError, LearnerSpec
from grpo.loss import sft_loss
from grpo.replay import dump_step, replay_file
from grpo.sft import fine_tune, supervised_sample
from rollout.weight_sync import unpack_bucket
from tests.samples import make_group, make_samples
from tests.tiny_models import make_qwen3_moe

ROUTES = (3, 2, 8)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> Path:
    path = make_qwen3_moe(tmp_path_factory.mktemp("model") / "moe")
    vocab = {f"<{i}>": i for i in range(99)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<0>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<1>").save_pretrained(path)
    return path


def make_spec(model_path: Path, **changes) -> LearnerSpec:
    config = LearnerConfig(lr=1e-3, dtype="float32", gradient_checkpointing=False, max_grad_norm=100.0)
    spec = LearnerSpec(str(model_path), config, True, True, "float32", total_updates=10)
    return replace(spec, **changes)


def batches_of(update: Update) -> list[TrainBatch]:
    return [pack(microbatch) for rank in update.ranks for microbatch in rank]


class PackedInTurn(Sequence[TrainBatch]):
    """Micro-batches that are packed when they are asked for; notes for which."""

    def __init__(self, update: Update) -> None:
        self._microbatches = [microbatch for rank in update.ranks for microbatch in rank]
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self._microbatches)

    def __getitem__(self, index: int) -> TrainBatch:
        self.asked.append(index)
        return pack(self._microbatches[index])


def gradients(learner: Learner) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in learner.policy.module.named_parameters() if p.grad is not None}


def test_micro_batches_may_be_packed_in_turn(model_path):
    samples = make_samples(1, num_groups=4, routes=ROUTES)
    updates = plan_updates(samples, num_updates=2, max_tokens=40)
    at_once, in_turn = Learner(make_spec(model_path)), Learner(make_spec(model_path))
    lazy = [PackedInTurn(update) for update in updates]
    want, got = at_once.train([batches_of(update) for update in updates]), in_turn.train(lazy)
    assert (got.losses, got.grad_norms, got.num_tokens) == (want.losses, want.grad_norms, want.num_tokens)
    assert got.stats.moments == want.stats.moments and want.num_tokens == sum(sample.num_tokens for sample in samples)
    for batches in lazy:  # past its end, like any sequence that is iterated over
        assert len(batches) > 1 and batches.asked == [*range(len(batches) + 1)]


def test_any_packing_gives_the_same_loss_and_gradients(model_path):
    samples = make_samples(1, num_groups=4, routes=ROUTES)
    results = []
    for max_tokens in (10_000, 40, 20):
        learner = Learner(make_spec(model_path))
        (update,) = plan_updates(samples, max_tokens=max_tokens)
        result = learner.train([batches_of(update)])
        results.append((result.losses[0], result.grad_norms[0], gradients(learner), len(update.ranks[0])))
    assert results[0][3] == 1 and results[2][3] > 5
    for loss, norm, grads, _ in results[1:]:
        assert loss == pytest.approx(results[0][0], abs=1e-6)
        assert norm == pytest.approx(results[0][1], rel=1e-5)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, results[0][2][name], atol=2e-6, rtol=1e-4)


def grouped_samples(routes=ROUTES):
    """Three groups with prompts of 40, 5 and 1 tokens; one sample's prompt was routed differently half-way."""
    rng = np.random.default_rng(0)
    sizes = ((40, [5, 9, 1, 12]), (5, [3, 3, 8, 4]), (1, [6, 2]))
    groups = [make_group(rng, i, num_prompt=p, num_sampled=n, routes=routes) for i, (p, n) in enumerate(sizes)]
    if routes is not None:
        (segment,) = groups[0][1].segments
        recorded = segment.replay.routed_experts
        assert recorded is not None
        recorded[20] = (recorded[20] + 1) % 8
        groups[0][1] = replace(groups[0][1], segments=(replace(segment, num_shareable=20),))
    return [sample for group in groups for sample in group]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_shared_prompt_changes_no_loss_and_no_gradient(model_path, dtype):
    """With a reference and gradient checkpointing, in one micro-batch and in several."""
    config = LearnerConfig(lr=1e-3, dtype=dtype, gradient_checkpointing=True, max_grad_norm=100.0)
    samples, results = grouped_samples(), []
    for share, max_tokens in ((False, 1000), (True, 1000), (True, 55)):
        learner = Learner(make_spec(model_path, config=config))
        assert learner.shares_prompts
        (update,) = plan_updates(samples, max_tokens=max_tokens, share_prompts=share)
        batches = [pack(m, share_prompts=share) for m in update.ranks[0]]
        assert all(len(batch.token_ids) <= max_tokens for batch in batches)
        result = learner.train([batches])
        results.append((result, gradients(learner), len(update.ranks[0])))
    (whole, want, _), (shared, got, num_rows), (split, got_split, num_split_rows) = results
    assert num_rows == 1 < num_split_rows
    assert whole.num_tokens == whole.num_sample_tokens == shared.num_sample_tokens == split.num_sample_tokens
    assert shared.num_tokens < split.num_tokens < whole.num_tokens
    rtol = 1e-4 if dtype == "float32" else 0.05
    for result, grads in ((shared, got), (split, got_split)):
        assert result.losses[0] == pytest.approx(whole.losses[0], abs=1e-6 if dtype == "float32" else 2e-3)
        for name, grad in grads.items():
            assert float((grad - want[name]).norm()) <= rtol * float(want[name].norm()), name


def test_a_recorded_step_with_shared_prompts_replays_bit_identically(model_path, tmp_path):
    learner = Learner(make_spec(model_path))
    (update,) = plan_updates(grouped_samples(), max_tokens=90, share_prompts=True)
    updates = [[pack(microbatch, share_prompts=True) for microbatch in update.ranks[0]]]
    assert any(batch.parents is not None for batch in updates[0])
    dump_step(learner, updates, tmp_path / "step-000001")
    assert replay_file(tmp_path / "step-000001")["verdict"] == "bit-identical"


def test_updates_are_applied_one_after_another_and_the_version_counts_steps(model_path):
    samples = make_samples(2, num_groups=4, routes=ROUTES)
    together, apart = Learner(make_spec(model_path)), Learner(make_spec(model_path))
    updates = [batches_of(u) for u in plan_updates(samples, num_updates=2, max_tokens=1000)]
    both = together.train(updates)
    one_by_one = [apart.train([update]) for update in updates]
    assert both.losses == tuple(r.losses[0] for r in one_by_one)
    assert together.policy_version == 1 and apart.policy_version == 2
    for a, b in zip(together.policy.module.parameters(), apart.policy.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_saved_learner_continues_bit_equal(model_path, tmp_path):
    steps = [[batches_of(u) for u in plan_updates(make_samples(s, routes=ROUTES), max_tokens=64)] for s in range(4)]
    straight, first = Learner(make_spec(model_path)), Learner(make_spec(model_path))
    for updates in steps[:2]:
        straight.train(updates)
        first.train(updates)
    first.save(tmp_path / "state")
    resumed = Learner(make_spec(model_path))
    resumed.load(tmp_path / "state")
    for updates in steps[2:]:
        assert straight.train(updates).losses == resumed.train(updates).losses
    for a, b in zip(straight.policy.module.parameters(), resumed.policy.module.parameters(), strict=True):
        assert torch.equal(a, b)
    assert (resumed.policy_version, resumed.num_updates) == (straight.policy_version, straight.num_updates)


def test_a_half_precision_learner_trains_sends_and_saves_its_float32_masters(model_path, tmp_path):
    config = LearnerConfig(lr=1e-3, dtype="bfloat16", gradient_checkpointing=True)
    learner, resumed = (Learner(make_spec(model_path, config=config)) for _ in range(2))
    before = [p.clone() for p in learner.policy.module.parameters()]
    updates = [batches_of(u) for u in plan_updates(make_samples(3, routes=ROUTES), max_tokens=64)]
    learner.train(updates)
    learner.score(updates[0])
    masters = dict(learner.policy.module.named_parameters())
    assert {p.dtype for p in masters.values()} == {torch.float32}
    assert not any(torch.equal(p, old) for p, old in zip(masters.values(), before, strict=True))
    sent = {n: t.clone() for b in learner.weight_buckets(1 << 30) for n, t in unpack_bucket(b)}
    assert torch.equal(sent["lm_head.weight"], masters["lm_head.weight"])
    learner.save(tmp_path / "state")
    resumed.load(tmp_path / "state")
    assert learner.train(updates).losses == resumed.train(updates).losses
    for a, b in zip(learner.policy.module.parameters(), resumed.policy.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_streamed_weights_are_the_checkpoint_and_export_loads_in_transformers(model_path, tmp_path):
    learner = Learner(make_spec(model_path))
    sent = {n: t.clone() for b in learner.weight_buckets(1 << 16) for n, t in unpack_bucket(b)}
    saved = load_file(model_path / "model.safetensors")
    assert sent.keys() == saved.keys()
    assert all(torch.equal(sent[name], saved[name]) for name in saved)
    learner.train([batches_of(u) for u in plan_updates(make_samples(0, routes=ROUTES), max_tokens=1000)])
    learner.export(tmp_path / "model")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for (name, a), b in zip(exported.named_parameters(), learner.policy.module.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert (tmp_path / "model" / "tokenizer.json").exists()


def test_sft_raises_the_likelihood_of_its_tokens(model_path):
    learner = Learner(make_spec(model_path, needs_reference=False))
    batches = batches_of(plan_updates(make_samples(7, num_groups=2), max_tokens=1000)[0])
    before = learner.score(batches).mean()
    for _ in range(5):
        learner.train([batches], sft_loss)
    assert learner.score(batches).mean() > before + 0.05


def test_fine_tuning_shares_prompts_and_learns_the_same(model_path):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 99, n).astype(np.int32) for n in (20, 7)]
    pairs = [(prompts[i % 2], rng.integers(3, 99, 1 + i).astype(np.int32)) for i in range(6)]
    shared = Learner(make_spec(model_path, needs_reference=False))
    losses = fine_tune(shared, [pairs, pairs])
    alone = Learner(make_spec(model_path, needs_reference=False))
    samples = [supervised_sample(i, *pair) for i, pair in enumerate(pairs)]
    (update,) = plan_updates(samples, max_tokens=1000, aggregation="token")
    want = [alone.train([batches_of(update)], sft_loss) for _ in range(2)]
    assert losses == pytest.approx([result.losses[0] for result in want], abs=1e-5)
    assert [result.num_tokens for result in want] == [sum(len(p) + len(c) for p, c in pairs)] * 2


def test_a_gradient_that_is_not_finite_stops_before_any_weight_changes(model_path):
    learner = Learner(make_spec(model_path))
    before = [p.clone() for p in learner.policy.module.parameters()]
    (batch,) = batches_of(plan_updates(make_samples(1, num_groups=1, routes=ROUTES), max_tokens=1000)[0])
    with pytest.raises(LearnerError, match="gradient norm is nan"):
        learner.train([[replace(batch, advantages=batch.advantages * float("nan"))]])
    assert all(torch.equal(a, b) for a, b in zip(before, learner.policy.module.parameters(), strict=True))


def test_a_recorded_step_replays_bit_identically_and_a_changed_one_does_not(model_path, tmp_path):
    learner = Learner(make_spec(model_path))
    updates = [batches_of(u) for u in plan_updates(make_samples(1, routes=ROUTES), num_updates=2, max_tokens=64)]
    dump_step(learner, updates, tmp_path / "step-000001")
    assert replay_file(tmp_path / "step-000001")["verdict"] == "bit-identical"
    batches = torch.load(tmp_path / "step-000001" / "rank-0.pt", weights_only=True)
    batches[0][0]["routed_experts"] = (batches[0][0]["routed_experts"] + 1) % 8
    torch.save(batches, tmp_path / "step-000001" / "rank-0.pt")
    assert replay_file(tmp_path / "step-000001" / "rank-0.pt")["verdict"] == "DIFFERENT"
