"""When so many samples of a step got no reward that the run has to stop: the few left would be a biased lot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rewards.types import ScoredGroup

_MAX_CAUSES = 5


class DropRateError(RuntimeError):
    """Rewards could not be had for too many samples; the message names functions, causes and example tasks."""


def check_drops(groups: Sequence[ScoredGroup], max_drop_rate: float) -> None:
    """Looks at the groups of one step.

    Raises:
        DropRateError: more than `max_drop_rate` of the samples, or all of them, have no reward.
    """
    num_samples = sum(len(group.valid) for group in groups)
    num_dropped = sum(int((~group.valid).sum()) for group in groups)
    if num_dropped == 0 or (num_dropped < num_samples and num_dropped <= max_drop_rate * num_samples):
        return
    causes: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for group in groups:
        causes.update(group.failures)
        for cause in group.failures:
            examples.setdefault(cause, group.group.task.id)
    lines = [f"  {cause}: {count} times, for example task {examples[cause]}" for cause, count in causes.most_common()]
    more = [f"  and {len(lines) - _MAX_CAUSES} more causes"] if len(lines) > _MAX_CAUSES else []
    raise DropRateError(
        f"rewards could not be had for {num_dropped} of the step's {num_samples} samples, more than "
        f"grpo.max_drop_rate = {max_drop_rate:g} allows:\n"
        + "\n".join(lines[:_MAX_CAUSES] + more)
        + "\nTry the function alone with keel check-reward; raise its timeout_s or grpo.max_drop_rate if that is what "
        "it takes."
    )
