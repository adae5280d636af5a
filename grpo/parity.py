"""The parity probe: after every weight sync each engine draws a few fixed samples and the learner scores them.

Under replay both must assign the same log-probabilities, so a difference beyond rounding means that the engine does not
hold the learner's weights: a stale, partial or corrupted sync. Training on such samples is the costliest failure an RL
run has, because nothing else shows it; here it stops the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from grpo.advantage import Objective, TrainSample, completion_segment
from rollout.types import Completion, GenerateRequest

_MAX_NEW_TOKENS = 4
"""The first comes out of the prompt's step, the others out of decoding steps, which run other kernels and graphs."""
_SEEDS_PER_PROMPT = 8
"""Many short samples: the steps of the longest one follow each other, and training waits for them."""
_OBJECTIVE = Objective(beta=0.0, delta=None, eps_low=0.2, eps_high=0.2, temperature=1.0)


class ParityError(RuntimeError):
    """An engine's log-probabilities are not those of the learner's weights."""


@dataclass(frozen=True, slots=True)
class ParityProbe:
    """A fixed handful of prompts and seeds, sampled at temperature 1 so that most experts and rows take part."""

    requests: tuple[GenerateRequest, ...]
    max_error: float
    """Largest accepted mean |log pi_learner - log pi_engine|, in nats."""

    def to_samples(self, completions: Sequence[Sequence[Completion]]) -> list[TrainSample]:
        """The drawn completions as samples for `Learner.score`."""
        return [
            TrainSample(index, number, "", 0.0, _OBJECTIVE, (completion_segment(request.prompt_token_ids, completion),))
            for index, (request, drawn) in enumerate(zip(self.requests, completions, strict=True))
            for number, completion in enumerate(drawn)
        ]

    def check(self, engine: str, version: int, engine_logprobs: np.ndarray, learner_logprobs: np.ndarray) -> float:
        """Mean absolute difference in nats.

        Raises:
            ParityError: it is above `max_error`, or not a number.
        """
        error = float(np.abs(engine_logprobs - learner_logprobs).mean())
        if not error <= self.max_error:
            raise ParityError(
                f"{engine} does not hold the learner's weights after the sync to policy version {version}: mean "
                f"|log pi_learner - log pi_engine| on the probe is {error:.3g} nats over {len(engine_logprobs)} "
                f"tokens, allowed is {self.max_error:.3g} (stability.max_parity_error). Stale or corrupted engine "
                "weights look like this; nothing was trained on them. Resume from the last checkpoint with --resume"
            )
        return error


def make_probe(
    prompts: Sequence[np.ndarray], *, truncated: bool, vocab_size: int, max_new_tokens: int, max_error: float
) -> ParityProbe:
    """A probe over the given prompts; it truncates only where the run's recording would."""
    requests = tuple(
        GenerateRequest(
            prompt_token_ids=prompt,
            seeds=tuple(range(_SEEDS_PER_PROMPT * index, _SEEDS_PER_PROMPT * (index + 1))),
            temperature=1.0,
            top_p=0.98 if truncated else 1.0,
            top_k=min(64, vocab_size) if truncated else 0,
            max_new_tokens=min(_MAX_NEW_TOKENS, max_new_tokens),
            stop_token_ids=(),
            goes_first=True,
        )
        for index, prompt in enumerate(prompts)
    )
    return ParityProbe(requests, max_error)
