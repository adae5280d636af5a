"""Prompts in, verdicts out: an OpenAI-compatible endpoint with a limit on requests, retries, and a cache.

Consumes messages and a schema; waits for a slot and for the endpoint. Knows nothing of rubrics: what a reply has to be
is decided by the function that reads it.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from rewards.judge.cache import VerdictCache, cache_key, default_path
from rewards.judge.prompts import Messages
from rewards.judge.schema import BadVerdict
from rewards.judge.settings import Access, Sampling
from rewards.judge.slots import Slots
from rewards.types import Abstain

T = TypeVar("T")

OWNED = "keel"
"""As an endpoint: a server that the run starts itself (`keel`, or `keel:` and the GPUs it may use)."""
MAX_BACKOFF_S = 30.0
MAX_RETRY_AFTER_S = 120.0
"""A server that asks for a longer pause is taken at this much."""
CHECK_TIMEOUT_S = 20.0
_RETRIED_STATUS = frozenset({408, 429, 500, 502, 503, 504})


class JudgeError(RuntimeError):
    """An endpoint that cannot be used: refused the request, or did not answer after all attempts."""


class _TryAgain(Exception):
    """A failure that may be gone at the next attempt."""

    def __init__(self, why: str, pause_s: float = 0.0) -> None:
        super().__init__(why)
        self.pause_s = pause_s


@dataclass(frozen=True, slots=True)
class _Channel:
    """What all requests of one event loop to one endpoint share."""

    http: httpx.AsyncClient
    slots: Slots


_channels: dict[tuple[asyncio.AbstractEventLoop, str, int], _Channel] = {}


@dataclass(frozen=True, slots=True)
class Judge:
    """One judge model behind one endpoint."""

    endpoint: str
    """Base URL up to and including the version, for example `http://127.0.0.1:8199/v1`."""
    model: str
    sampling: Sampling
    access: Access

    async def ask(
        self,
        make_messages: Callable[[], Messages],
        schema: dict[str, Any],
        read: Callable[[str], T],
        key: dict[str, Any],
    ) -> T:
        """One verdict, from the cache or from the model.

        Args:
            make_messages: makes the prompt; called for every attempt, so that each has its own nonce.
            schema: JSON schema of the verdict.
            read: makes the verdict of a reply; raises BadVerdict for one that is none.
            key: everything that the verdict depends on, model and sampling aside.

        Raises:
            Abstain: the model refused, or no attempt gave a verdict.
            JudgeError: the endpoint refused the request, or the last attempt got no reply.
        """
        digest = cache_key(key | {"model": self.model, "sampling": self.sampling.model_dump()})
        cache = _cache_of(self.access.cache)
        cached = None if cache is None else await asyncio.to_thread(cache.get, digest)
        if cached is not None:
            return read(cached)
        reply, verdict = await self._try(make_messages, schema, read)
        if cache is not None:
            await asyncio.to_thread(cache.put, digest, reply)
        return verdict

    async def _try(
        self, make_messages: Callable[[], Messages], schema: dict[str, Any], read: Callable[[str], T]
    ) -> tuple[str, T]:
        """The first reply that can be read, and what it says."""
        failure: Exception = AssertionError("no attempt was made")
        for attempt in range(self.access.attempts):
            if attempt:
                await asyncio.sleep(self._pause(attempt, failure))
            try:
                reply = await self._post(self._body(make_messages(), schema, attempt))
                return reply, read(reply)
            except (_TryAgain, BadVerdict) as error:
                failure = error
        tries = f"{self.access.attempts} attempt{'s' if self.access.attempts > 1 else ''}"
        if isinstance(failure, BadVerdict):
            raise Abstain(f"no verdict from {self.model} in {tries}: {failure}")
        raise JudgeError(f"judge {self.model} at {self.endpoint}: no reply in {tries}: {failure}")

    def _pause(self, attempt: int, failure: Exception) -> float:
        backoff = min(MAX_BACKOFF_S, self.access.backoff_s * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)
        return max(backoff, failure.pause_s if isinstance(failure, _TryAgain) else 0.0)

    def _body(self, messages: Messages, schema: dict[str, Any], attempt: int) -> dict[str, Any]:
        sampling = self.sampling
        body: dict[str, Any] = {"model": self.model, "messages": messages, "seed": sampling.seed + attempt}
        body |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
        if sampling.max_tokens:
            body["max_tokens"] = sampling.max_tokens
        if sampling.guided:
            named = {"name": "verdict", "strict": True, "schema": schema}
            body["response_format"] = {"type": "json_schema", "json_schema": named}
        return body | sampling.extra

    async def _post(self, body: dict[str, Any]) -> str:
        """The text of one reply."""
        channel = self._channel()
        async with channel.slots.hold():
            try:
                async with asyncio.timeout(self.access.timeout_s):
                    response = await channel.http.post(
                        f"{self.endpoint.rstrip('/')}/chat/completions", json=body, headers=self._headers()
                    )
            except TimeoutError:
                raise _TryAgain(f"nothing within {self.access.timeout_s:g} s (access.timeout_s)") from None
            except httpx.TransportError as error:
                raise _TryAgain(f"{type(error).__name__}: {error}") from None
        return self._read_response(response)

    def _read_response(self, response: httpx.Response) -> str:
        if response.status_code in _RETRIED_STATUS:
            raise _TryAgain(f"HTTP {response.status_code}", _retry_after(response))
        if response.status_code != httpx.codes.OK:
            raise JudgeError(
                f"judge {self.model} at {self.endpoint}: HTTP {response.status_code}: {response.text[:500]}"
            )
        try:
            choice = response.json()["choices"][0]
            message = choice["message"]
            text, refusal, reason = message.get("content"), message.get("refusal"), choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError):
            raise BadVerdict("the response is not a chat completion") from None
        if refusal or reason == "content_filter":
            raise Abstain(f"{self.model} refused: {str(refusal or reason)[:200]}")
        if reason == "length":
            raise BadVerdict(f"the reply was cut off at sampling.max_tokens = {self.sampling.max_tokens}")
        if not isinstance(text, str):
            raise BadVerdict("the response has no text")
        return text

    def _headers(self) -> dict[str, str]:
        name = self.access.api_key_env
        if not name:
            return {}
        if name not in os.environ:
            raise JudgeError(f"access.api_key_env: no environment variable {name!r} where rewards run: set it there")
        return {"Authorization": f"Bearer {os.environ[name]}"}

    def _channel(self) -> _Channel:
        key = (asyncio.get_running_loop(), self.endpoint, self.access.concurrency)
        if key not in _channels:
            for closed in [other for other in _channels if other[0].is_closed()]:
                del _channels[closed]
            _channels[key] = _open_channel(self.endpoint, self.access.concurrency)
        return _channels[key]


def check_endpoint(endpoint: str) -> None:
    """Asks whether anything answers there, whatever it says.

    Raises:
        JudgeError: it is no URL, or nothing does.
    """
    trust_env, verify = _reach(endpoint)
    try:
        with httpx.Client(timeout=CHECK_TIMEOUT_S, trust_env=trust_env, verify=verify) as http:
            http.get(f"{endpoint.rstrip('/')}/models")
    except httpx.TransportError as error:
        raise JudgeError(
            f"judge at {endpoint}: nothing answers there ({type(error).__name__}: {error}): start it, with "
            "`keel judge MODEL` for example, or correct the endpoint"
        ) from None


def _open_channel(endpoint: str, concurrency: int) -> _Channel:
    trust_env, verify = _reach(endpoint)
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    # No timeout here: every request has its own.
    http = httpx.AsyncClient(limits=limits, timeout=None, trust_env=trust_env, verify=verify)
    return _Channel(http, Slots(endpoint, concurrency))


def _reach(endpoint: str) -> tuple[bool, bool]:
    """Whether a proxy from the environment counts, and whether certificates do; raises JudgeError if it is no URL."""
    url = urlsplit(endpoint)
    if url.scheme not in ("http", "https") or not url.hostname:
        owned = endpoint.partition(":")[0] == OWNED
        why = "is a server that only a run starts: start `keel judge MODEL`" if owned else "is not a URL"
        raise JudgeError(f"endpoint {endpoint!r} {why}; give a URL like http://127.0.0.1:8199/v1")
    # A proxy is for the world outside, not for a server on this machine; certificates take a while to load.
    return url.hostname not in ("localhost", "127.0.0.1", "::1"), url.scheme == "https"


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the server asks to wait; its other form, a date, is not read."""
    value = response.headers.get("retry-after", "")
    return min(float(value), MAX_RETRY_AFTER_S) if value.isdecimal() else 0.0


def _cache_of(path: str | None) -> VerdictCache | None:
    return None if path == "" else _open_cache(default_path() if path is None else Path(path).expanduser())


@lru_cache(maxsize=8)
def _open_cache(path: Path) -> VerdictCache:
    return VerdictCache(path)
