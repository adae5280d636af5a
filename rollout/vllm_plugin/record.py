"""What goes into vLLM for one sequence, and what comes out of it.

A finished sequence becomes a `Completion`: shapes checked, nothing repaired.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rollout.types import Completion, FinishReason, GenerateRequest, KeptSets, Replay


class EngineError(RuntimeError):
    """The engine cannot do what was asked, or returned a record that does not hold together."""


class EngineDiedError(EngineError):
    """The engine has ended, of itself or because it was shut down; it will not answer again."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters of one engine since it was built, and what it is doing now."""

    num_running: int = 0
    """Sequences that are being prefilled or decoded."""
    num_waiting: int = 0
    """Sequences that wait for room."""
    num_finished: int = 0
    """Sequences that ended by themselves."""
    num_preemptions: int = 0
    """Times that finished sequences had lost their KV cache and were computed again: no room, or new weights."""
    prompt_tokens: int = 0
    """Prompt tokens of the finished sequences."""
    cached_prompt_tokens: int = 0
    """Those of them that the prefix cache saved."""
    generated_tokens: int = 0
    """Tokens sampled for the finished sequences."""
    num_steps: int = 0
    """Engine steps run."""
    policy_version: int = 0
    """The weights in force."""

    def with_finished(self, sequence: FinishedSequence) -> EngineStats:
        """The counters after one more sequence."""
        return replace(
            self,
            num_finished=self.num_finished + 1,
            num_preemptions=self.num_preemptions + sequence.num_preemptions,
            prompt_tokens=self.prompt_tokens + sequence.num_prompt_tokens,
            cached_prompt_tokens=self.cached_prompt_tokens + sequence.num_cached_tokens,
            generated_tokens=self.generated_tokens + len(sequence.token_ids),
        )


@dataclass(frozen=True, slots=True)
class FinishedSequence:
    """What the scheduler hands out for a sequence that has ended, with everything recorded of it."""

    request_id: str
    token_ids: np.ndarray  # int32 [T]
    logprobs: np.ndarray  # float32 [T]
    versions: np.ndarray  # int32 [T], the weights that drew each token
    kept: KeptSets | None
    """Empty sets for a request that does not truncate; None if the engine does not record sets."""
    routed_experts: np.ndarray | None  # [P + T - 1, L, K]
    """None if the engine does not record routes, or no token was sampled."""
    finish_reason: str
    """vLLM's word for it."""
    num_prompt_tokens: int
    num_cached_tokens: int
    """Of the prompt, saved by the prefix cache."""
    num_preemptions: int


def check_request(request: GenerateRequest, *, max_model_len: int, vocab_size: int) -> None:
    """Raises ValueError, with the remedy, for a request that the engine could not serve as asked."""
    num_prompt_tokens = len(request.prompt_token_ids)
    if not 0 < num_prompt_tokens < max_model_len:
        raise ValueError(
            f"prompt_token_ids holds {num_prompt_tokens} tokens, but the engine takes 1 to {max_model_len - 1}; "
            "shorten the prompt or raise max_model_len"
        )
    if request.prompt_token_ids.min() < 0 or request.prompt_token_ids.max() >= vocab_size:
        raise ValueError(
            f"prompt_token_ids must lie in [0, {vocab_size}), the model's vocabulary; was the prompt encoded with "
            "another model's tokenizer?"
        )
    if not request.seeds or min(request.seeds) < 0 or max(request.seeds) >= 2**63:
        raise ValueError(f"seeds must be one or more integers in [0, 2**63), got {request.seeds}")
    if request.temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {request.temperature}; greedy is top_k = 1")


def make_requests(core: Any, request_ids: Sequence[str], request: GenerateRequest, vocab_size: int) -> list[Any]:
    """vLLM's `Request`s, one per seed, as its `EngineCore` would have them from a front end."""
    from vllm.v1.request import Request

    prompt, hasher = request.prompt_token_ids.tolist(), core.request_block_hasher
    params = sampling_params(request, request.seeds[0], vocab_size)
    made: list[Any] = []
    for request_id, seed in zip(request_ids, request.seeds, strict=True):
        params = copy(params)
        params.seed = seed
        one = Request(
            request_id=request_id,
            prompt_token_ids=prompt,
            sampling_params=params,
            pooling_params=None,
            block_hasher=None if made else hasher,
            priority=-1 if request.goes_first else 0,
        )
        if made:  # the blocks of a prompt are hashed once
            one.block_hashes, one._block_hasher = made[0].block_hashes.copy(), hasher
        made.append(one)
    return made


def sampling_params(request: GenerateRequest, seed: int, vocab_size: int) -> Any:
    """vLLM's `SamplingParams` for one seed of a request: only the request's own stop ids end it, text is never made."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k or vocab_size,
        max_tokens=request.max_new_tokens,
        stop_token_ids=list(request.stop_token_ids),
        ignore_eos=True,
        seed=seed,
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        skip_clone=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def truncates(request: GenerateRequest, vocab_size: int) -> bool:
    """Whether sampling removes any id; a top_k of the whole vocabulary does not."""
    return request.top_p < 1 or 0 < request.top_k < vocab_size


def read_completion(
    sequence: FinishedSequence, request: GenerateRequest, seed: int, *, has_kept: bool, has_routes: bool
) -> Completion:
    """A finished sequence as a Completion with its Replay.

    `has_kept` says whether its kept sets are wanted, `has_routes` whether the engine records routes. A token outside
    its kept set is left for the consumer to find. Raises EngineError where lengths disagree.
    """
    num_tokens = len(sequence.token_ids)
    for what, length in (("log-probs", len(sequence.logprobs)), ("weight versions", len(sequence.versions))):
        if length != num_tokens:
            raise EngineError(f"vLLM returned {length} {what} for {num_tokens} tokens (seed {seed})")
    kept = sequence.kept if has_kept else None
    if has_kept and (kept is None or len(kept) != num_tokens):
        raise EngineError(f"vLLM returned {0 if kept is None else len(kept)} kept sets for {num_tokens} tokens")
    num_rows = len(request.prompt_token_ids) + num_tokens - 1
    routes = _check_routes(sequence.routed_experts, num_rows if num_tokens else 0) if has_routes else None
    return Completion(
        token_ids=sequence.token_ids,
        behavior_logprobs=sequence.logprobs,
        policy_versions=sequence.versions,
        finish_reason=_read_finish_reason(sequence.finish_reason),
        seed=seed,
        replay=Replay(kept=kept, routed_experts=routes),
    )


def _check_routes(routes: np.ndarray | None, num_rows: int) -> np.ndarray | None:
    if num_rows == 0:
        return None
    if routes is None or routes.ndim != 3 or len(routes) != num_rows:
        shape = None if routes is None else routes.shape
        raise EngineError(f"vLLM returned routes {shape}, expected [{num_rows}, layers, experts per token]")
    return routes


def _read_finish_reason(reason: str) -> FinishReason:
    try:
        return FinishReason(reason)
    except ValueError as error:
        raise EngineError(f"vLLM ended a sequence with '{reason}'; see its log for why") from error
