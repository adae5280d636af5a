"""The run file's door: strict, small, and clear about what is wrong."""

from __future__ import annotations

import re
import typing
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from grpo.config import ConfigError, TrainConfig, load_config

MINIMAL = """
[run]
name = "r"
steps = 3
[model]
path = "base"
[tasks]
train = "tasks.jsonl"
[[rewards]]
fn = "rewards.exact_match:exact_match"
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "train.toml"
    path.write_text(MINIMAL)
    return path


def models_in(annotation: object) -> list[type[BaseModel]]:
    """The config classes that a field's type mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in models_in(part)]


def all_models(model: type[BaseModel]) -> set[type[BaseModel]]:
    found = {model}
    for field in model.model_fields.values():
        for inner in models_in(field.annotation):
            found |= all_models(inner)
    return found


def test_minimal_run_file_loads(run_file: Path) -> None:
    config = load_config(run_file)
    assert config.run.steps == 3 and config.run_dir == Path("runs/r")


def test_every_model_is_frozen_and_strict() -> None:
    models = all_models(TrainConfig)
    assert len(models) >= 12
    for model in models:
        assert model.model_config.get("frozen") and model.model_config.get("extra") == "forbid", model.__name__


def test_fewer_than_a_hundred_keys() -> None:
    leaves = [
        f"{model.__name__}.{name}"
        for model in all_models(TrainConfig)
        for name, field in model.model_fields.items()
        if not models_in(field.annotation)
    ]
    assert len(leaves) < 100


def test_overrides_are_toml_values_or_text(run_file: Path) -> None:
    config = load_config(
        run_file, ("learner.lr=1e-4", "sampling.stop=['.']", "model.path=other", "domains.math.beta=0.5")
    )
    assert config.learner.lr == 1e-4
    assert config.sampling.stop == (".",)
    assert config.model.path == "other"
    assert config.stability_of("math").beta == 0.5 and config.stability_of("code").beta == 0.0


def test_delta_can_be_switched_off_by_file_and_override(run_file: Path) -> None:
    assert load_config(run_file).stability.delta == 0.5
    assert load_config(run_file, ("stability.delta=off",)).stability.delta is None
    assert load_config(run_file, ('stability.delta="off"',)).stability.delta is None
    config = load_config(run_file, ("domains.math.delta=off", "domains.code.delta=0.1"))
    assert [config.stability_of(name).delta for name in ("math", "code", "logic")] == [None, 0.1, 0.5]


def test_resolved_config_survives_json(run_file: Path) -> None:
    config = load_config(run_file, ("stability.delta=off", "domains.math.delta=off", "domains.math.beta=0.5"))
    assert TrainConfig.model_validate_json(config.model_dump_json()) == config


SLEEPING_ENGINE = ("cluster.layout=colocated", "rollout.sleep_while_training=true")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("learner.lrr=1",), r"learner\.lrr: unknown key; did you mean 'lr'"),
        (("lerner.lr=1",), r"lerner: unknown key; did you mean 'learner'"),
        (("domains.math.betta=1",), r"domains\.math\.betta: unknown key; did you mean 'beta'"),
        (("learner.lr=fast",), r"learner\.lr: .*number.*'fast'"),
        (("run.steps=0",), r"run\.steps: .*greater than or equal to 1 \(got 0\)"),
        (("grpo.updates_per_batch=5",), r"updates_per_batch = 5 must divide grpo\.prompts_per_step = 32"),
        (("learner.max_tokens_per_microbatch=100",), r"cannot hold the longest sequence: .*= 1280"),
        (("sampling.top_p=0.9", "stability.keep_sampling_mask=false"), r"turn keep_sampling_mask on"),
        (("domains.m.top_k=5", "stability.keep_sampling_mask=false"), r"allow_biased_truncation"),
        (("cluster.layout=colocated", "rollout.workers=2"), r"make the first two equal"),
        (("rollout.sleep_while_training=true",), r"set cluster\.layout = colocated"),
        (
            (*SLEEPING_ENGINE, "grpo.max_off_policy_steps=1"),
            r"grpo\.max_off_policy_steps = 1 asks for both at once",
        ),
        (("lr=1",), r"override 'lr=1': write it as table\.key=value"),
        (("learner.lr",), r"write it as table\.key=value"),
        (("run.name.x=1",), r"'name' is not a table"),
    ],
)
def test_mistakes_are_named_with_a_remedy(run_file: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(run_file, overrides)
    assert re.search(message, str(error.value)), str(error.value)


def test_truncation_is_allowed_when_asked_for(run_file: Path) -> None:
    told = ("sampling.top_p=0.9", "stability.keep_sampling_mask=false", "stability.allow_biased_truncation=true")
    assert load_config(run_file, told).truncates


def test_engines_may_sleep_beside_a_synchronous_learner(run_file: Path) -> None:
    assert load_config(run_file, SLEEPING_ENGINE).rollout.sleep_while_training


def test_all_mistakes_are_told_at_once(run_file: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(run_file, ("learner.lr=-1", "run.steps=0"))
    assert len(str(error.value).splitlines()) == 2


def test_missing_file_and_broken_toml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such run file"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "broken.toml").write_text("[run\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(tmp_path / "broken.toml")


def test_configs_cannot_be_changed(run_file: Path) -> None:
    config = load_config(run_file)
    with pytest.raises(ValidationError, match="frozen"):
        config.run.steps = 4  # pyright: ignore[reportAttributeAccessIssue]
