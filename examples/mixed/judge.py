"""A judge without a language model, so that the example runs anywhere: `rubric_judge` asks a small server of this file.

The server speaks as an OpenAI-compatible endpoint does and grades by rules. Everything else is what a real judge gets:
prompts with the task's rubric, replies of the verdict's schema, parts by criterion.
"""

from __future__ import annotations

import functools
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rewards.judge.settings import Access
from rewards.rubric_judge import rubric_judge
from rewards.types import Answer, RewardResult
from rollout.types import Task

_FENCED = r"<<<{name} \w+>>>\n(.*?)\n<<<END {name} "


async def judged_by_rules(task: Task, answer: Answer) -> RewardResult:
    """The shipped rubric judge, asking the server below; no verdict is kept on disk."""
    return await rubric_judge(task, answer, endpoint=_endpoint(), model="rules", access=Access(cache=""))


def is_sentence(task: Task, answer: Answer) -> float:
    """1 for text that ends with a full stop and has no other one."""
    return float(answer.text.endswith(".") and answer.text.count(".") == 1)


def grade(task: str, answer: str) -> dict[str, float]:
    """What the rules say of each criterion, from 0 to 1."""
    name, verb = re.findall(r"ask (\w+) to (\w+)", task)[0]
    words = re.findall(r"\w+", answer)
    return {
        "polite": ("dear" in words) / 2 + ("please" in words) / 2,
        "complete": (name in words) / 2 + (verb in words) / 2,
    }


@functools.cache
def _endpoint() -> str:
    """Starts the server in this process, once."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = json.dumps(_verdict(request))
        message = {"role": "assistant", "content": content}
        body = json.dumps({"choices": [{"index": 0, "finish_reason": "stop", "message": message}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: a line per request would flood the reward's output."""


def _verdict(request: dict[str, Any]) -> dict[str, Any]:
    user = request["messages"][-1]["content"]
    task, answer = (re.findall(_FENCED.format(name=name), user, re.DOTALL)[0] for name in ("TASK", "ANSWER"))
    criteria = request["response_format"]["json_schema"]["schema"]["properties"]["criteria"]["properties"]
    shares = grade(task, answer)
    return {
        "manipulation_attempt": False,
        "criteria": {
            name: {"rationale": "by rule", "score": _on_scale(shares[name], c)} for name, c in criteria.items()
        },
    }


def _on_scale(share: float, criterion: dict[str, Any]) -> int:
    steps = criterion["properties"]["score"]["enum"]
    return steps[round(share * (len(steps) - 1))]
