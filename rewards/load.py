"""Reward names in, callables out: imported, signature checked, arguments bound.

Knows nothing of groups or scoring. Whatever can be wrong with a `[[rewards]]` entry is found here, before a run starts.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rewards.config import RewardConfig


class RewardError(ValueError):
    """A function named in a run file that cannot be used: the message names the entry and the remedy."""


@dataclass(frozen=True, slots=True)
class LoadedReward:
    """A reward function that is ready to be called as `fn(task, answer, **kwargs)`."""

    name: str
    weight: float
    fn: Callable[..., Any]
    kwargs: Mapping[str, Any]


def load_reward(config: RewardConfig, *, base_dir: Path) -> LoadedReward:
    """Imports the function of one `[[rewards]]` entry and checks that it can be called.

    Args:
        base_dir: the run file's folder.

    Raises:
        RewardError: as `load_function`, or it does not take `(task, answer, **kwargs)`.
    """
    fn = load_function(config.fn, base_dir=base_dir, field="rewards.fn")
    _check_signature(config, fn)
    return LoadedReward(config.name or config.fn.rpartition(":")[2], config.weight, fn, dict(config.kwargs))


def load_rewards(configs: Sequence[RewardConfig], *, base_dir: Path) -> tuple[LoadedReward, ...]:
    """All rewards of one domain.

    Raises:
        RewardError: as `load_reward`, or two of them have one name.
    """
    loaded = tuple(load_reward(config, base_dir=base_dir) for config in configs)
    twice = [name for name, count in Counter(reward.name for reward in loaded).items() if count > 1]
    if twice:
        raise RewardError(f'rewards: two entries are called {twice[0]!r}: give each its own name = "..."')
    return loaded


def load_function(spec: str, *, base_dir: Path, field: str) -> Callable[..., Any]:
    """The function that a run file names.

    Args:
        spec: `package.module:function`, with packages beside the run file or in the working directory found too, or
            `./file.py:function` relative to the run file.
        base_dir: the run file's folder.
        field: where the run file names it, for messages.

    Raises:
        RewardError: it cannot be imported or is not callable.
    """
    where = f"{field} {spec!r}"
    module_name, _, function_name = spec.rpartition(":")
    if not module_name or not function_name:
        raise RewardError(f"{where}: write it as package.module:function or ./file.py:function")
    if module_name.endswith(".py"):
        module = _load_file(where, (base_dir / module_name).resolve())
    else:
        module = _load_module(where, module_name, base_dir)
    fn = getattr(module, function_name, None)
    if fn is None:
        raise RewardError(f"{where}: {module_name} has no {function_name!r}; it has {_public_functions(module)}")
    if not callable(fn):
        raise RewardError(f"{where}: {function_name!r} is {type(fn).__name__}, want a function")
    return fn


def _load_module(where: str, module_name: str, base_dir: Path) -> ModuleType:
    for folder in (str(base_dir.resolve()), str(Path.cwd())):
        if folder not in sys.path:
            sys.path.append(folder)
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise RewardError(
            f"{where}: no module {error.name!r} beside the run file, in the working directory or among the installed "
            "packages: correct the name, install the package, or write ./file.py:function"
        ) from error
    except Exception as error:  # a user's module may fail in any way while it is imported
        raise RewardError(f"{where}: importing {module_name} failed: {type(error).__name__}: {error}") from error


def _load_file(where: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise RewardError(f"{where}: no file {path}: the path is relative to the run file")
    name = f"keel_{path.stem}_{hashlib.blake2b(str(path).encode(), digest_size=4).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up by name
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's module may fail in any way while it is imported
        del sys.modules[name]
        raise RewardError(f"{where}: running {path} failed: {type(error).__name__}: {error}") from error
    return module


def _public_functions(module: ModuleType) -> str:
    own = (value.__name__ for value in vars(module).values() if inspect.isfunction(value))
    return ", ".join(sorted(name for name in own if not name.startswith("_"))) or "no functions"


def _check_signature(config: RewardConfig, fn: Callable[..., Any]) -> None:
    """Binds a call without making it."""
    try:
        signature = inspect.signature(fn)
    except ValueError:  # some builtins carry no signature; the first call will tell
        return
    try:
        signature.bind(None, None, **config.kwargs)
    except TypeError as error:
        call = ", ".join(["task", "answer", *(f"{key}=..." for key in config.kwargs)])
        raise RewardError(
            f"rewards.fn {config.fn!r}: it is called as ({call}) but its signature is {signature}: {error}; change the "
            "function or the entry's kwargs"
        ) from None
