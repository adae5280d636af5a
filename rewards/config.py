"""One `[[rewards]]` entry."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field


class RewardConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """A reward function by name, with its weight and arguments."""

    fn: str
    """`package.module:function`, or `./file.py:function` relative to the run file."""
    weight: float = 1.0
    """The total reward is the weighted sum."""
    name: str | None = None
    """Name in metrics and samples; default: the function's."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Extra keyword arguments for every call, checked against the signature at load."""
