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
    gate: bool = False
    """Where this reward is below 1 the total is 0; the breakdown keeps what every reward said."""
    name: str | None = None
    """Name in metrics and samples; default: the function's."""
    timeout_s: float = Field(default=30.0, gt=0)
    """Longest time for one call; a sample whose call takes longer is dropped, never scored 0."""
    memory_gib: float = Field(default=4.0, gt=0)
    """Memory that calls may add to what the reward process holds after importing its functions."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Extra keyword arguments for every call, checked against the signature at load."""
