"""How a judge model samples and how its endpoint is reached: the tables `sampling` and `access` of a judge's kwargs."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field


class Sampling(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """What a verdict depends on besides model and prompt; all of it is part of the cache key."""

    temperature: float = Field(default=0.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_tokens: int = Field(default=1024, ge=0)
    """Longest verdict; one that is cut off counts as garbage. 0 leaves the field out of the request."""
    seed: int = Field(default=0, ge=0)
    """Sent with the request; a repeated attempt sends the next number."""
    guided: bool = True
    """Ask for JSON of the verdict's schema (`response_format`). Off, for endpoints that do not know it: the schema is
    only described in the prompt, and more verdicts will be garbage."""
    rationale_chars: int = Field(default=300, ge=0)
    """Most characters of the reason that comes before every score; 0 sets no bound, for endpoints that refuse
    `maxLength`."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Further fields of the request body, for example `{ chat_template_kwargs = { enable_thinking = false } }`."""


class Access(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """How the endpoint is reached. Nothing here changes a verdict."""

    concurrency: int = Field(default=16, ge=1)
    """Requests under way to one endpoint, over all processes of one machine."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Longest wait for one reply."""
    attempts: int = Field(default=4, ge=1)
    """Tries for one verdict, the first included: after a dropped connection, a timeout, HTTP 408, 429 or 5xx, or a
    reply that is no verdict."""
    backoff_s: float = Field(default=0.5, ge=0)
    """Wait before the second try, doubled for each further one (30 s at most, and at least what `Retry-After` asks),
    times a random factor between 0.5 and 1."""
    api_key_env: str = ""
    """Name of the environment variable with the endpoint's key; keys have no place in run files."""
    cache: str | None = None
    """SQLite file of verdicts; unset: `keel/judge.sqlite` in the user's cache folder; empty: no cache."""
