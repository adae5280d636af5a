"""A run file in, everything a run needs loaded and checked out, before Ray starts or a GPU is claimed.

The cheap checks come first; each failure is one `PreflightError` that names the field and the remedy.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from grpo.config import ConfigError, TrainConfig
from rewards.load import LoadedReward, RewardError, load_function, load_rewards
from rollout.tasks import TaskError, find_beside, load_tasks
from rollout.tokenizer import TaskTokenizer, TokenizerError
from rollout.types import Task

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

NUM_EXPERTS_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""What model families call their number of routed experts."""

NUM_SPECIAL_TOKENS = 8
"""More than any tokenizer adds to a plain text prompt."""

HUB_TIMEOUT_S = 2.0
"""How long to wait for the hub to take a connection before only its cache is used."""


class PreflightError(ConfigError):
    """A run that cannot work, found before anything was started."""


@dataclass(frozen=True)
class Preflight:
    """What the checks had to load anyway; training goes on with it."""

    tasks: tuple[Task, ...]
    eval_tasks: tuple[Task, ...]
    """Empty without `tasks.eval`."""
    tokenizer: TaskTokenizer
    stop_token_ids: Mapping[str, tuple[int, ...]]
    """By domain."""
    rewards: Mapping[str, tuple[LoadedReward, ...]]
    """By domain."""
    model_path: str
    """An absolute folder, or a Hugging Face id."""
    hf_config: PreTrainedConfig
    is_moe: bool


def check(config: TrainConfig, run_file: Path, *, say: Callable[[str], None] = print) -> Preflight:
    """Loads and checks tasks, rewards, model and tokenizer, building the model first where a recipe can.

    Args:
        say: told when a model is being built, which takes longer than everything else here.

    Raises:
        PreflightError: the first thing that cannot work, with its field and remedy.
    """
    base_dir = run_file.parent
    _prefer_cache_when_offline(config, base_dir, say)
    try:
        tasks, eval_tasks = _load_all_tasks(config, base_dir)
        domains = sorted({task.domain for task in (*tasks, *eval_tasks)})
        _check_domains(config, domains)
        rewards = _load_rewards(config, domains, base_dir)
        model_path = ensure_model(config, run_file, say=say)
        hf_config = load_hf_config(model_path)
        _check_model(config, hf_config)
        tokenizer = TaskTokenizer(model_path, system_prompt=config.tasks.system_prompt)
        stops = {domain: tokenizer.stop_token_ids(config.sampling_of(domain).stop) for domain in domains}
        _check_prompts(config, tokenizer, (*tasks, *eval_tasks))
    except (TaskError, RewardError, TokenizerError) as error:
        raise PreflightError(str(error)) from error
    return Preflight(tasks, eval_tasks, tokenizer, stops, rewards, model_path, hf_config, num_experts(hf_config) > 0)


def with_endpoints(preflight: Preflight, served: TrainConfig, run_file: Path) -> Preflight:
    """The same checks with the rewards of `served`, whose judges' endpoints are known by now."""
    return replace(preflight, rewards=_load_rewards(served, sorted(preflight.rewards), run_file.parent))


def _load_rewards(
    config: TrainConfig, domains: Sequence[str], base_dir: Path
) -> Mapping[str, tuple[LoadedReward, ...]]:
    return {domain: load_rewards(config.rewards_of(domain), base_dir=base_dir) for domain in domains}


def ensure_model(config: TrainConfig, run_file: Path, *, say: Callable[[str], None] = print) -> str:
    """The base model's folder or id, made by `model.recipe` if the folder is not there yet.

    The recipe writes under another name, which becomes the folder's name when it is done: half a model is never used.

    Raises:
        PreflightError: no such folder and no recipe, or the recipe cannot be imported or does not make a model.
    """
    base_dir, path = run_file.parent, config.model.path
    found = find_beside(path, base_dir)
    if found is not None:
        return str(_checked_folder(found))
    if config.model.recipe is None:
        if path.startswith((".", "/")) or path.count("/") > 1:
            raise PreflightError(
                f"model.path: no folder {path!r} in {base_dir.resolve()} or {Path.cwd()}: correct it, or set "
                "model.recipe to a function that makes the model"
            )
        return path
    try:
        build = load_function(config.model.recipe, base_dir=base_dir, field="model.recipe")
    except RewardError as error:
        raise PreflightError(str(error)) from error
    from transformers.utils import logging as transformers_logging

    target = (base_dir / path).resolve()
    say(f"building the base model {target} with {config.model.recipe} (once)")
    transformers_logging.disable_progress_bar()
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    build(partial)
    _checked_folder(partial)
    os.replace(partial, target)
    return str(target)


