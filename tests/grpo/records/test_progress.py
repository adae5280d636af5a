"""The live display, on a terminal and without one."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from grpo.records import progress
from grpo.records.progress import Progress, duration, sparkline

METRICS = {
    "train/reward": 0.4125,
    "train/kl": 0.00123,
    "mismatch/mean_abs": 2.5e-7,
    "train/masked_sequences": 0.05,
    "rollout/tokens_per_s": 12345.6,
    "time/generate_s": 3.0,
    "time/train_s": 1.0,
}


def console(*, terminal: bool) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, force_terminal=terminal, width=100, color_system=None), stream


def test_plain_lines_without_a_terminal() -> None:
    plain, stream = console(terminal=False)
    with Progress("demo", console=plain) as display:
        display.start(10)
        display.update(1, METRICS)
        display.note("[checkpoint] written")
    first, second = stream.getvalue().splitlines()
    assert first.startswith(
        "step 1/10  reward 0.412  KL 1.23e-03  mismatch 2.5e-07  masked 5.0%  tokens/s 12,346  ETA "
    )
    assert second == "[checkpoint] written"


def test_panel_on_a_terminal() -> None:
    terminal, stream = console(terminal=True)
    with Progress("demo", console=terminal) as display:
        display.start(10)
        display.update(1, METRICS)
        display.update(2, {**METRICS, "train/reward": 0.9})
        display.note("checkpoint written")
    shown = stream.getvalue()
    for text in ("keel · demo", "step 2/10", "reward 0.900", "▁█", "generate 3.0s", "train 1.0s", "checkpoint written"):
        assert text in shown, text


def test_not_finite_is_shown_as_such_and_does_not_break_the_display() -> None:
    for terminal in (False, True):
        shown, stream = console(terminal=terminal)
        with Progress("demo", console=shown) as display:
            display.start(3)
            display.update(1, {"train/reward": float("inf"), "train/kl": float("nan")})
        assert terminal or ("reward not finite" in stream.getvalue() and "KL" not in stream.getvalue())


def test_terminal_is_given_back_after_an_error() -> None:
    terminal, stream = console(terminal=True)
    with pytest.raises(RuntimeError), Progress("demo", console=terminal) as display:
        display.start(3)
        raise RuntimeError
    assert stream.getvalue().endswith("\x1b[?25h")  # the cursor is visible again


def test_eta_is_the_speed_of_this_start(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    display = Progress("demo", console=console(terminal=False)[0])
    display.start(20, done=10)
    assert display.eta_s() is None
    for step in (11, 12):
        now[0] += 5.0
        display.update(step, {})
    assert display.eta_s() == pytest.approx(5.0 * 8)


def test_sparkline_and_duration() -> None:
    assert sparkline([0.0, 0.5, 1.0], 10) == "▁▄█"
    assert sparkline([9.0, 0.0, 1.0], 2) == "▁█"
    assert sparkline([2.0, float("nan"), 2.0], 5) == "▁▁"
    assert sparkline([], 5) == ""
    assert [duration(s) for s in (0.4, 75, 4000)] == ["0:00", "1:15", "1:06:40"]
