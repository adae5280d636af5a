"""Everything that can be wrong with a run is found before it starts, and named with its remedy."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpo.commands import plan
from grpo.config import load_config
from grpo.preflight import Preflight, PreflightError, check, domain_weights, ensure_model
from tests.test_config import MINIMAL
from tests.tiny_models import VOCAB_SIZE, make_qwen3, make_qwen3_moe

RECIPE = """
def build(path):
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")

def fail(path):
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    raise RuntimeError("no disk left")

def nothing(path):
    path.mkdir(parents=True)
"""


def save_tokenizer(folder: Path) -> None:
    """One token per character."""
    characters = ["<pad>", "<eos>", "<bos>", *map(chr, range(32, 127)), "\n"]
    assert len(characters) == VOCAB_SIZE
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.Fuse()  # pyright: ignore[reportAttributeAccessIssue]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<pad>")
    fast.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file with a tiny model, tasks and a recipe beside it."""
    folder = tmp_path_factory.mktemp("run")
    for make, name in ((make_qwen3_moe, "base"), (make_qwen3, "dense")):
        make(folder / name)
        save_tokenizer(folder / name)
    rows = [{"prompt": f"{i}+1=", "answer": i + 1, "domain": "math" if i % 2 else "sums"} for i in range(20)]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.py").write_text(RECIPE)
    (folder / "train.toml").write_text(MINIMAL)
    return folder


def check_with(folder: Path, *overrides: str) -> Preflight:
    small = ("tasks.max_prompt_tokens=64", "sampling.max_new_tokens=32")
    return check(load_config(folder / "train.toml", (*small, *overrides)), folder / "train.toml")


def test_everything_is_loaded(folder: Path) -> None:
    found = check_with(folder, "tasks.eval=tasks.jsonl")
    assert len(found.tasks) == len(found.eval_tasks) == 20
    assert found.is_moe and found.model_path == str(folder / "base")
    assert set(found.rewards) == set(found.stop_token_ids) == {"math", "sums"}
    assert found.stop_token_ids["math"] == (1,)
    token_ids = found.tokenizer.encode(found.tasks[3])
    assert token_ids.tolist() == [ord(c) - 32 + 3 for c in "3+1="] and token_ids.dtype == "int32"
    assert found.tokenizer.decode([token_ids]) == ["3+1="] and found.tokenizer.vocab_size == VOCAB_SIZE


def test_dense_model_is_told_from_moe(folder: Path) -> None:
    assert not check_with(folder, "model.path=dense").is_moe


def test_stop_strings_become_tokens_per_domain(folder: Path) -> None:
    found = check_with(folder, 'sampling.stop=["="]')
    assert found.stop_token_ids["math"] == (1, ord("=") - 32 + 3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.path=./none",), r"model\.path: no folder '\./none'"),
        (("model.path=.",), r"holds no config\.json"),
        (("tasks.train=none.jsonl",), r"no file 'none\.jsonl'"),
        (("tasks.prompt_key=question",), r"tasks\.jsonl:1: no column 'question'"),
        (("run.eval_every=5",), r"run\.eval_every = 5 but there are no held-out tasks"),
        (("domains.maths.beta=0.1",), r"domains\.maths: no task has this domain \(domains of the tasks: math, sums\)"),
        (
            ("tasks.max_prompt_tokens=4",),
            r"task tasks\.jsonl:11: its prompt has 5 tokens, tasks\.max_prompt_tokens is 4",
        ),
        (("sampling.max_new_tokens=500",), r"= 564 is more than the model's context of 512 tokens"),
        (('sampling.stop=["ab"]',), r"sampling\.stop: 'ab' is 2 tokens"),
        (('sampling.stop=["é"]',), r"sampling\.stop: 'é'"),
        (("tasks.system_prompt=be brief",), r"has no chat template"),
        (
            ("rollout.tensor_parallel_size=3",),
            r"tensor_parallel_size = 3 does not divide the model's 4 attention heads",
        ),
        (("model.path=new", "model.recipe=./recipe.py:bild"), r"model\.recipe .*has no 'bild'; it has build"),
        (("model.path=new", "model.recipe=./recipe.py:nothing"), r"holds no config\.json"),
    ],
)
def test_mistakes_are_named_with_a_remedy(folder: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(PreflightError, match=message):
        check_with(folder, *overrides)


def test_a_reward_that_cannot_be_imported(folder: Path, tmp_path: Path) -> None:
    run_file = folder / "bad_reward.toml"
    run_file.write_text(MINIMAL.replace("rewards.exact_match:exact_match", "no_such_module:reward"))
    with pytest.raises(PreflightError, match=r"rewards\.fn 'no_such_module:reward': no module"):
        check(load_config(run_file), run_file)


def test_a_mistake_is_found_in_seconds(folder: Path) -> None:
    started = time.perf_counter()
    with pytest.raises(PreflightError):
        check_with(folder, 'sampling.stop=["ab"]')
    assert time.perf_counter() - started < 5


def test_recipe_makes_a_missing_model_once(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.py").write_text(RECIPE)
    config = load_config(folder / "train.toml", ("model.path=made", "model.recipe=./recipe.py:build"))
    said: list[str] = []
    for _ in range(2):
        assert ensure_model(config, tmp_path / "train.toml", say=said.append) == str(tmp_path / "made")
    assert len(said) == 1 and "building the base model" in said[0]


def test_half_a_model_is_never_used(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.py").write_text(RECIPE)
    config = load_config(folder / "train.toml", ("model.path=made", "model.recipe=./recipe.py:fail"))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no disk left"):
            ensure_model(config, tmp_path / "train.toml", say=lambda text: None)
        assert not (tmp_path / "made").exists()


def test_domain_weights_are_those_that_are_set(folder: Path) -> None:
    assert domain_weights(load_config(folder / "train.toml", ("domains.math.beta=0.1",))) is None
    assert domain_weights(load_config(folder / "train.toml", ("domains.math.weight=2",))) == {"math": 2.0}


def test_plan_counts_parameters_tokens_and_records(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    settings = (
        "sampling.top_p=0.9",
        "tasks.max_prompt_tokens=64",
        "sampling.max_new_tokens=32",
        "rollout.dtype=float32",
    )
    config = load_config(folder / "train.toml", settings)
    preflight = check(config, folder / "train.toml")
    made = plan.make_plan(config, preflight)
    rows = {name: text for section in made for name, text in section.rows}
    exact = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder / "base").parameters())
    assert rows["parameters"] == f"{exact:,}"
    assert rows["tokens per step"].startswith(f"at most {32 * 8 * 96:,} (96 per sample)")
    assert rows["expert routes"] == f"{3 * 2} B per token"
    assert rows["KV cache"].endswith(f"{2 * 2 * 32 * 3 * 4:,} B per token")
    assert rows["reference"] == "none (every beta is 0)"
    assert rows["host memory"] == f"{exact * 4 / 2**20:.3g} MiB where the first rank reads the model"
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(plan.render(made))
    assert "domain sums" in console.export_text()