def domain_weights(config: TrainConfig) -> dict[str, float] | None:
    """The mixture for `TaskStream`: the weights that domains set, or None when none does."""
    weights = {name: domain.weight for name, domain in config.domains.items() if domain.weight is not None}
    return weights or None


def num_experts(hf_config: Any) -> int:
    """Routed experts per MoE layer, 0 for a dense model."""
    text_config = hf_config.get_text_config()
    return max((int(getattr(text_config, key, None) or 0) for key in NUM_EXPERTS_KEYS), default=0)


def load_hf_config(model_path: str) -> PreTrainedConfig:
    """The model's configuration, without its weights.

    Raises:
        PreflightError: the folder or id has none that transformers understands.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model_path)
    except (OSError, ValueError, KeyError) as error:
        raise PreflightError(
            f"model.path: {model_path!r} is neither a model folder nor a Hugging Face id that could be loaded: {error}"
        ) from error


def _prefer_cache_when_offline(config: TrainConfig, base_dir: Path, say: Callable[[str], None]) -> None:
    """Without a way to the hub, its client would retry for half a minute per file before it says so."""
    local = (".jsonl", ".json")
    sources = [config.tasks.train, config.tasks.eval or "", "" if config.model.recipe else config.model.path]
    remote = [name for name in sources if name and not name.endswith(local) and find_beside(name, base_dir) is None]
    if not remote or "HF_HUB_OFFLINE" in os.environ or getproxies():
        return
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname or "huggingface.co"
    try:
        socket.create_connection((host, 443), timeout=HUB_TIMEOUT_S).close()
    except OSError as error:
        say(f"{host} cannot be reached ({error}): looking for {', '.join(remote)} in the local cache only")
        os.environ["HF_HUB_OFFLINE"] = "1"


def _checked_folder(path: Path) -> Path:
    if not (path / "config.json").is_file():
        raise PreflightError(f"model.path: {path} holds no config.json: name a folder written by save_pretrained")
    return path


def _load_all_tasks(config: TrainConfig, base_dir: Path) -> tuple[tuple[Task, ...], tuple[Task, ...]]:
    if config.run.eval_every and config.tasks.eval is None:
        raise PreflightError(
            f"run.eval_every = {config.run.eval_every} but there are no held-out tasks: set tasks.eval, or eval_every "
            "= 0"
        )
    tasks = load_tasks(config.tasks.train, config.tasks, base_dir=base_dir)
    if config.tasks.eval is None:
        return tasks, ()
    return tasks, load_tasks(config.tasks.eval, config.tasks, base_dir=base_dir)


def _check_domains(config: TrainConfig, domains: Sequence[str]) -> None:
    unknown = sorted(set(config.domains) - set(domains))
    if unknown:
        raise PreflightError(
            f"domains.{unknown[0]}: no task has this domain (domains of the tasks: {', '.join(domains)}): correct the "
            'name, or fill the tasks\' "domain" column'
        )


def _check_model(config: TrainConfig, hf_config: PreTrainedConfig) -> None:
    text_config = hf_config.get_text_config()
    context = getattr(text_config, "max_position_embeddings", None)
    if context is not None and config.longest_sequence > context:
        raise PreflightError(
            f"sampling.max_new_tokens: tasks.max_prompt_tokens + max_new_tokens = {config.longest_sequence} is more "
            f"than the model's context of {context} tokens: shorten one of them"
        )
    heads, engines = getattr(text_config, "num_attention_heads", None), config.rollout.tensor_parallel_size
    if heads is not None and heads % engines:
        raise PreflightError(
            f"rollout.tensor_parallel_size = {engines} does not divide the model's {heads} attention heads: choose a "
            "divisor"
        )
    if config.stability.keep_routing and num_experts(hf_config) > 0:
        _check_router(hf_config)


def _check_router(hf_config: PreTrainedConfig) -> None:
    from stability.keep_routing import UnknownRouterError, check_supported

    try:
        check_supported(hf_config)
    except UnknownRouterError as error:
        raise PreflightError(f"stability.keep_routing: {error}") from error


def _check_prompts(config: TrainConfig, tokenizer: TaskTokenizer, tasks: Sequence[Task]) -> None:
    """Encodes what could be too long; a plain text has at most as many tokens as bytes."""
    limit = config.tasks.max_prompt_tokens
    for task in tasks:
        if isinstance(task.prompt, str) and config.tasks.system_prompt is None:
            num_bytes = len(task.prompt.encode())
            if num_bytes + NUM_SPECIAL_TOKENS <= limit:
                continue
        num_tokens = len(tokenizer.encode(task))
        if num_tokens > limit:
            raise PreflightError(
                f"task {task.id}: its prompt has {num_tokens} tokens, tasks.max_prompt_tokens is {limit}: raise it, or "
                "leave the task out"
            )
