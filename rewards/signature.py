"""A function and the arguments of its `[[rewards]]` entry in, whether and how it can be called out; nothing is
called."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import PydanticUserError, TypeAdapter, ValidationError

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_WANTED = "a reward is `def reward(task, answer, **kwargs)`, or `def reward(task, answers, **kwargs)` for a whole group"


class RewardError(ValueError):
    """A function named in a run file that cannot be used: the message names the entry and the remedy."""


@dataclass(frozen=True, slots=True)
class CheckedSignature:
    """How to call a reward function."""

    per_group: bool
    is_async: bool
    kwargs: Mapping[str, Any]
    """Read as the types that the signature names."""


def check_signature(fn: Callable[..., Any], kwargs: Mapping[str, Any], *, where: str) -> CheckedSignature:
    """Checks the first two parameters and every keyword argument.

    Args:
        where: names the entry in messages.

    Raises:
        RewardError: wrong first parameters, an unknown, missing or ill-typed argument; names it and the remedy.
    """
    try:
        signature = inspect.signature(fn)
    except ValueError as error:
        raise RewardError(f"{where}: it carries no signature ({error}): wrap it in a function of your own") from None
    per_group = _is_per_group(signature, where)
    _check_names(signature, kwargs, where)
    return CheckedSignature(per_group, is_async(fn), _check_types(fn, kwargs, where))


def is_async(fn: Callable[..., Any]) -> bool:
    """Whether calling it gives a coroutine; looks through partials and at an object's `__call__`."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(getattr(fn, "__call__", None))  # noqa: B004


def _is_per_group(signature: inspect.Signature, where: str) -> bool:
    leading = [p.name.lstrip("_") for p in signature.parameters.values() if p.kind in _POSITIONAL][:2]
    if len(leading) < 2 or leading[0] != "task" or leading[1] not in ("answer", "answers"):
        raise RewardError(
            f"{where}: its signature is {signature}: call its first two parameters task and answer (or answers): "
            f"{_WANTED} (a decorator needs functools.wraps)"
        )
    return leading[1] == "answers"


def _check_names(signature: inspect.Signature, kwargs: Mapping[str, Any], where: str) -> None:
    parameters = list(signature.parameters.values())[2:]
    known = [p.name for p in parameters if p.kind in (inspect.Parameter.KEYWORD_ONLY, _POSITIONAL[1])]
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    unknown = [key for key in kwargs if key not in known]
    if unknown and not takes_any:
        has = f"it takes {', '.join(known)}" if known else "it takes no arguments"
        raise RewardError(f"{where}: rewards.kwargs.{unknown[0]}: unknown argument; {has}: correct or remove it")
    missing = [p.name for p in parameters if p.name in known and p.default is p.empty and p.name not in kwargs]
    if missing:
        raise RewardError(
            f"{where}: rewards.kwargs.{missing[0]} is missing and its signature {signature} has no default for it: set "
            "it in the run file"
        )
    try:
        signature.bind(None, None, **kwargs)
    except TypeError as error:  # for example a third positional-only parameter, which no kwarg can fill
        raise RewardError(f"{where}: it cannot be called, its signature is {signature}: {error}: {_WANTED}") from None


def _check_types(fn: Callable[..., Any], kwargs: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The arguments as their annotated types, as far as annotations can be read: a list becomes a tuple, text a
    path."""
    annotated = fn if inspect.isroutine(fn) else getattr(fn, "__call__", fn)  # noqa: B004
    try:
        hints = typing.get_type_hints(annotated)
    except (NameError, TypeError, AttributeError):  # names that only a type checker can see
        hints = {}
    return {
        key: _read_as(hints[key], value, f"{where}: rewards.kwargs.{key}") if key in hints else value
        for key, value in kwargs.items()
    }


def _read_as(annotation: Any, value: Any, where: str) -> Any:
    try:
        adapter = TypeAdapter(annotation)
    except PydanticUserError:  # not a type that plain values can be read as
        return value
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise RewardError(f"{where} = {value!r}: {problem}: correct it in the run file") from None
