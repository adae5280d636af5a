"""The front door: light, and clear when something is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from grpo import cli
from grpo.config import load_config
from grpo.records.run_folder import begin_run, load_run
from tests.test_config import MINIMAL

HEAVY = ("torch", "ray", "vllm", "transformers", "pydantic", "numpy", "datasets")


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Exit code of `keel ARGUMENTS` in this process."""
    monkeypatch.setattr(sys, "argv", ["keel", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    return int(exit_info.value.code or 0)


def test_help_needs_nothing_heavy() -> None:
    code = f"""
import sys
from grpo.cli import main
sys.argv = ["keel", "--help"]
try:
    main()
except SystemExit:
    pass
print("loaded:", [name for name in {HEAVY} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "loaded: []" in done.stdout
    for command in ("train", "submit", "follow", "stop", "eval", "report", "doctor", "replay"):
        assert command in done.stdout


def test_missing_run_file_is_one_red_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(monkeypatch, "train", "none.toml") == 2
    captured = capsys.readouterr()
    assert captured.err == "error: none.toml: no such run file\n" and captured.out == ""


def test_unknown_key_exits_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run_file = tmp_path / "train.toml"
    run_file.write_text(MINIMAL)
    assert run_main(monkeypatch, "train", run_file, "-o", "learner.lrr=1") == 2
    assert "did you mean 'lr'?" in capsys.readouterr().err


def test_dry_run_names_the_missing_task_file_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run_file = tmp_path / "train.toml"
    run_file.write_text(MINIMAL)
    assert run_main(monkeypatch, "train", run_file, "--dry-run") == 2
    assert "no file 'tasks.jsonl'" in capsys.readouterr().err


def test_fresh_and_resume_exclude_each_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run_file = tmp_path / "train.toml"
    run_file.write_text(MINIMAL)
    assert run_main(monkeypatch, "train", run_file, "--fresh", "--resume") == 2
    assert "give one of them" in capsys.readouterr().err


def test_fresh_deletes_nothing_for_a_run_that_cannot_begin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run_file = tmp_path / "train.toml"
    run_file.write_text(MINIMAL)
    config = load_config(run_file, (f"run.output_dir={tmp_path}",))
    run_dir = begin_run(config, run_file=run_file, resume=False)
    assert run_main(monkeypatch, "train", run_file, "-o", f"run.output_dir={tmp_path}", "--fresh") == 2
    assert "no file 'tasks.jsonl'" in capsys.readouterr().err
    assert load_run(run_dir) == (config, run_file)


def test_report_of_something_else_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run_main(monkeypatch, "report", tmp_path) == 2
    assert "name a run folder" in capsys.readouterr().err


def test_ctrl_c_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_load", interrupt)
    assert run_main(monkeypatch, "train", "any.toml") == 130


def test_a_run_that_stops_itself_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from grpo.parity import ParityError

    def stop(*arguments: object) -> None:
        raise ParityError("engine 0 differs")

    monkeypatch.setattr(cli, "_load", stop)
    assert run_main(monkeypatch, "train", "any.toml") == 1
    assert capsys.readouterr().err == "error: engine 0 differs\n"


def test_programming_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(cli, "_load", fail)
    monkeypatch.setattr(sys, "argv", ["keel", "train", "any.toml"])
    with pytest.raises(ValueError, match="a bug"):
        cli.main()
