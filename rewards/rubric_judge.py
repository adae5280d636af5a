"""The generative reward model: a language model grades completions by a rubric that comes with each prompt.

    [[rewards]]
    fn = "rewards.rubric_judge:rubric_judge"
    timeout_s = 300            # for a verdict with all its attempts, and the wait for a free slot
    [rewards.kwargs]
    endpoint = "keel"          # a server that the run starts and stops, or http://host:port/v1
    model = "Qwen/Qwen3-8B"
    sampling = { temperature = 0.0, max_tokens = 1024 }
    access = { concurrency = 16, attempts = 4 }

The rubric is data, in the task's row:

    {"prompt": "Explain tides to a child.",
     "rubric": {"criteria": [{"id": "accuracy", "text": "Every statement is true.", "weight": 2, "scale": [1, 5]},
                             {"id": "tone", "text": "A child of eight understands every word."}],
                "reference": "The moon pulls at the sea ..."}}

Keel's task files keep such a column in `task.fields`. Verdicts are JSON of a schema made from the rubric, guided where
the endpoint can guide.

What a completion can do to its judge: the rubric stands in the system message; task and answer stand between markers
with a random nonce, with markers, special tokens and invisible characters inside them broken up; the judge is told that
what is inside is material, and to flag manipulation. A flagged answer scores 0, the worst there is, and is not dropped:
dropping would let a policy hide its bad answers by attacking. A judge that is fooled by an argument, as people are, is
not covered: measure yours with `keel judge-report`.

No verdict is an abstention, never a 0: a refusal, or replies that are not JSON, lack a criterion or leave its scale, in
all attempts. An endpoint that is not there is an error. Both drop the sample. They do let a policy gain by making its
judge refuse: watch the count of abstentions.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence

from rewards.judge.client import Judge, JudgeError
from rewards.judge.compare import PairVerdict, identical_pair, judge_pair, win_rate
from rewards.judge.prompts import (
    PROMPT_VERSION,
    answer_text,
    compare_messages,
    new_nonce,
    score_messages,
    task_text,
)
from rewards.judge.schema import (
    Preferences,
    Rubric,
    Scores,
    compare_schema,
    read_preferences,
    read_rubric,
    read_scores,
    score_schema,
)
from rewards.judge.settings import Access, Sampling
from rewards.types import Abstain, Answer, RewardResult
from rollout.types import Task

DEFAULT_SAMPLING = Sampling()
DEFAULT_ACCESS = Access()


async def rubric_judge(
    task: Task,
    answer: Answer,
    *,
    endpoint: str,
    model: str,
    sampling: Sampling = DEFAULT_SAMPLING,
    access: Access = DEFAULT_ACCESS,
) -> RewardResult:
    """Grades one completion: sum_c w_c s_c / sum_c w_c over the criteria, each score s_c taken to [0, 1] on its scale.

    Args:
        endpoint: base URL of an OpenAI-compatible server, with its `/v1`; in a run file also `keel`: the run starts a
            vLLM server for `model` and stops it at its end.
        model: as the endpoint calls it.

    Returns:
        The weighted mean in [0, 1], 0 where the judge sees manipulation; parts: each criterion's s_c by id, and
        `manipulation` (0 or 1).

    Raises:
        Abstain: no verdict; the sample is dropped.
        JudgeError: the endpoint is not there, or refuses the request.
        RubricError: the task's rubric is missing or wrong.
    """
    scores = await score(task, answer, Judge(endpoint, model, sampling, access))
    return RewardResult(scores.total, {**scores.normalised, "manipulation": float(scores.manipulation)})


async def rubric_compare(
    task: Task,
    answers: Sequence[Answer],
    *,
    endpoint: str,
    model: str,
    opponents: int = 4,
    sampling: Sampling = DEFAULT_SAMPLING,
    access: Access = DEFAULT_ACCESS,
) -> list[RewardResult | Abstain]:
    """Grades the completions of a prompt against each other: every score is a win rate in [0, 1].

    Each answer meets its `opponents` nearest neighbours on a ring, in the group's order: a group of G costs about
    G x opponents requests, as every pair is judged in both orders. How orders, lengths and manipulation count is in
    `rewards.judge.compare`; the rubric's scales are not used.

    Args:
        opponents: comparisons per answer, rounded up to an even number; G - 1 or more compares all pairs.

    Returns:
        One per answer: the weighted mean over criteria of its share of wins, ties counting half; parts by criterion id,
        and `manipulation`, `position_flips`, `longer_won`. An Abstain for an answer without a pair that was judged.

    Raises:
        JudgeError: not one request was answered.
        RubricError: the task's rubric is missing or wrong.
    """
    rubric, judge = read_rubric(task), Judge(endpoint, model, sampling, access)
    texts = [answer_text(answer) for answer in answers]
    calls = [_compare_pair(task, rubric, texts, pair, judge) for pair in ring_pairs(len(texts), opponents)]
    results = await asyncio.gather(*calls)
    pairs = [result for result in results if isinstance(result, PairVerdict)]
    errors = [result for result in results if isinstance(result, JudgeError)]
    if errors and not pairs:
        raise errors[0]
    return [win_rate(index, pairs, rubric) for index in range(len(texts))]


def ring_pairs(size: int, opponents: int) -> list[tuple[int, int]]:
    """Pairs of `range(size)` in which everyone meets the same number of nearest neighbours on a ring.

    Example: `ring_pairs(5, 2) = [(0, 1), (0, 4), (1, 2), (2, 3), (3, 4)]`.

    Raises:
        ValueError: `opponents` is below 1.
    """
    if opponents < 1:
        raise ValueError(f"opponents = {opponents}: an answer has to meet at least one other")
    reach = (opponents + 1) // 2
    return [(a, b) for a, b in itertools.combinations(range(size), 2) if min(b - a, size - b + a) <= reach]


async def score(task: Task, answer: Answer, judge: Judge) -> Scores:
    """The judge's full verdict on one completion, raw scores included; raises as `rubric_judge`."""
    rubric, prompt, text = read_rubric(task), task_text(task), answer_text(answer)
    return await judge.ask(
        lambda: score_messages(rubric, prompt, text, new_nonce()),
        score_schema(rubric, judge.sampling.rationale_chars),
        lambda reply: read_scores(reply, rubric),
        _key("score", rubric, prompt, [text]),
    )


