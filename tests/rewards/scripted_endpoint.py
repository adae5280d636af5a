"""A real HTTP server on loopback that speaks enough of the OpenAI protocol to play any judge, good or bad."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """What the endpoint does with one request."""

    status: int = 200
    body: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    drop: bool = False
    """Close the connection without a word."""


Script = Callable[[int, Body], Step]
"""Number of the request (from 0) and its body in, what to do out."""


class Endpoint:
    """A running endpoint with what it has seen."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.bodies: list[Body] = []
        self.headers: list[Mapping[str, str]] = []
        self.most_at_once = 0
        self.closing = threading.Event()
        self._now = 0
        self._lock = threading.Lock()
        self.url = ""

    def enter(self, body: Body, headers: Mapping[str, str]) -> int:
        with self._lock:
            self.bodies.append(body)
            self.headers.append(headers)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            return len(self.bodies) - 1

    def leave(self) -> None:
        with self._lock:
            self._now -= 1


@contextmanager
def scripted(script: Script | Step | Sequence[Step]) -> Iterator[Endpoint]:
    """An endpoint that plays `script` for the block; of a sequence of steps the last one is repeated."""
    endpoint = Endpoint(_as_script(script))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            step = endpoint.script(endpoint.enter(body, dict(self.headers)), body)
            endpoint.closing.wait(step.delay_s)
            endpoint.leave()
            self.close_connection = True
            if step.drop:
                self.connection.shutdown(socket.SHUT_RDWR)
            else:
                self._reply(step)

        def _reply(self, step: Step) -> None:
            data = step.body.encode()
            self.send_response(step.status)
            for name, value in {**step.headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            return

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128  # else a burst of connections waits for the kernel to try again

        def handle_error(self, request: Any, client_address: Any) -> None:
            return  # a client that gave up waiting is part of the script

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        endpoint.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        try:
            yield endpoint
        finally:
            endpoint.closing.set()
            server.shutdown()


def _as_script(script: Script | Step | Sequence[Step]) -> Script:
    if isinstance(script, Step):
        return lambda number, body: script
    if isinstance(script, Sequence):
        return lambda number, body: script[min(number, len(script) - 1)]
    return script


def completion(text: str | None, *, finish_reason: str = "stop", refusal: str | None = None) -> Step:
    """A chat completion with that text."""
    message = {"role": "assistant", "content": text, "refusal": refusal}
    return Step(body=json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": finish_reason}]}))


def verdict(scores: Mapping[str, Any], *, manipulation: bool = False) -> Step:
    """A verdict with those scores by criterion id."""
    criteria = {name: {"rationale": "because", "score": value} for name, value in scores.items()}
    return completion(json.dumps({"manipulation_attempt": manipulation, "criteria": criteria}))


def preference(better: Mapping[str, str], *, first: bool = False, second: bool = False) -> Step:
    """A comparison with those decisions by criterion id; `first` and `second` are flags of manipulation."""
    criteria = {name: {"rationale": "because", "better": value} for name, value in better.items()}
    flags = {"manipulation_first": first, "manipulation_second": second}
    return completion(json.dumps({**flags, "criteria": criteria}))


def seen(body: Body, name: str) -> str:
    """The text between the markers `name` of a request's user message."""
    found = re.search(rf"<<<{name} (\w+)>>>\n(.*)\n<<<END {name} \1>>>", body["messages"][-1]["content"], re.DOTALL)
    assert found is not None, body["messages"]
    return found.group(2)


_TURN = re.compile(r"<\|(?:im_start|im_end|start_header_id|end_header_id|eot_id)\|>|<\uff5c\w+\uff5c>|\[/?INST\]")
_FENCED = re.compile(r"<<<(TASK|ANSWER|FIRST|SECOND|REFERENCE)[^>]*>>>.*?(?:<<<END \1[^>]*>>>|$)", re.DOTALL)
_INVISIBLE = re.compile("[\u200b\u2060\ufeff\u202e]")


def gullible(number: int, body: Body) -> Step:
    """A judge that grades low, and gives top marks where it is told to by text outside the markers.

    As gullible as a weak model: it takes any closing marker for the right one whatever its code, tokenises the special
    tokens of several chat templates wherever they stand, so that they begin a new turn, and does not see invisible
    characters.
    """
    chat = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>" for m in body["messages"])
    turns = _TURN.split(_INVISIBLE.sub("", chat))
    outside = " ".join(_FENCED.sub("", turn) for turn in turns)
    top = "highest score" in outside
    if "response_format" not in body:
        return verdict({"clarity": 5 if top else 2})
    criteria = body["response_format"]["json_schema"]["schema"]["properties"]["criteria"]["properties"]
    return verdict({name: max(s["enum"]) if top else min(s["enum"]) + 1 for name, s in _scores(criteria).items()})


def _scores(criteria: Mapping[str, Any]) -> dict[str, Any]:
    return {name: entry["properties"]["score"] for name, entry in criteria.items()}
