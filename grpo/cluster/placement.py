"""Which resources each actor gets, claimed before anything is started."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from grpo.cluster.waits import ClusterError, wait_for
from grpo.config import TrainConfig

_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray for what it runs as a job."""


def start_ray(config: TrainConfig) -> None:
    """Joins the cluster at `cluster.address`, or that whose job this is, or starts a private Ray on this machine.

    Raises:
        ClusterError: nothing answers at the address.
    """
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    address = config.cluster.address or ("auto" if _JOB_VARIABLE in os.environ else None)
    if address is None:
        cores = _cpus_wanted(config)
        ray.init(
            address="local",
            num_cpus=max(cores, os.cpu_count() or 1),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _skip_env_hook=True,
        )
        return
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise ClusterError(f"no Ray cluster answers at cluster.address = {address!r}: {error}") from error


@dataclass(frozen=True, slots=True)
class Placement:
    """One bundle per rollout worker and per learner rank, or one per pair when they share GPUs."""

    group: PlacementGroup
    num_workers: int
    shared: bool
    """Whether worker i and rank i are on one GPU, so that weights need not leave it."""
    gpus_per_worker: float
    gpus_per_rank: float
    worker_threads: int
    rank_threads: int

    def worker(self, number: int) -> dict[str, Any]:
        """Actor options of a rollout worker."""
        return self._options(number, self.worker_threads, self.gpus_per_worker)

    def rank(self, number: int) -> dict[str, Any]:
        """Actor options of a learner rank."""
        return self._options(
            number if self.shared else self.num_workers + number, self.rank_threads, self.gpus_per_rank
        )

    def release(self) -> None:
        """Gives the resources back."""
        remove_placement_group(self.group)

    def _options(self, bundle: int, threads: int, num_gpus: float) -> dict[str, Any]:
        variables = {
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
        }
        return {
            "num_cpus": threads,
            "num_gpus": num_gpus,
            "runtime_env": {"env_vars": variables},
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=bundle),
        }


async def claim_resources(config: TrainConfig) -> Placement:
    """Reserves every actor's place, all or nothing.

    Raises:
        ClusterError: the cluster cannot give them; says what was asked and what there is.
    """
    rollout, learner = config.rollout, config.learner
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    shared = has_gpus and config.cluster.layout == "colocated"
    worker_gpus = float(rollout.tensor_parallel_size) if has_gpus else 0.0
    worker_bundle = {"CPU": float(rollout.cpu_threads), "GPU": worker_gpus}
    rank_bundle = {"CPU": float(learner.cpu_threads), "GPU": 1.0 if has_gpus else 0.0}
    if shared:
        bundles = [{"CPU": worker_bundle["CPU"] + rank_bundle["CPU"], "GPU": 1.0}] * learner.ranks
    else:
        bundles = [worker_bundle] * rollout.workers + [rank_bundle] * learner.ranks
    if rollout.sleep_while_training and not has_gpus:
        raise ClusterError(
            "rollout.sleep_while_training needs a GPU and the Ray cluster has none: leave it off on this machine"
        )
    group = placement_group([{k: v for k, v in bundle.items() if v > 0} for bundle in bundles], strategy="PACK")
    who = f"the Ray cluster (it has {_describe(ray.cluster_resources())})"
    wanted = ", ".join(_describe(bundle) for bundle in bundles)
    await wait_for(group.ready(), config.cluster.start_timeout_s, who, f"give places of {wanted}", "start_timeout_s")
    return Placement(
        group=group,
        num_workers=rollout.workers,
        shared=shared,
        gpus_per_worker=0.5 if shared else worker_gpus,
        gpus_per_rank=0.5 if shared else rank_bundle["GPU"],
        worker_threads=rollout.cpu_threads,
        rank_threads=learner.cpu_threads,
    )


def _cpus_wanted(config: TrainConfig) -> int:
    return config.rollout.workers * config.rollout.cpu_threads + config.learner.ranks * config.learner.cpu_threads


def _describe(resources: Mapping[str, float]) -> str:
    return " + ".join(f"{resources.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU"))
