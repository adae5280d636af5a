"""What a scheduler knows of its sequences from step to step while nothing happens but that each gets another token.

vLLM's `Request`s stay right. Here are arrays of what would otherwise be read from each of them again in every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from vllm.v1.core.sched.output import SchedulerOutput


@dataclass(slots=True, eq=False)
class Live:
    """What is remembered of a sequence besides vLLM's `Request`."""

    key: int
    """In the step log."""
    stops: frozenset[int]
    max_tokens: int
    """Sampled tokens after which it has to end, by its own bound or the model's length."""
    routes: list[np.ndarray] = field(default_factory=list)
    """Rows that were read already, stretch by stretch: of lost cache blocks, or as the sequence ends."""
    lost_blocks: list[int] | None = None
    """The blocks of a preempted sequence whose rows have yet to be read from them."""
    ended: bool = False

    def join_routes(self) -> np.ndarray | None:
        """All rows, [P + T - 1, L, K] once the sequence has ended; None if there are none."""
        if len(self.routes) > 1:
            return np.concatenate(self.routes)
        return self.routes[0] if self.routes else None


ENDED = Live(key=-1, stops=frozenset(), max_tokens=0, ended=True)


@dataclass(kw_only=True)
class DecodeStep(SchedulerOutput):
    """A step in which each of its sequences, none of them new, decodes one token."""

    computed: np.ndarray
    """int64 [B], each sequence's tokens before the step."""
    grown: list[int]
    """Those that have got new cache blocks."""


class DecodeBatch:
    """The sequences of a step to be scheduled that decodes alone, and of those after it while they stay the same."""

    def __init__(self, requests: list[Any], *, max_model_len: int) -> None:
        self.requests = requests
        self.request_ids: list[str] = [request.request_id for request in requests]
        self._computed = np.array([request.num_computed_tokens for request in requests])
        self._prompts = np.array([request.num_prompt_tokens for request in requests])
        # A step whose last token might be on its way is looked at anew, so that it can be left out.
        last = self._prompts + np.array([request.max_tokens for request in requests]) - 2
        self._num_steps = int((np.minimum(last, max_model_len - 1) - self._computed).min())

    @property
    def lasts(self) -> bool:
        """Whether the same sequences decode in the next step as well, if none leaves."""
        return self._num_steps > 0

    def find_growing(self, block_step: int) -> list[int]:
        """Those that need another cache block."""
        return np.flatnonzero(self._computed % block_step == 0).tolist()

    def advance(self) -> tuple[np.ndarray, np.ndarray]:
        """One token more for each. Returns what of each was computed and, with what is on its way, sampled before."""
        computed, num_sampled = self._computed.copy(), self._computed + 1 - self._prompts
        for request in self.requests:
            request.num_computed_tokens += 1
            request.num_in_flight_tokens += 1
            request.num_output_placeholders += 1
        self._computed += 1
        self._num_steps -= 1
        return computed, num_sampled


class StepBatch:
    """The sequences of a step that was computed, in the order of its rows."""

    def __init__(self, request_ids: list[str], requests: list[Any], lives: list[Live]) -> None:
        self.request_ids = request_ids
        self.requests = requests
        """None for one that has ended."""
        self.lives = lives
        self._takers: Takers | None = None
        self._num_departures = -1

    def find_takers(self, num_departures: int) -> Takers | None:
        """Those that take in a token of a step of one token each; None if the output of one is stale.

        `num_departures` counts the sequences that have ended or been preempted.
        """
        if num_departures != self._num_departures:
            self._num_departures = num_departures
            rows = [row for row, live in enumerate(self.lives) if not live.ended]
            is_stale = any(self.requests[row].num_stale_output_tokens for row in rows)
            self._takers = None if is_stale else Takers(self, rows)
        return self._takers

    def forget_takers(self) -> None:
        """To be called when their tokens were taken in by another way."""
        self._num_departures = -1

    def keys_of(self, rows: Sequence[int]) -> np.ndarray:
        """int64 [B], the keys of these rows, and -1."""
        keys = np.full(len(self.lives), -1)
        keys[rows] = [self.lives[row].key for row in rows]
        return keys


class Takers:
    """The rows of a batch that count, each of which takes in one token."""

    def __init__(self, batch: StepBatch, rows: list[int]) -> None:
        self._rows = rows
        self._requests = [batch.requests[row] for row in rows]
        self._lives = [batch.lives[row] for row in rows]
        self.keys = batch.keys_of(rows)
        self._lengths = np.array([request.num_tokens for request in self._requests], np.int64)
        prompts = np.array([request.num_prompt_tokens for request in self._requests], np.int64)
        self._bounds = prompts + np.array([live.max_tokens for live in self._lives], np.int64)
        self._stops = frozenset().union(*(live.stops for live in self._lives))

    def take_in(self, sampled: list[list[int]]) -> list[Any]:
        """Appends each row's token. Returns the requests that end with it."""
        tokens = [sampled[row][0] for row in self._rows]
        for request, token in zip(self._requests, tokens, strict=True):
            request._all_token_ids.append(token)
            request._output_token_ids.append(token)
            request.num_in_flight_tokens -= 1
            request.num_output_placeholders -= 1
        self._lengths += 1
        ends = self._lengths >= self._bounds
        if not self._stops.isdisjoint(tokens):
            ends |= [token in live.stops for token, live in zip(tokens, self._lives, strict=True)]
        return [self._requests[i] for i in np.flatnonzero(ends).tolist()]

    def find_at_block_ends(self, unit: int) -> list[Any]:
        """The requests with a token that completes a block, or whose value does."""
        return [self._requests[i] for i in np.flatnonzero(self._lengths % unit <= 1).tolist()]
