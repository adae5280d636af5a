"""The doctor's findings."""

from __future__ import annotations

import io
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from rich.console import Console

from grpo.commands import doctor
from grpo.commands.doctor import Check, check_pin, check_plugin, check_run_file, check_space, run_doctor
from tests.test_config import MINIMAL


def test_versions_are_compared_without_their_local_label(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.metadata, "version", lambda name: {"torch": "2.13.0+cpu", "ray": "2.59.1"}[name])
    assert check_pin(Requirement("torch==2.13.0"), "cpu") == Check("torch", "ok", "2.13.0+cpu")
    wrong = check_pin(Requirement("ray[default]==2.60.0"), "cpu")
    assert (wrong.verdict, wrong.found) == ("problem", "2.59.1, want ==2.60.0")
    assert "pip install 'ray==2.60.0'" in wrong.remedy


def test_missing_package_is_a_problem() -> None:
    missing = check_pin(Requirement("no-such-distribution==1"), "gpu")
    assert missing.verdict == "problem" and "not installed" in missing.found and missing.remedy


def test_pins_are_those_of_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    requirements = ["numpy>=1.0", 'numpy>=999; extra == "gpu"', 'no-such-distribution==1; extra == "dev"', "rich"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: requirements)
    assert [check.verdict for check in doctor.check_pins("cpu")] == ["ok"]
    assert [check.verdict for check in doctor.check_pins("gpu")] == ["ok", "problem"]


def test_plugin_that_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = metadata.EntryPoint("keel", "rollout.vllm_plugin:register", doctor.PLUGIN_GROUP)
    monkeypatch.setattr(doctor.metadata, "entry_points", lambda group: [entry])
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert check_plugin().verdict == "ok"
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert check_plugin().verdict == "problem" and "add keel" in check_plugin().remedy
    monkeypatch.setattr(doctor.metadata, "entry_points", lambda group: [])
    assert "no entry point" in check_plugin().found


def test_space() -> None:
    assert check_space("disk", 6 * 2**30, 5.0, "free some").verdict == "ok"
    assert check_space("disk", 4 * 2**30, 5.0, "free some") == Check(
        "disk", "problem", "4.00 GiB free, want 5", "free some"
    )
    assert check_space("shm", 0, 1.0, "more", blocks=False).verdict == "warning"


def test_run_file_with_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "train.toml").write_text(MINIMAL)
    found = check_run_file(tmp_path / "train.toml", ("learner.lrr=1",))
    assert found.verdict == "problem" and "did you mean 'lr'?" in found.found


def test_answer_is_yes_only_without_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [Check("a", "ok", "1"), Check("[b]", "warning", "2", "[bold] remedy")]
    stream = io.StringIO()
    monkeypatch.setattr(doctor, "all_checks", lambda: iter(checks))
    assert run_doctor(console=Console(file=stream, width=100))
    assert "[b]" in stream.getvalue() and "[bold] remedy" in stream.getvalue()
    checks.append(Check("c", "problem", "3"))
    assert not run_doctor(console=Console(file=stream, width=100))


def test_this_machine_can_be_examined() -> None:
    names = [check.name for check in doctor.all_checks()]
    assert {"python", "GPUs", "vLLM plugin", "cores", "memory"} <= set(names)
