"""A step's metrics in, something to watch out: a live panel on a terminal, one plain line per step anywhere else.

Shows what a person looks at first when a run goes wrong. Knows the metrics by name only; a metric that is absent is
left out.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

SHOWN = (
    ("reward", "train/reward", ".3f"),
    ("held-out", "eval/accuracy", ".1%"),
    ("KL", "train/kl", ".2e"),
    ("ratio", "train/ratio_mean", ".4f"),
    ("ratio max", "train/ratio_max", ".3g"),
    ("mismatch", "mismatch/mean_abs", ".1e"),
    ("routes agree", "mismatch/route_agreement", ".2%"),
    ("masked", "train/masked_sequences", ".1%"),
    ("clipped", "train/clipped", ".1%"),
    ("entropy", "train/entropy", ".3f"),
    ("length", "train/response_length", ".1f"),
    ("grad norm", "train/grad_norm", ".3g"),
    ("tokens/s", "rollout/tokens_per_s", ",.0f"),
    ("staleness", "train/staleness_mean", ".2f"),
)
"""Label, metric and format, in the order shown."""

PLAIN = ("reward", "held-out", "KL", "ratio", "mismatch", "masked", "entropy", "tokens/s")
"""The labels that a plain line has room for."""

STAGES = (
    ("generate", "cyan"),
    ("score", "yellow"),
    ("train", "green"),
    ("sync", "magenta"),
    ("probe", "blue"),
    ("eval", "white"),
)
"""The `time/*_s` metrics of one step, and their colours."""

SPARKS = "▁▂▃▄▅▆▇█"
WINDOW = 20
"""Steps over which the speed for the ETA is averaged."""


class Progress:
    """The display of one run; a context manager that gives the terminal back whatever happens."""

    def __init__(self, title: str, *, console: Console | None = None) -> None:
        self._title = title
        self._console = console or Console()
        self._live: Live | None = None
        self._total = self._step = 0
        self._latest: dict[str, float] = {}
        self._rewards: deque[float] = deque(maxlen=240)
        self._times: deque[tuple[int, float]] = deque(maxlen=WINDOW + 1)
        self._notes: deque[str] = deque(maxlen=4)

    def start(self, total_steps: int, *, done: int = 0) -> None:
        """Begins the display; `done` steps are behind it when a run is resumed."""
        self._total, self._step = total_steps, done
        self._times.append((done, time.monotonic()))
        if self._console.is_terminal:
            self._live = Live(self._render(), console=self._console, refresh_per_second=4, transient=False)
            self._live.start()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes in the metrics of one finished step."""
        self._step = step
        self._latest.update(
            {key: value for key, value in metrics.items() if value is not None and math.isfinite(value)}
        )
        self._times.append((step, time.monotonic()))
        if "train/reward" in metrics:
            self._rewards.append(metrics["train/reward"])
        if self._live is not None:
            self._live.update(self._render())
        else:
            self._console.print(self._plain_line(metrics), highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """Says something that is not a metric: evaluation, a checkpoint, a replaced worker."""
        if self._live is None:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)
            return
        self._notes.append(text)
        self._live.update(self._render())

    def stop(self) -> None:
        """Ends the display, leaving its last state on the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def eta_s(self) -> float | None:
        """Seconds left at the speed of the last steps; None before the first one."""
        (first, began), (last, ended) = self._times[0], self._times[-1]
        return None if last == first else (ended - began) / (last - first) * (self._total - self._step)

    def _plain_line(self, metrics: Mapping[str, float]) -> str:
        parts = [f"step {self._step}/{self._total}"]
        parts += [f"{label} {value}" for label, value in _shown(metrics) if label in PLAIN]
        eta = self.eta_s()
        return "  ".join(parts + ([] if eta is None else [f"ETA {duration(eta)}"]))

    def _render(self) -> RenderableType:
        eta = self.eta_s()
        left = "" if eta is None else f"  ETA {duration(eta)}"
        head = Table.grid(expand=True, padding=(0, 1))
        head.add_column(ratio=1)
        head.add_column(justify="right", no_wrap=True)
        head.add_row(
            ProgressBar(total=max(self._total, 1), completed=self._step), f"step {self._step}/{self._total}{left}"
        )
        parts: list[RenderableType] = [head, _metric_grid(self._latest)]
        if self._rewards:
            width = max(self._console.width - 14, 10)
            parts.append(Text.assemble(("reward ", "dim"), (sparkline(list(self._rewards), width), "green")))
        parts.append(_stage_line(self._latest, max(self._console.width - 14, 10)))
        parts.extend(Text(note, style="dim") for note in self._notes)
        return Panel(Group(*parts), title=f"keel · {self._title}", title_align="left", border_style="dim")


def sparkline(values: Sequence[float], width: int) -> str:
    """The last `width` finite values as a line of blocks, lowest to highest."""
    shown = [value for value in values if math.isfinite(value)][-width:]
    if not shown:
        return ""
    low, span = min(shown), max(shown) - min(shown)
    return "".join(SPARKS[int((value - low) / span * (len(SPARKS) - 1)) if span else 0] for value in shown)


def duration(seconds: float) -> str:
    """`75` -> `1:15`, `4000` -> `1:06:40`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _shown(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """Label and formatted value of the metrics that are there (NaN is not); an infinite one is shown as such."""
    return [
        (label, format(metrics[key], spec) if math.isfinite(metrics[key]) else "not finite")
        for label, key, spec in SHOWN
        if key in metrics and not math.isnan(metrics[key])
    ]


def _metric_grid(metrics: Mapping[str, float], columns: int = 4) -> Table:
    grid = Table.grid(expand=True, padding=(0, 2))
    for _ in range(columns):
        grid.add_column(ratio=1)
    cells = [Text.assemble((f"{label} ", "dim"), (value, "bold")) for label, value in _shown(metrics)]
    for start in range(0, len(cells), columns):
        grid.add_row(*cells[start : start + columns])
    return grid


def _stage_line(metrics: Mapping[str, float], width: int) -> Text:
    """Where the last step's time went: a bar with one piece per stage, and the seconds."""
    seconds = [(stage, colour, metrics.get(f"time/{stage}_s", 0.0)) for stage, colour in STAGES]
    total = sum(value for _, _, value in seconds)
    if total <= 0:
        return Text("")
    bar = [("█" * round(value / total * width * 0.4), colour) for _, colour, value in seconds]
    legend = [(f" {stage} {value:.1f}s", colour) for stage, colour, value in seconds if value > 0]
    return Text.assemble(("time   ", "dim"), *bar, *legend)
