"""`keel check-reward` finds each breach of the contract, and finds none where there is none."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from grpo import cli

HOSTILE = "tests.rewards.hostile_rewards"


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    path = tmp_path / "tasks.jsonl"
    rows = [{"id": f"t{i}", "prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def check(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["keel", "check-reward", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    return int(exit_info.value.code or 0)


def completions_of(tasks: Path, *texts: str) -> Path:
    path = tasks.parent / "completions.jsonl"
    path.write_text("".join(json.dumps({"id": "t0", "completion": text}) + "\n" for text in texts))
    return path


def test_a_sound_reward_passes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tasks: Path
) -> None:
    assert check(monkeypatch, "rewards.exact_match:exact_match", "--tasks", tasks, "--kwargs", r"extract=\d+") == 0
    shown = capsys.readouterr().out
    assert "keeps the contract" in shown and "p99" in shown and "9 completions" in shown


@pytest.mark.parametrize(
    ("fn", "text", "violation"),
    [
        ("misbehave", "raise", "KeyError"),
        ("misbehave", "text", "returned str, not a number"),
        ("misbehave", "nan", "not finite"),
        ("misbehave", "exit", "exited with status 3"),
        ("misbehave", "crash", "SIGSEGV"),
        ("misbehave", "hang", "timeout"),
        ("mutating", "ok", "changes its task or answer"),
        ("counting", "ok", "differs from one call to the next"),
        ("slow", "ok", "too slow"),
    ],
)
def test_each_breach_is_named(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tasks: Path,
    fn: str,
    text: str,
    violation: str,
) -> None:
    timeout = 0.5 if violation in ("timeout", "too slow") else 10
    given = ("--tasks", tasks, "--completions", completions_of(tasks, text), "--timeout", timeout)
    assert check(monkeypatch, f"{HOSTILE}:{fn}", *given) == 1
    shown = capsys.readouterr().out
    assert "breaks the contract" in shown and violation in shown and "t0" in shown


def test_a_reward_may_claim_to_vary_and_to_abstain(monkeypatch: pytest.MonkeyPatch, tasks: Path) -> None:
    given = ("--tasks", tasks, "--completions", completions_of(tasks, "ok"))
    assert check(monkeypatch, f"{HOSTILE}:counting", *given, "--may-vary") == 0
    given = ("--tasks", tasks, "--completions", completions_of(tasks, "abstain"))
    assert check(monkeypatch, f"{HOSTILE}:misbehave", *given) == 0


def test_a_group_reward_gets_a_tasks_completions_together(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tasks: Path
) -> None:
    given = ("--tasks", tasks, "--completions", completions_of(tasks, "abcd" * 4, "abcd" * 8))
    assert check(monkeypatch, f"{HOSTILE}:rank", *given) == 0
    assert "longest 8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--kwargs", "extrat=1"), "rewards.kwargs.extrat: unknown argument; it takes extract"),
        (("--kwargs", "extract"), "write it as key=value"),
        (("--completions", "none.jsonl"), "no file none.jsonl"),
    ],
)
def test_mistakes_of_the_user_are_one_message(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tasks: Path,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    assert check(monkeypatch, "rewards.exact_match:exact_match", "--tasks", tasks, *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_completion_for_no_task_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tasks: Path
) -> None:
    path = tasks.parent / "stray.jsonl"
    path.write_text(json.dumps({"prompt": "no such task", "completion": "x"}) + "\n")
    assert check(monkeypatch, "rewards.exact_match:exact_match", "--tasks", tasks, "--completions", path) == 2
    assert "row 1: want" in capsys.readouterr().err
