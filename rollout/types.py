"""The data that leaves the rollout room: tasks in, groups of token-exact completions out.

This is the ground floor: frozen dataclasses over numpy arrays, no torch, no vLLM, no Ray. Shapes use
P = prompt tokens, T = sampled tokens, N = kept ids in all, L = decoder layers, K = experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

ReplayHandle = Any
"""An opaque reference to a `Replay` that stays on the node where it was recorded (an ObjectRef on a cluster)."""


@dataclass(frozen=True, slots=True)
class Task:
    """One prompt with whatever its rewards need to judge an answer.

    Example: `Task(id="train-17", domain="arithmetic", prompt="12+30=", answer="42")`.
    """

    id: str
    domain: str
    """Chooses the `[domains.NAME]` overrides: sampling, stability knobs, rewards."""
    prompt: str | tuple[Mapping[str, Any], ...]
    """Plain text, or chat messages (`{"role": ..., "content": ...}`) for the tokenizer's chat template."""
    answer: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Every other column of the data set, untouched: tests, rubric, metadata."""


class FinishReason(StrEnum):
    """Why the engine stopped drawing tokens."""

    STOP = "stop"
    """An end-of-sequence or stop token was sampled; it is the last token of the completion."""
    LENGTH = "length"
    """`max_new_tokens` or the context length was reached."""
    ABORT = "abort"
    """The request was cancelled; what was drawn so far is complete and token-exact."""


@dataclass(frozen=True, slots=True)
class KeptSets:
    """The sampler's support S_t at every sampled token, as compressed sparse rows.

    Example, three tokens with supports {4, 9}, {7}, {1, 2, 5}: `offsets = [0, 2, 3, 6]`, `ids = [4, 9, 7, 1, 2, 5]`.
    """

    offsets: np.ndarray  # int64 [T + 1]
    ids: np.ndarray  # int32 [N], ascending inside each row

    def __post_init__(self) -> None:
        if self.offsets.dtype != np.int64 or self.ids.dtype != np.int32:
            raise TypeError(
                f"KeptSets wants int64 offsets and int32 ids, got {self.offsets.dtype} and {self.ids.dtype}"
            )
        if self.offsets.ndim != 1 or self.offsets[0] != 0 or self.offsets[-1] != len(self.ids):
            raise ValueError(
                f"KeptSets offsets must run from 0 to {len(self.ids)}, got {self.offsets[:1]}..{self.offsets[-1:]}"
            )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, t: int) -> np.ndarray:
        """The token ids that survived truncation at sampled token `t`."""
        return self.ids[self.offsets[t] : self.offsets[t + 1]]

    def contains(self, token_ids: np.ndarray) -> np.ndarray:
        """Whether each sampled token lies in its own set: bool [T]. False anywhere means the record is corrupt."""
        rows = np.repeat(np.arange(len(self)), np.diff(self.offsets))
        hit = np.zeros(len(self), bool)
        hit[rows[self.ids == token_ids[rows]]] = True
        return hit


@dataclass(frozen=True, slots=True)
class Replay:
    """What the engine recorded while it drew one completion, for training to replay.

    The heavy part of a completion (routes alone are 384 bytes per token on Qwen3-30B-A3B). It travels from the node
    that recorded it to the learner rank that uses it; the driver only ever holds a handle.
    """

    kept: KeptSets | None
    """None says that the sampler did not truncate: the support is the whole vocabulary."""
    routed_experts: np.ndarray | None  # uint8 | uint16 | int16 [P + T - 1, L, K]
    """Expert ids per input position and decoder layer; rows of dense layers are ignored; -1 = unknown. The last sampled
    token was never fed to the model, so it has no row. None: routes were not recorded (dense model, or replay off)."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer, token-exact: these ids are trained on as they are and never re-tokenised."""

    token_ids: np.ndarray  # int32 [T]
    behavior_logprobs: np.ndarray  # float32 [T]
    """log pi_old(o_t) of the processed distribution (temperature, then truncation, renormalised), as the engine
    returned it."""
    policy_versions: np.ndarray  # int32 [T]
    """The weights that drew each token; they may change in flight."""
    finish_reason: FinishReason
    seed: int
    """The engine draws the same tokens again from the same prompt, weights and seed."""
    replay: Replay | ReplayHandle
    record_error: str = ""
    """Why this record must not be trained on; empty for a sound one. Judged beside the record, before it is handed
    over."""
    common_routes: int = 0
    """Leading prompt positions at which the record names the same experts as that of the request's first completion;
    counted beside the record, all where no routes are recorded."""

    def __post_init__(self) -> None:
        lengths = {len(self.token_ids), len(self.behavior_logprobs), len(self.policy_versions)}
        if len(lengths) != 1:
            raise ValueError(f"a completion's arrays must have one length, got {sorted(lengths)}")

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def find_record_error(self, num_prompt_tokens: int) -> str:
        """What is wrong with the record, in words, or an empty string. A corrupt record is dropped, never repaired."""
        replay = self.replay
        if self.num_tokens == 0:
            return "no token was sampled"
        if not np.isfinite(self.behavior_logprobs).all():
            return "a behavior log-probability is not finite"
        if replay.kept is not None:
            if len(replay.kept) != self.num_tokens:
                return f"{len(replay.kept)} kept sets for {self.num_tokens} tokens"
            if not replay.kept.contains(self.token_ids).all():
                return "a sampled token lies outside its kept set"
        if replay.routed_experts is not None and len(replay.routed_experts) != num_prompt_tokens + self.num_tokens - 1:
            return (
                f"{len(replay.routed_experts)} rows of routes for {num_prompt_tokens} + {self.num_tokens} - 1 positions"
            )
        return ""


@dataclass(frozen=True, slots=True)
class Group:
    """A task and the G completions drawn for it: the unit that advantages are computed over."""

    index: int
    """Position in the run's stream of groups; with the run's seed it decides every sample's seed."""
    task: Task
    prompt_token_ids: np.ndarray  # int32 [P]
    completions: tuple[Completion, ...]


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """What a rollout worker is asked for: one completion per seed, all for one prompt."""

    prompt_token_ids: np.ndarray  # int32 [P]
    seeds: tuple[int, ...]
    temperature: float
    top_p: float
    top_k: int
    """0 = no top-k bound."""
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    goes_first: bool = False
    """Starts before every waiting request that does not; nothing that runs makes room for it."""
