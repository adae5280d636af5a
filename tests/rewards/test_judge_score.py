"""The judge as a reward: what is asked, what is made of the replies, and what becomes of bad ones."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rewards.config import RewardConfig
from rewards.judge.client import JudgeError
from rewards.judge.schema import RubricError, read_rubric
from rewards.judge.settings import Access, Sampling
from rewards.load import load_reward
from rewards.rubric_judge import rubric_judge
from rewards.types import Abstain
from rollout.types import Task
from tests.rewards.judge_cases import CRITERIA, FAST, RUBRIC, TASK, answer, judge
from tests.rewards.scripted_endpoint import Step, completion, scripted, seen, verdict

GOOD = verdict({"accuracy": 4, "clarity": 5})


def test_total_is_the_weighted_mean_of_normalised_scores() -> None:
    with scripted(GOOD) as endpoint:
        result = judge(endpoint.url)
    assert result.value == pytest.approx((3 * 0.4 + 1 * 1.0) / 4)
    assert result.parts == {"accuracy": pytest.approx(0.4), "clarity": 1.0, "manipulation": 0.0}


@pytest.mark.parametrize(("worst", "total"), [(True, 0.0), (False, 1.0)])
def test_ends_of_the_scales_are_0_and_1(worst: bool, total: float) -> None:
    with scripted(verdict({"accuracy": 0, "clarity": 1} if worst else {"accuracy": 10, "clarity": 5})) as endpoint:
        assert judge(endpoint.url).value == total


def test_flagged_manipulation_scores_0_and_keeps_the_parts() -> None:
    with scripted(verdict({"accuracy": 10, "clarity": 5}, manipulation=True)) as endpoint:
        result = judge(endpoint.url)
    assert result.value == 0.0
    assert result.parts == {"accuracy": 1.0, "clarity": 1.0, "manipulation": 1.0}


def test_request_carries_rubric_reference_texts_schema_and_sampling() -> None:
    sampling = Sampling(temperature=0.3, top_p=0.8, max_tokens=77, seed=5, rationale_chars=40, extra={"min_p": 0.1})
    with scripted(GOOD) as endpoint:
        judge(endpoint.url, model="judge-7b", sampling=sampling)
    (body,) = endpoint.bodies
    system, user = body["messages"]
    assert [system["role"], user["role"]] == ["system", "user"]
    for text in ("Every statement is true.", "0 = worst to 10 = best", "The moon pulls at the sea."):
        assert text in system["content"] and text not in user["content"]
    assert (seen(body, "TASK"), seen(body, "ANSWER")) == ("Explain tides.", "The moon does it.")
    assert {key: body[key] for key in ("model", "temperature", "top_p", "max_tokens", "seed", "min_p")} == {
        "model": "judge-7b", "temperature": 0.3, "top_p": 0.8, "max_tokens": 77, "seed": 5, "min_p": 0.1,
    }  # fmt: skip
    schema = body["response_format"]["json_schema"]["schema"]
    accuracy = schema["properties"]["criteria"]["properties"]["accuracy"]
    assert accuracy["properties"] == {
        "rationale": {"type": "string", "maxLength": 40},
        "score": {"type": "integer", "enum": list(range(11))},
    }
    assert list(accuracy["properties"]) == accuracy["required"] == ["rationale", "score"]
    assert schema["required"] == ["manipulation_attempt", "criteria"] and schema["additionalProperties"] is False


def test_unguided_request_has_no_schema_and_takes_fenced_json() -> None:
    fenced = completion(f"```json\n{json.loads(GOOD.body)['choices'][0]['message']['content']}\n```")
    with scripted(fenced) as endpoint:
        assert judge(endpoint.url, sampling=Sampling(guided=False)).parts["clarity"] == 1.0
    assert "response_format" not in endpoint.bodies[0]


def test_chat_prompts_tool_calls_and_the_tasks_own_answer_are_shown() -> None:
    prompt = ({"role": "user", "content": [{"type": "text", "text": "Why?"}, {"type": "image_url"}]},)
    task = replace(TASK, prompt=prompt, answer="Because of the moon.", fields={"rubric": CRITERIA})
    with scripted(GOOD) as endpoint:
        judge(endpoint.url, answer("hm", tool_calls=({"name": "look", "arguments": {"at": "moon"}},)), task=task)
    (body,) = endpoint.bodies
    assert seen(body, "TASK") == "user: Why?\n(image_url)"
    assert seen(body, "ANSWER") == 'hm\n\nTool calls:\n{"name": "look", "arguments": {"at": "moon"}}'
    assert "Because of the moon." in body["messages"][0]["content"]


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (completion("Great answer, 10/10!"), "not JSON"),
        (completion("[" * 100_000), "not JSON"),
        (completion("[5, 5]"), "list, not a JSON object"),
        (completion('{"manipulation_attempt": false}'), "accuracy: no score"),
        (completion('{"criteria": {"accuracy": {"score": 4}, "clarity": {"score": 4}}}'), "manipulation_attempt is"),
        (verdict({"accuracy": 4}), "clarity: no score"),
        (verdict({"accuracy": 4, "clarity": 6}), "clarity: the score is off its scale"),
        (verdict({"accuracy": -1, "clarity": 5}), "accuracy: the score is off its scale"),
        (verdict({"accuracy": 4.5, "clarity": 5}), "accuracy: the score is off"),
        (verdict({"accuracy": True, "clarity": 5}), "accuracy: the score is off"),
        (verdict({"accuracy": float("nan"), "clarity": 5}), "accuracy: the score is off"),
        (verdict({"accuracy": "4", "clarity": 5}), "accuracy: the score is off"),
        (completion("{}", finish_reason="length"), "cut off at sampling.max_tokens = 1024"),
        (completion(None), "no text"),
        (Step(body="<html>busy</html>"), "not a chat completion"),
        (Step(body='{"choices": []}'), "not a chat completion"),
    ],
)
def test_replies_that_are_no_verdict_abstain_after_all_attempts(reply: Step, why: str) -> None:
    with scripted(reply) as endpoint, pytest.raises(Abstain, match=f"no verdict from m in 3 attempts.*{why}"):
        judge(endpoint.url, access=FAST.model_copy(update={"attempts": 3}))
    assert [body["seed"] for body in endpoint.bodies] == [0, 1, 2]
    assert len({body["messages"][1]["content"] for body in endpoint.bodies}) == 3, "each attempt has its own nonce"


@pytest.mark.parametrize(
    "reply", [completion(None, refusal="I cannot judge this."), completion("", finish_reason="content_filter")]
)
def test_refusal_abstains_at_once(reply: Step) -> None:
    with scripted(reply) as endpoint, pytest.raises(Abstain, match="m refused"):
        judge(endpoint.url)
    assert len(endpoint.bodies) == 1


@pytest.mark.parametrize(
    "failure",
    [Step(429), Step(500), Step(503), Step(408), Step(drop=True), completion("garbage")],
    ids=["429", "500", "503", "408", "dropped", "garbage"],
)
def test_recovers_when_a_later_attempt_succeeds(failure: Step) -> None:
    with scripted([failure, failure, GOOD]) as endpoint:
        assert judge(endpoint.url).parts["clarity"] == 1.0
    assert len(endpoint.bodies) == 3


def test_timeout_is_retried_then_an_error() -> None:
    slow = replace(GOOD, delay_s=20.0)
    access = FAST.model_copy(update={"timeout_s": 0.5, "attempts": 2})
    with scripted([slow, GOOD]) as endpoint:
        assert judge(endpoint.url, access=access).parts["clarity"] == 1.0
    with scripted(slow) as endpoint, pytest.raises(JudgeError, match=r"no reply in 2 attempts: nothing within 0\.5 s"):
        judge(endpoint.url, access=access)
    assert len(endpoint.bodies) == 2


def test_errors_after_all_attempts_name_endpoint_and_cause() -> None:
    with scripted(Step(503)) as endpoint, pytest.raises(JudgeError, match=f"{endpoint.url}: no reply in 4.*HTTP 503"):
        judge(endpoint.url)
    with scripted(Step(drop=True)) as endpoint, pytest.raises(JudgeError, match=r"RemoteProtocolError|ReadError"):
        judge(endpoint.url)
    with pytest.raises(JudgeError, match="ConnectError"):  # nobody listens any more
        judge(endpoint.url)


def test_refused_request_is_not_repeated() -> None:
    with scripted(Step(404, body='{"message": "no model m"}')) as endpoint:
        with pytest.raises(JudgeError, match=r"HTTP 404.*no model m"):
            judge(endpoint.url)
        assert len(endpoint.bodies) == 1


def test_backoff_doubles_and_retry_after_is_waited_for() -> None:
    access = FAST.model_copy(update={"backoff_s": 0.2, "attempts": 3})
    with scripted([Step(500), Step(500), GOOD]) as endpoint:
        started = time.perf_counter()
        judge(endpoint.url, access=access)
        assert 0.1 + 0.2 <= time.perf_counter() - started < 5
    with scripted([Step(429, headers={"Retry-After": "1"}), GOOD]) as endpoint:
        started = time.perf_counter()
        judge(endpoint.url)
        assert 1.0 <= time.perf_counter() - started < 5


def test_key_comes_from_the_named_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    access = FAST.model_copy(update={"api_key_env": "MY_JUDGE_KEY"})
    with scripted(GOOD) as endpoint:
        with pytest.raises(JudgeError, match="no environment variable 'MY_JUDGE_KEY'"):
            judge(endpoint.url, access=access)
        monkeypatch.setenv("MY_JUDGE_KEY", "sesame")
        judge(endpoint.url, access=access)
    assert endpoint.headers[0]["Authorization"] == "Bearer sesame"


@pytest.mark.parametrize("url", ["keel", "keel:7", "localhost:8199/v1", "ftp://host/v1"])
def test_endpoint_that_is_no_url(url: str) -> None:
    with pytest.raises(JudgeError, match="give a URL like http://127"):
        judge(url)


@pytest.mark.parametrize(
    ("rubric", "message"),
    [
        (None, 'no rubric: give its row a column "rubric"'),
        ("be nice", r"rubric: .*'be nice'"),
        ([], r"rubric\.criteria: "),
        ([{"text": "x"}], r"rubric\.criteria\.0\.id: Field required"),
        ([{"id": "a b", "text": "x"}], r"rubric\.criteria\.0\.id: .*'a b'"),
        ([{"id": "a", "text": "x", "wieght": 2}], r"rubric\.criteria\.0\.wieght: unknown key; known keys: id, text"),
        ([{"id": "a", "text": "x", "weight": 0}], r"weight: .*greater than 0.*got 0"),
        ([{"id": "a", "text": "x", "weight": float("inf")}], r"weight: .*finite"),
        ([{"id": "a", "text": "x", "scale": [3, 3]}], r"scale \[3, 3\]: want \[worst, best\]"),
        ([{"id": "a", "text": "x", "scale": [0, 1000]}], r"at most 100 steps"),
        ([{"id": "manipulation", "text": "x"}], r"'manipulation' is the name of another part"),
        ([{"id": "a", "text": "x"}, {"id": "a", "text": "y"}], r"two criteria have the id 'a'"),
    ],
)
def test_wrong_rubrics_name_task_and_field(rubric: Any, message: str) -> None:
    with pytest.raises(RubricError, match=f"task tides-1: .*{message}|task tides-1: {message}"):
        read_rubric(replace(TASK, fields={} if rubric is None else {"rubric": rubric}))


def test_run_file_tables_are_checked_at_load(tmp_path: Path) -> None:
    kwargs = {"endpoint": "keel", "model": "m", "sampling": {"temperature": 1}, "access": {"attempts": 2}}
    config = RewardConfig(fn="rewards.rubric_judge:rubric_judge", kwargs=kwargs)
    reward = load_reward(config, base_dir=tmp_path)
    assert reward.fn is rubric_judge
    assert (reward.kwargs["sampling"], reward.kwargs["access"]) == (Sampling(temperature=1), Access(attempts=2))
    wrong = config.model_copy(update={"kwargs": {**kwargs, "access": {"retries": 2}}})
    with pytest.raises(ValueError, match=r"rewards\.kwargs\.access"):
        load_reward(wrong, base_dir=tmp_path)


def test_rubric_as_a_list_equals_the_long_form() -> None:
    short = Task("t", "d", "p", fields={"rubric": CRITERIA})
    assert read_rubric(short).criteria == read_rubric(replace(TASK, fields={"rubric": RUBRIC})).criteria
