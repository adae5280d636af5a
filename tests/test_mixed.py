"""The example with three domains at once: each domain's rewards, settings and curves, in one real run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from grpo.config import load_config
from grpo.records.metrics import read_metrics, read_rows
from grpo.train import train

MIXED = Path(__file__).parents[1] / "examples" / "mixed"
REWARDS = {"arithmetic": {"exact_match"}, "code": {"code_tests"}, "text": {"judged_by_rules", "is_sentence"}}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_domains_train_in_one_run(ray_address, tmp_path):
    overrides = {
        "run.steps": 6,
        "run.eval_every": 6,
        "run.output_dir": f'"{tmp_path}"',
        "model.path": f'"{tmp_path / "base"}"',
        "debug.samples_per_step": 1000,
        "cluster.address": f'"{ray_address}"',
    }
    run_file = MIXED / "train.toml"
    config = load_config(run_file, tuple(f"{key}={value}" for key, value in overrides.items()))
    rows = read_metrics(train(config, run_file=run_file))
    for row in rows[1:]:
        assert row["train/dropped_samples"] == 0
        for domain in REWARDS:
            assert 0 <= row[f"train/reward/{domain}"] <= 1
    assert any(row.get("train/kl/code") is not None for row in rows[1:])
    for domain in REWARDS:
        assert rows[-1][f"eval/accuracy/{domain}"] >= rows[0][f"eval/accuracy/{domain}"] - 0.15
    assert rows[-1]["eval/accuracy"] > rows[0]["eval/accuracy"] + 0.1
    samples = read_rows(config.run_dir / "samples.jsonl")
    groups = Counter(domain for domain, _ in {(s["domain"], s["group"]) for s in samples})
    assert groups["arithmetic"] == pytest.approx(72, abs=3) and groups["code"] == pytest.approx(36, abs=3)
    for sample in samples:
        assert {name.partition("/")[0] for name in sample["breakdown"]} == REWARDS[sample["domain"]]
        longest = config.sampling_of(sample["domain"]).max_new_tokens
        assert sample["num_tokens"] <= longest
