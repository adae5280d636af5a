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
from rewards.signature import RewardError, check_signature

__all__ = ["LoadedReward", "RewardError", "RewardSpec", "load_function", "load_reward", "load_rewards"]


@dataclass(frozen=True, slots=True)
class RewardSpec:
    """A `[[rewards]]` entry after its check: all that another process needs to load and call it."""

    config: RewardConfig
    base_dir: Path
    """Absolute; what `./file.py` is relative to."""
    per_group: bool
    """Called once with all answers of a prompt, not once per answer."""
    is_async: bool

    @property
    def name(self) -> str:
        return self.config.name or self.config.fn.rpartition(":")[2]

    @property
    def key(self) -> str:
        """The same for entries that make the same calls, whatever their weights."""
        return f"{self.base_dir}\n{self.config.model_dump_json(exclude={'weight', 'gate', 'name'})}"


@dataclass(frozen=True, slots=True)
class LoadedReward:
    """A reward function that is ready to be called as `fn(task, answer, **kwargs)`, or with `answers`."""

    spec: RewardSpec
    fn: Callable[..., Any]
    kwargs: Mapping[str, Any]
    """The entry's arguments, read as the types that the signature names."""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def weight(self) -> float:
        return self.spec.config.weight


def load_reward(config: RewardConfig, *, base_dir: Path) -> LoadedReward:
    """Imports the function of one `[[rewards]]` entry and checks that it can be called.

    Args:
        base_dir: the run file's folder.

    Raises:
        RewardError: as `load_function`, or its first two parameters are not `task` and `answer` or `answers`, or the
            entry's kwargs do not fit its signature.
    """
    fn = load_function(config.fn, base_dir=base_dir, field="rewards.fn")
    checked = check_signature(fn, config.kwargs, where=f"rewards.fn {config.fn!r}")
    spec = RewardSpec(config, base_dir.resolve(), checked.per_group, checked.is_async)
    return LoadedReward(spec, fn, checked.kwargs)


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