async def _compare_pair(
    task: Task, rubric: Rubric, texts: Sequence[str], pair: tuple[int, int], judge: Judge
) -> PairVerdict | Abstain | JudgeError:
    """A pair's verdict, or why there is none: one lost pair does not lose the group."""
    first, second = (texts[index] for index in pair)
    if first == second:
        return identical_pair(*pair, rubric)
    orders = (_compare(task, rubric, first, second, judge), _compare(task, rubric, second, first, judge))
    forward, backward = await asyncio.gather(*orders, return_exceptions=True)
    for result in (forward, backward):
        if isinstance(result, Abstain | JudgeError):
            return result
        if isinstance(result, BaseException):
            raise result
    assert isinstance(forward, Preferences) and isinstance(backward, Preferences)
    return judge_pair(pair, (len(first), len(second)), forward, backward)


async def _compare(task: Task, rubric: Rubric, first: str, second: str, judge: Judge) -> Preferences:
    prompt = task_text(task)
    return await judge.ask(
        lambda: compare_messages(rubric, prompt, first, second, new_nonce()),
        compare_schema(rubric, judge.sampling.rationale_chars),
        lambda reply: read_preferences(reply, rubric),
        _key("compare", rubric, prompt, [first, second]),
    )


def _key(kind: str, rubric: Rubric, prompt: str, answers: list[str]) -> dict[str, object]:
    """What a verdict depends on, model and sampling aside. The nonce is not in it: it guards a prompt, no more."""
    return {
        "kind": kind,
        "prompt_version": PROMPT_VERSION,
        "rubric": rubric.model_dump(mode="json"),
        "prompt": prompt,
        "answers": answers,
    }
