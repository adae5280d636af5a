"""How a vLLM engine is started: environment, arguments, CPU build's peculiarities. Imports vLLM only when called."""

from __future__ import annotations

import importlib
import os
from typing import Any

from rollout.config import RolloutConfig
from rollout.vllm_plugin import ENGINE_VARIABLE, check_version, register
from rollout.vllm_plugin.precision import ENGINE_ARGUMENTS

_NUM_EXTRA_SLOTS = 32
"""For sequences that go first: they take no other one's place. A probe has so many."""
_CPU_KV_CACHE_GIB = 0.25
_CPU_BLOCK_SIZE = 32
"""The least that vLLM's CPU attention takes; short sequences waste less of a small block."""


def start_llm_engine(
    model_path: str,
    config: RolloutConfig,
    *,
    max_model_len: int,
    record_kept: bool,
    record_routing: bool,
    seed: int,
) -> Any:
    """A `vllm.v1.engine.llm_engine.LLMEngine` in this process, to be driven by the calling thread alone.

    Its sequences come and go by the scheduler (`rollout/vllm_plugin/scheduler.py`). Sets the environment that vLLM
    reads at import. Raises UnsupportedVllmError for a vLLM that the scheduler does not fit.
    """
    # What an engine needs is imported here, and the engine is made in another function: of a module that is missing,
    # vLLM keeps the error for as long as the process lives, with every frame that was on the stack and what is in it.
    _set_environment(config)
    register()
    import vllm
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    check_version(vllm.__version__)
    for module in ("vllm.v1.engine.llm_engine", "rollout.vllm_plugin.recorder"):
        importlib.import_module(module)
    _import_model(model_path)
    arguments = _common_arguments(model_path, config) | {
        "max_model_len": max_model_len,
        "return_sampling_mask": record_kept,
        "seed": seed,
    }
    model = EngineArgs(**arguments).create_model_config()
    arguments["enable_return_routed_experts"] = record_routing and model.is_moe
    if current_platform.is_cpu():
        arguments |= _cpu_arguments(config, latent_attention=model.is_deepseek_mla)
    else:
        arguments |= _gpu_arguments(config)
    return _make_engine(EngineArgs(**arguments), config)


def _make_engine(arguments: Any, config: RolloutConfig) -> Any:
    import torch
    from vllm.platforms import current_platform
    from vllm.v1.engine.llm_engine import LLMEngine

    from rollout.vllm_plugin.recorder import start_recording

    set_num_threads = torch.set_num_threads
    if current_platform.is_cpu():
        set_num_threads(config.cpu_threads)
    engine = LLMEngine.from_engine_args(arguments)
    torch.set_num_threads = set_num_threads  # vLLM's CPU worker disables it for the whole process
    engine.collective_rpc("init_weight_transfer_engine", args=({},))
    engine.collective_rpc(start_recording)
    return engine


def _import_model(model_path: str) -> None:
    """Registers the model's class with vLLM, which would else look at it in a process of its own to keep the GPU out of
    this one: half a minute where nothing is cached yet. Here the engine is about to run in this process anyway."""
    from vllm import ModelRegistry
    from vllm.transformers_utils.config import get_config

    for architecture in get_config(model_path, trust_remote_code=False).architectures or ():
        model = ModelRegistry.models.get(architecture)
        if model is not None:  # else vLLM has more to say about it
            ModelRegistry.register_model(architecture, model.load_model_cls())


def _set_environment(config: RolloutConfig) -> None:
    os.environ[ENGINE_VARIABLE] = "1"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["OMP_NUM_THREADS"] = str(config.cpu_threads)
    # Else vLLM's CPU build wants a NUMA node for each process of a tensor-parallel engine.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # Whole GiB, and it would override the cache size asked for.
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def _common_arguments(model_path: str, config: RolloutConfig) -> dict[str, Any]:
    return {
        "model": model_path,
        "dtype": config.dtype,
        "tensor_parallel_size": config.tensor_parallel_size,
        # Within a Ray actor vLLM would start actors of its own, for which there is no place, and wait for them.
        "distributed_executor_backend": "uni" if config.tensor_parallel_size == 1 else "mp",
        # A step has room for at most one token of so many sequences.
        "max_num_seqs": min(config.max_concurrent_sequences + _NUM_EXTRA_SLOTS, config.max_batched_tokens),
        "max_num_active_seqs": min(config.max_concurrent_sequences, config.max_batched_tokens),
        "max_num_batched_tokens": config.max_batched_tokens,
        "enable_chunked_prefill": True,
        "enable_prefix_caching": True,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        "weight_transfer_config": {"backend": "keel"},
        "disable_log_stats": True,
        "scheduling_policy": "priority",  # equal ones in the order of their arrival
        "scheduler_cls": "rollout.vllm_plugin.scheduler.RecordingScheduler",
        "use_tqdm_on_load": False,
        **ENGINE_ARGUMENTS,
    }


def _gpu_arguments(config: RolloutConfig) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "gpu_memory_utilization": config.gpu_memory_fraction,
        "enforce_eager": config.enforce_eager,
        "enable_sleep_mode": config.sleep_while_training,
    }
    if config.kv_cache_gib is not None:
        arguments["kv_cache_memory_bytes"] = int(config.kv_cache_gib * 2**30)
    return arguments


def _cpu_arguments(config: RolloutConfig, *, latent_attention: bool) -> dict[str, Any]:
    """Eager mode (routes are captured outside compiled code only), a cache in bytes, two ways round DeepSeek bugs."""
    arguments: dict[str, Any] = {
        "enforce_eager": True,
        "block_size": _CPU_BLOCK_SIZE,
        "kv_cache_memory_bytes": int((config.kv_cache_gib or _CPU_KV_CACHE_GIB) * 2**30),
    }
    if latent_attention:
        # The CPU build's latent attention turns off the prefix cache, which recording routes needs, and its rotary
        # kernel is wrong for the query's shape there.
        os.environ["VLLM_MLA_DISABLE"] = "1"
        arguments["compilation_config"] = {"custom_ops": ["-rotary_embedding"]}
    return arguments
