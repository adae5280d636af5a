"""Host memory that the ranks of a learner take to start.

    python -m benchmarks.rank_memory --ranks 4

A random dense model of 0.6 B parameters with its frozen reference goes onto the ranks in two ways, in Ray actors as in
a run: every rank reads both for itself, or the first reads them and the others begin with its outline. Anonymous
resident memory of each rank above what its imports take, after reading and after sharding. There is no GPU in it: the
shards, which a GPU would hold, are part of the second.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from benchmarks.gpu_models import make_model
from benchmarks.machine import describe_machine
from benchmarks.memory import anonymous_bytes
from grpo.cluster.actors import LearnerActor
from grpo.config import LearnerConfig
from grpo.learner import LearnerSpec

MIB = 1 << 20


class MeasuredRank(LearnerActor):
    """A rank that knows what it has taken."""

    def __init__(self) -> None:
        self._before = anonymous_bytes()

    def taken(self) -> int:
        return anonymous_bytes() - self._before


def measure(spec: LearnerSpec, num_ranks: int, *, one_reads: bool) -> tuple[Sequence[int], Sequence[int]]:
    """Bytes of each rank after reading, and after sharding."""
    ranks: list[Any] = [ray.remote(MeasuredRank).options(num_cpus=1).remote() for _ in range(num_ranks)]
    if one_reads:
        ranks[0].read_model.remote(spec)
        outline = ranks[0].outline.remote()
        ray.get([rank.take_model.remote(outline) for rank in ranks[1:]])
    else:
        ray.get([rank.read_model.remote(spec) for rank in ranks])
    read = ray.get([rank.taken.remote() for rank in ranks])
    address = ray.get(ranks[0].free_address.remote())
    ray.get([rank.build.remote(spec, i, num_ranks, address) for i, rank in enumerate(ranks)])
    built = ray.get([rank.taken.remote() for rank in ranks])
    for rank in ranks:
        ray.kill(rank)
    return read, built


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    num_ranks = parser.parse_args().ranks
    print(describe_machine())
    with tempfile.TemporaryDirectory() as folder:
        model = make_model("dense-0.6b", Path(folder) / "model")
        spec = LearnerSpec(str(model), LearnerConfig(), False, True, "bfloat16", total_updates=1)
        ray.init("local", num_cpus=num_ranks, log_to_driver=False, logging_level=logging.ERROR)
        print(f"\n{num_ranks} ranks, MiB{'first rank':>28}{'each other':>24}{'all':>24}")
        print(f"{'':16}" + f"{'read':>12}{'sharded':>12}" * 3)
        for name, one_reads in (("every rank reads", False), ("the first reads", True)):
            read, built = ([n / MIB for n in ranks] for ranks in measure(spec, num_ranks, one_reads=one_reads))
            columns = [(x[0], sum(x[1:]) / (num_ranks - 1), sum(x)) for x in (read, built)]
            print(f"{name:16}" + "".join(f"{r:12.0f}{b:12.0f}" for r, b in zip(*columns, strict=True)))
        ray.shutdown()


if __name__ == "__main__":
    main()
