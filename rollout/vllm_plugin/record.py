"""What goes into vLLM for one sequence, and what comes out of it.

A finished output becomes a `Completion`: arrays once, shapes checked, nothing repaired.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rollout.types import Completion, FinishReason, GenerateRequest, KeptSets, Replay


class EngineError(RuntimeError):
    """The engine cannot do what was asked, or returned a record that does not hold together."""


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

    def with_finished(self, output: Any, num_preemptions: int) -> EngineStats:
        """The counters after one more vLLM `RequestOutput`."""
        return replace(
            self,
            num_finished=self.num_finished + 1,
            num_preemptions=self.num_preemptions + num_preemptions,
            prompt_tokens=self.prompt_tokens + len(output.prompt_token_ids),
            cached_prompt_tokens=self.cached_prompt_tokens + (output.num_cached_tokens or 0),
            generated_tokens=self.generated_tokens + len(output.outputs[0].token_ids),
        )


class ArrayChunks(list[Any]):
    """Collects a sequence's kept sets, one array per step, of which vLLM would make nested Python lists at the end.

    It stands in the place of `RequestState.sampling_mask_chunks` and calls itself empty, which skips that conversion.
    """

    def __bool__(self) -> bool:
        return False


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


def prompt_input(request: GenerateRequest) -> Any:
    """The prompt's ids in the form that vLLM's renderer would give them."""
    from vllm.inputs import tokens_input

    return tokens_input(request.prompt_token_ids.tolist())


def sampling_params(request: GenerateRequest, seed: int, vocab_size: int) -> Any:
    """vLLM's `SamplingParams` for one seed of a request: only the request's own stop ids end it, text is never made."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=request.temperature,
        top_p=request.top_p,
        # vLLM bounds the recorded sets by top_k, and so wants it finite.
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


def read_completion(
    output: Any, request: GenerateRequest, seed: int, *, kept_chunks: ArrayChunks | None, has_routes: bool
) -> Completion:
    """One vLLM `CompletionOutput` (final, FINAL_ONLY) as a Completion with its Replay.

    `kept_chunks` is None if the kept sets are not wanted; `has_routes` says whether the engine records routes. A token
    outside its kept set is left for the consumer to find. Raises EngineError where lengths disagree.
    """
    token_ids = np.asarray(output.token_ids, np.int32)
    num_tokens = len(token_ids)
    logprobs = np.asarray(output.logprobs.logprobs, np.float32)
    if len(logprobs) != num_tokens:
        raise EngineError(f"vLLM returned {len(logprobs)} log-probs for {num_tokens} tokens (seed {seed})")
    kept = None if kept_chunks is None else _read_kept(kept_chunks, num_tokens)
    num_rows = len(request.prompt_token_ids) + num_tokens - 1
    routes = _read_routes(output.routed_experts, num_rows if num_tokens else 0) if has_routes else None
    return Completion(
        token_ids=token_ids,
        behavior_logprobs=logprobs,
        policy_versions=_read_versions(output.weight_versions, num_tokens),
        finish_reason=_read_finish_reason(output.finish_reason),
        seed=seed,
        replay=Replay(kept=kept, routed_experts=routes),
    )


def _read_kept(chunks: ArrayChunks, num_tokens: int) -> KeptSets:
    """Joins the steps' sets; a step of several tokens brings its own offsets."""
    lengths = [np.diff(c.offsets) if c.offsets is not None else [len(c.token_ids)] for c in chunks]
    sizes = np.concatenate([np.empty(0, np.int64), *lengths])
    if len(sizes) != num_tokens:
        raise EngineError(f"vLLM returned {len(sizes)} kept sets for {num_tokens} tokens")
    offsets = np.zeros(num_tokens + 1, np.int64)
    np.cumsum(sizes, out=offsets[1:])
    return KeptSets(offsets, np.concatenate([np.empty(0, np.int32), *(c.token_ids for c in chunks)]))


def _read_routes(routes: np.ndarray | None, num_rows: int) -> np.ndarray | None:
    if num_rows == 0:
        return None
    if routes is None or routes.ndim != 3 or len(routes) != num_rows:
        shape = None if routes is None else routes.shape
        raise EngineError(f"vLLM returned routes {shape}, expected [{num_rows}, layers, experts per token]")
    return routes


def _read_versions(spans: Any, num_tokens: int) -> np.ndarray:
    """Policy version of each token, int32 [T]; the engine labels its weights with the version's digits."""
    versions = [int(span.version) for span in spans or ()]
    ends = [span.end for span in spans or ()]
    if (ends[-1] if ends else 0) != num_tokens:
        raise EngineError(f"vLLM's weight versions cover {ends[-1:]} of {num_tokens} tokens")
    return np.repeat(np.asarray(versions, np.int32), np.diff(ends, prepend=0))


def _read_finish_reason(reason: str | None) -> FinishReason:
    try:
        return FinishReason(reason or "")
    except ValueError as error:
        raise EngineError(f"vLLM ended a sequence with '{reason}'; see its log for why") from error
