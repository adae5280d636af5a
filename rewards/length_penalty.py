"""Length penalties, by tokens: a soft zone before the limit, and a comparison within the group."""

from __future__ import annotations

from collections.abc import Sequence

from rewards.types import Answer
from rollout.types import FinishReason, Task


def length_penalty(task: Task, answer: Answer, *, max_tokens: int, soft_tokens: int) -> float:
    """Soft overlong punishment of DAPO (Yu et al. 2025, arXiv:2503.14476, equation 13), for l tokens:

        0                                              l <= max_tokens - soft_tokens
        ((max_tokens - soft_tokens) - l) / soft_tokens      up to max_tokens
        -1                                             l > max_tokens

    A completion that was cut off by its limit gets -1 whatever its length.

    Args:
        max_tokens: L_max.
        soft_tokens: L_cache, the width of the zone in which the penalty grows from 0 to -1.

    Raises:
        ValueError: not 0 < soft_tokens <= max_tokens.
    """
    if not 0 < soft_tokens <= max_tokens:
        raise ValueError(f"length_penalty: want 0 < soft_tokens <= max_tokens, got {soft_tokens} and {max_tokens}")
    if answer.finish_reason is FinishReason.LENGTH:
        return -1.0
    over = answer.num_tokens - (max_tokens - soft_tokens)
    return -min(1.0, max(0.0, over / soft_tokens))


def group_length_penalty(
    task: Task, answers: Sequence[Answer], *, reward_short: bool = False, min_spread: int = 1
) -> list[float]:
    """Length relative to the group, after Kimi k1.5 (arXiv:2501.12599, section 2.3.3). With l_i tokens in completion i:

        lambda_i = 1/2 - (l_i - min l) / (max l - min l)            in [-1/2, 1/2]
        reward_i = lambda_i if reward_short else min(0, lambda_i)

    The paper gives lambda to correct answers and min(0, lambda) to the others. A length reward does not know which are
    correct: with `reward_short`, put it behind a gate on the outcome, or a short wrong answer is paid for.

    Args:
        min_spread: all get 0 when max l - min l is smaller.
    """
    lengths = [answer.num_tokens for answer in answers]
    shortest, spread = min(lengths, default=0), max(lengths, default=0) - min(lengths, default=0)
    if spread < max(1, min_spread):
        return [0.0] * len(lengths)
    values = [0.5 - (length - shortest) / spread for length in lengths]
    return values if reward_short else [min(0.0, value) for value in values]
