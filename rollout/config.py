"""What a user may set about sampling, tasks and engines."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class SamplingConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """How completions are drawn. Every number can be overridden per domain."""

    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits, in the engine and in the learner alike."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus bound; the surviving ids are recorded and replayed."""
    top_k: int = Field(default=0, ge=0)
    """Keep the k most likely ids; 0 = no bound."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Longest completion, in tokens."""
    stop: tuple[str, ...] = ()
    """Extra stop strings; each must be a single token of the tokenizer (the end-of-sequence token always stops)."""


class TasksConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Where the prompts come from."""

    train: str
    """A `.jsonl` file or a Hugging Face dataset (`name`, `name:split` or `name:config:split`)."""
    eval: str | None = None
    """Held-out tasks in the same form; evaluation is off without them."""
    prompt_key: str = "prompt"
    """Column with the prompt: text, or a list of chat messages."""
    answer_key: str = "answer"
    """Column with the reference answer that rewards see as `task.answer`."""
    system_prompt: str | None = None
    """Put before every chat prompt (turns a text prompt into a chat)."""
    max_prompt_tokens: int = Field(default=1024, ge=1)
    """A longer prompt is an error at start-up, never cut silently."""
    shuffle: bool = True
    """New seeded order every epoch; false keeps file order."""


class RolloutConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """The vLLM engines."""

    workers: int = Field(default=1, ge=1)
    """Engines; each is one Ray actor."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Engine weights and activations."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs per engine."""
    max_concurrent_sequences: int = Field(default=256, ge=1)
    """Sequences decoded together in one engine (vLLM `max_num_active_seqs`); a probe's come on top."""
    max_batched_tokens: int = Field(default=8192, ge=1)
    """Tokens per engine step; longer prompts are prefilled in chunks (vLLM `max_num_batched_tokens`)."""
    kv_cache_gib: float | None = Field(default=None, gt=0)
    """KV cache per engine; on a GPU the default is what `gpu_memory_fraction` leaves, on CPU 0.25."""
    gpu_memory_fraction: float = Field(default=0.85, gt=0, le=1)
    """Share of a GPU an engine may take."""
    sleep_while_training: bool = False
    """Give an engine's GPU memory to the learner while it trains (`cluster.layout = "colocated"` only)."""
    enforce_eager: bool = False
    """Skip CUDA graphs (always on for the CPU build)."""
    cpu_threads: int = Field(default=1, ge=1)
    """Compute threads of one engine on a machine without GPUs."""
