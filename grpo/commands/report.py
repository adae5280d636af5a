"""A run folder in, one HTML page out that needs nothing else: `keel report`.

The page carries its data as JSON, its style, its scripts and plotly.js; what it shows is decided here, how it looks in
`report_page/`. It can be written while the run goes on.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from grpo.commands.verdicts import STAGES, Rows, judge
from grpo.config import ConfigError
from grpo.records.metrics import read_metrics, read_rows
from grpo.records.run_folder import CONFIG_FILE, RUN_FILE, SAMPLES_FILE

PAGE = Path(__file__).parent / "report_page"
MAX_SAMPLES = 4000
"""Completions in the page: the first and last of longer runs, evenly thinned between."""


@dataclass(frozen=True, slots=True)
class Chart:
    """One panel of curves; `keys` maps a metric to its name in the legend."""

    title: str
    hint: str
    keys: Mapping[str, str]
    kind: Literal["line", "log", "stack"] = "line"


CHARTS = (
    Chart("Reward", "Should rise, and held-out accuracy with it: reward alone can be gamed.",
          {"train/reward": "reward", "eval/accuracy": "held-out accuracy", "eval/pass_at_k": "held-out pass@k"}),
    Chart("Mismatch of fresh tokens", "|log π - log π_old| before any update. A jump means stale or corrupt weights.",
          {"mismatch/mean_abs": "mean", "mismatch/p99_abs": "99 %", "mismatch/max_abs": "largest",
           "parity/max_mean_abs": "probe after sync"}, "log"),
    Chart("Importance ratio", "The mean belongs at 1; the largest shows how far single tokens have drifted.",
          {"train/ratio_mean": "mean", "train/ratio_max": "largest"}),
    Chart("KL to the reference", "Unbiased estimate, in nats per token. Steady growth means a weak leash.",
          {"train/kl": "KL"}),
    Chart("Masked and clipped", "Masked: share of sequences. Clipped: share of tokens.",
          {"train/masked_sequences": "masked sequences", "train/clipped": "clipped tokens"}),
    Chart("Entropy over the support", "In nats per token. Near zero, the policy explores no more.",
          {"train/entropy": "entropy"}),
    Chart("Response length", "In tokens. A run to the limit often means that answers do not end any more.",
          {"train/response_length": "trained on", "eval/response_length": "held-out"}),
    Chart("Cut off at the limit", "Share of completions that ended at max_new_tokens.",
          {"train/truncated_share": "cut off"}),
    Chart("Route agreement", "Replayed experts that the learner would have chosen itself.",
          {"mismatch/route_agreement": "agreement"}),
    Chart("Spread of rewards in a group", "Standard deviation. At zero there is nothing to learn from.",
          {"train/reward_std": "deviation"}),
    Chart("Lost signal", "Groups with equal rewards; samples without a usable reward or record.",
          {"train/zero_signal_groups": "groups without signal", "train/dropped_samples": "dropped samples"}),
    Chart("Staleness", "Policy versions between drawing a token and training on it.",
          {"train/staleness_mean": "mean", "train/staleness_max": "largest"}),
    Chart("Gradient norm", "Before clipping.", {"train/grad_norm": "norm"}),
    Chart("Learning rate", "", {"train/lr": "rate"}),
    Chart("Loss", "Its value says little in RL; look for jumps.", {"train/loss": "loss"}),
    Chart("Kept ids per token", "Mean size of the sampler's support.", {"rollout/kept_mean": "ids"}),
    Chart("Tokens per second", "", {"rollout/tokens_per_s": "drawn", "learner/tokens_per_s": "trained on"}),
    Chart("Time by stage", "Seconds of each step.", {f"time/{stage}_s": stage for stage in STAGES}, "stack"),
)  # fmt: skip


def write_report(run_dir: Path, output: Path | None = None) -> Path:
    """Writes the page and returns where.

    Args:
        output: the HTML file; default `report.html` in the run folder.

    Raises:
        ConfigError: the folder is not a run folder, or its run has no metrics yet.
    """
    output = output or run_dir / "report.html"
    output.write_text(make_page(load_data(run_dir)), encoding="utf-8")
    return output


def load_data(run_dir: Path) -> dict[str, Any]:
    """Everything the page shows, as plain JSON values."""
    for name in (CONFIG_FILE, RUN_FILE):
        if not (run_dir / name).is_file():
            raise ConfigError(f"{run_dir}: no {name} in it: name a run folder, for example runs/quickstart")
    rows = read_metrics(run_dir)
    if not rows:
        raise ConfigError(f"{run_dir}: no metrics yet: wait for the first step")
    config = json.loads((run_dir / CONFIG_FILE).read_text(encoding="utf-8"))
    run = json.loads((run_dir / RUN_FILE).read_text(encoding="utf-8"))
    samples = read_rows(run_dir / SAMPLES_FILE)
    return {
        "name": config["run"]["name"],
        "summary": _summary(rows, config, run),
        "verdicts": [asdict(verdict) for verdict in judge(rows, config)],
        "charts": list(make_charts(rows)),
        "samples": samples[:: -(-len(samples) // MAX_SAMPLES) or 1],
        "config": _flatten(config),
        "starts": run["starts"],
    }


def make_page(data: Mapping[str, Any]) -> str:
    """The page for `load_data`'s data."""
    from plotly.offline import get_plotlyjs

    page = (PAGE / "page.html").read_text(encoding="utf-8")
    scripts = "\n".join((PAGE / name).read_text(encoding="utf-8") for name in ("charts.js", "samples.js", "page.js"))
    parts = {
        "title": html.escape(f"{data['name']} · keel"),
        "style": (PAGE / "style.css").read_text(encoding="utf-8"),
        "data": _json_for_script(data),
        "plotly": get_plotlyjs(),
        "scripts": scripts,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], page)


