"""What each stability fix is worth on the quickstart, off-policy: all fixes on, and each one off, over several seeds.

    python -m benchmarks.ablations             # run what is missing, then write the figure and print the tables
    python -m benchmarks.ablations --report    # figure and tables from the runs that are there

Runs live in runs/ablations/; a finished one is not run again. The setting is the quickstart's, but far more off-policy
(`OFF_POLICY`). A second, short set of synchronous runs measures what the two replays do to the numerical mismatch
between engine and learner, in float32 and in bfloat16 (`SYNCHRONOUS`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.ablation_report import Column, draw_panels, print_table, values
from benchmarks.machine import describe_machine
from benchmarks.ray_head import ray_head
from grpo.config import TrainConfig, load_config
from grpo.records.metrics import read_metrics

ROOT = Path(__file__).parents[1]
RUN_FILE = ROOT / "examples" / "quickstart" / "train.toml"
OUTPUT_DIR = ROOT / "runs" / "ablations"
FIGURE = ROOT / "docs" / "figures" / "ablations.svg"

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Variant:
    """One setting of the fixes."""

    name: str
    label: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Study:
    """Variants of one setting, each over the same seeds."""

    overrides: tuple[str, ...]
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    columns: tuple[Column, ...]

    def config(self, variant: Variant, seed: int, address: str | None = None) -> TrainConfig:
        """The run file of one run."""
        own = (f"run.name={variant.name}-{seed}", f"run.seed={seed}", f"run.output_dir={OUTPUT_DIR}")
        joined = () if address is None else (f"cluster.address={address}",)
        return load_config(RUN_FILE, (*self.overrides, *variant.overrides, *own, *joined))

    def runs(self) -> dict[str, list[Rows]]:
        """Metrics of every run, by label.

        Raises:
            FileNotFoundError: a run is missing.
        """
        return {v.label: [finished_rows(self.config(v, seed)) for seed in self.seeds] for v in self.variants}


NO_ROUTING = ("stability.keep_routing=false",)
NO_SUPPORTS = ("stability.keep_sampling_mask=false", "stability.allow_biased_truncation=true")

OFF_POLICY = Study(
    overrides=(
        "run.steps=40",
        "run.eval_every=5",
        "run.tensorboard=false",
        "grpo.max_off_policy_steps=2",
        "grpo.updates_per_batch=4",
        "learner.lr=3e-4",
        "stability.beta=0.05",
    ),
    variants=(
        Variant("all", "all fixes"),
        Variant("no-routing", "without Keep Routing", NO_ROUTING),
        Variant("no-supports", "without Keep Sampling Mask", NO_SUPPORTS),
        Variant("no-sequence-mask", "without the sequence mask", ("stability.delta=off",)),
        Variant("plain-k3", "plain k3 for the KL", ("stability.unbiased_kl=false",)),
    ),
    seeds=(0, 1, 2, 3),
    columns=(
        Column("held-out accuracy, end", lambda rows: values(rows, "eval/accuracy")[-1], "{:.3f}"),
        Column("held-out accuracy, mean", lambda rows: fmean(values(rows, "eval/accuracy")[1:]), "{:.3f}"),
        Column("reward, mean", lambda rows: fmean(values(rows, "train/reward")), "{:.3f}"),
        Column("ratio, mean", lambda rows: fmean(values(rows, "train/ratio_mean")), "{:.4f}"),
        Column("ratio, largest", lambda rows: max(values(rows, "train/ratio_max")), "{:.3g}"),
        Column("drift", lambda rows: fmean(values(rows, "train/drift")), "{:.3f}"),
        Column("masked", lambda rows: fmean(values(rows, "train/masked_sequences")), "{:.1%}"),
        Column("route agreement", lambda rows: fmean(values(rows, "mismatch/route_agreement") or [NAN]), "{:.3f}"),
        Column("KL", lambda rows: fmean(values(rows, "train/kl")), "{:.3f}"),
        Column("gradient norm, largest", lambda rows: max(values(rows, "train/grad_norm")), "{:.3g}"),
    ),
)
NAN = float("nan")
HALF = ("learner.dtype=bfloat16", "rollout.dtype=bfloat16")
SYNCHRONOUS = Study(
    overrides=("run.steps=8", "run.eval_every=0", "run.tensorboard=false", "stability.max_parity_error=10"),
    variants=tuple(
        Variant(f"sync-{dtype}-{name}", f"{dtype}, {label}", (*overrides, *(HALF if dtype == "bfloat16" else ())))
        for dtype in ("float32", "bfloat16")
        for name, label, overrides in (
            ("both", "both replays", ()),
            ("no-routing", "without Keep Routing", NO_ROUTING),
            ("no-supports", "without Keep Sampling Mask", NO_SUPPORTS),
            ("neither", "neither", (*NO_ROUTING, *NO_SUPPORTS)),
        )
    ),
    seeds=(0,),
    columns=(
        Column("mean abs(log pi_theta - log pi_old)", lambda rows: fmean(values(rows, "mismatch/mean_abs")), "{:.2e}"),
        Column("99th percentile", lambda rows: fmean(values(rows, "mismatch/p99_abs")), "{:.2e}"),
        Column("largest", lambda rows: max(values(rows, "mismatch/max_abs")), "{:.2e}"),
        Column("route agreement", lambda rows: fmean(values(rows, "mismatch/route_agreement") or [NAN]), "{:.4f}"),
        Column("drift", lambda rows: fmean(values(rows, "train/drift")), "{:.4f}"),
    ),
)
STUDIES = (OFF_POLICY, SYNCHRONOUS)

PANELS = {
    "train/reward": "training reward",
    "eval/accuracy": "held-out accuracy",
    "train/kl": "KL to the reference, nats per token",
    "train/masked_sequences": "share of masked sequences",
    "train/ratio_max": "largest ratio",
    "train/drift": "drift, nats per token",
    "train/grad_norm": "gradient norm",
    "mismatch/route_agreement": "route agreement",
}
LOGARITHMIC = frozenset({"train/kl", "train/grad_norm"})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="run nothing")
    if not parser.parse_args().report:
        run_missing()
    print(describe_machine())
    for study in STUDIES:
        print()
        print_table(study.runs(), study.columns)
    draw_panels(OFF_POLICY.runs(), PANELS, FIGURE, logarithmic=LOGARITHMIC)


def run_missing() -> None:
    """Trains every run whose folder does not hold all its steps yet, one after another."""
    with ray_head(num_cpus=2) as head:
        from grpo.train import train  # imports Ray, which reads the token that `ray_head` has set

        for study in STUDIES:
            for variant in study.variants:
                for seed in study.seeds:
                    config = study.config(variant, seed, head.address)
                    if is_finished(config):
                        continue
                    started = time.perf_counter()
                    train(config, run_file=RUN_FILE, fresh=True)
                    print(f"{config.run.name}: {time.perf_counter() - started:.0f} s", flush=True)


def is_finished(config: TrainConfig) -> bool:
    """Whether the run's last step is there."""
    rows = read_metrics(config.run_dir) if config.run_dir.exists() else []
    return bool(rows) and rows[-1]["step"] >= config.run.steps


def finished_rows(config: TrainConfig) -> Rows:
    """All rows of a finished run.

    Raises:
        FileNotFoundError: it has not been run, or not to its end.
    """
    if not is_finished(config):
        raise FileNotFoundError(f"{config.run_dir} holds no finished run: start this without --report")
    return read_metrics(config.run_dir)


if __name__ == "__main__":
    main()