def make_charts(rows: Rows) -> Iterator[dict[str, Any]]:
    """The panels that have data: known ones in their order, then every metric that no panel shows."""
    keys = list(dict.fromkeys(key for row in rows for key in row if key != "step"))
    shown: set[str] = set()
    for chart in CHARTS:
        names = {key: name for base, name in chart.keys.items() for key, name in _with_domains(base, name, keys)}
        shown.update(names)
        if panel := _panel(chart.title, chart.hint, chart.kind, names, rows):
            yield panel
    parts = {key: key.removeprefix("reward/") for key in keys if key.startswith("reward/")}
    if panel := _panel("Reward by function", "Before weighting; name/part and name/domain.", "line", parts, rows):
        yield panel
    rest = (key for key in keys if key not in shown and key not in parts and not key.startswith("time/"))
    for key in rest:
        if panel := _panel(key, "", "line", {key: key}, rows):
            yield panel


def _with_domains(base: str, name: str, keys: Iterable[str]) -> Iterator[tuple[str, str]]:
    """A metric and its variants `base/domain`."""
    for key in keys:
        if key == base:
            yield key, name
        elif key.startswith(f"{base}/"):
            yield key, f"{name}, {key[len(base) + 1 :]}"


def _panel(title: str, hint: str, kind: str, names: Mapping[str, str], rows: Rows) -> dict[str, Any] | None:
    lines = []
    for key, name in names.items():
        points = [(row["step"], row[key]) for row in rows if key in row]  # a null stays: the curve has a gap there
        if any(value is not None for _, value in points):
            x, y = zip(*points, strict=True)
            lines.append({"name": name, "key": key, "x": x, "y": y})
    return {"title": title, "hint": hint, "kind": kind, "series": lines} if lines else None


def _summary(rows: Rows, config: Mapping[str, Any], run: Mapping[str, Any]) -> list[tuple[str, str]]:
    seconds = sum(row.get("time/step_s") or 0.0 for row in rows)
    began = datetime.fromisoformat(run["starts"][0]["time"])
    return [
        ("steps", f"{rows[-1]['step']} of {config['run']['steps']}"),
        ("time in steps", f"{seconds / 60:.1f} min"),
        ("began", f"{began:%Y-%m-%d %H:%M} UTC"),
        ("resumed", f"{sum(start['resumed'] for start in run['starts'])} times"),
        ("model", str(config["model"]["path"])),
        ("seed", str(run["seed"])),
        ("run file", str(run["run_file"])),
    ]


def _flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """`{"run": {"steps": 3}}` -> `[("run.steps", "3")]`; lists of tables get numbers."""
    if isinstance(value, dict) and value:
        return [pair for key, item in value.items() for pair in _flatten(item, f"{prefix}.{key}" if prefix else key)]
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return [pair for number, item in enumerate(value) for pair in _flatten(item, f"{prefix}[{number}]")]
    return [(prefix, json.dumps(value, ensure_ascii=False))]


def _json_for_script(data: Mapping[str, Any]) -> str:
    """JSON that cannot end the script element it stands in, whatever a completion says."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
