"""Writes docs/configuration.md from the pydantic models of a run file: the page states what the code accepts.

python docs/generate_configuration.py
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from grpo.config import DomainConfig, TrainConfig
from rewards.config import RewardConfig

PAGE = Path(__file__).parent / "configuration.md"
HEAD = """# Configuration

Written by `python docs/generate_configuration.py` from the models that read a run file; a test compares the two.

A run file is TOML. `-o table.key=value` replaces a value from the command line (the value is read as TOML; what is not
TOML is a string). Unknown keys and impossible values are refused before anything is started, all in one message. The
resolved configuration of a run is in its folder as `config.json`; `keel train FILE --dry-run` prints the plan that
follows from it.

Limits stand behind the type. "required" has no default; "unset" means that the key may be left out.
"""
BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "min_length": "length >="}
NAMES = {str: "string", int: "integer", float: "number", bool: "true or false"}
OVERRIDDEN = ("stability", "sampling")
"""Tables whose fields a domain can replace."""


def render() -> str:
    """The whole page."""
    sections = [HEAD]
    for table, field in TrainConfig.model_fields.items():
        model = field.annotation
        if isinstance(model, type) and issubclass(model, BaseModel):
            sections.append(_section(f"[{table}]", model))
    sections += [_section("[[rewards]]", RewardConfig), _section("[domains.NAME]", DomainConfig)]
    return "\n".join(sections)


def _section(title: str, model: type[BaseModel]) -> str:
    lines = [f"## `{title}`", "", " ".join((model.__doc__ or "").split()), ""]
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    lines += [
        f"| `{name}` | {_type(field)} | {_default(field)} | {_meaning(model, name, field)} |"
        for name, field in model.model_fields.items()
    ]
    return "\n".join([*lines, ""])


def _type(field: FieldInfo) -> str:
    """A type in a user's words, with its bounds."""
    kind = " or ".join(dict.fromkeys(_type_names(field.annotation)))
    bounds = [*_bounds(field.metadata), *_inner_bounds(field.annotation)]
    return f"{kind}, {', '.join(bounds)}" if bounds else kind


def _type_names(annotation: Any) -> Iterator[str]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in NAMES:
        yield NAMES[annotation]
    elif origin is Literal:
        yield from (f'`"{value}"`' for value in arguments)
    elif origin is Annotated:
        yield from _type_names(arguments[0])
    elif origin in (Union, types.UnionType):
        for argument in arguments:
            if argument is not types.NoneType:
                yield from _type_names(argument)
    elif origin is tuple:
        yield f"list of {_plural(arguments[0])}"
    else:
        yield "table"


def _plural(annotation: Any) -> str:
    return f"{NAMES[annotation]}s" if annotation in NAMES else "tables"


def _bounds(metadata: list[Any]) -> Iterator[str]:
    for constraint in metadata:
        if isinstance(constraint, annotated_types.BaseMetadata):
            for name, sign in BOUNDS.items():
                if (limit := getattr(constraint, name, None)) is not None:
                    yield f"{sign} {limit:g}"


def _inner_bounds(annotation: Any) -> Iterator[str]:
    """Bounds that stand inside a union."""
    for part in get_args(annotation):
        if get_origin(part) is Annotated:
            for extra in get_args(part)[1:]:
                yield from _bounds(extra.metadata if isinstance(extra, FieldInfo) else [extra])


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if field.is_required():
        return "required"
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, str):
        return f'`"{value}"`'
    return f"`{value:g}`" if isinstance(value, float) else f"`{list(value) if isinstance(value, tuple) else value}`"


def _meaning(model: type[BaseModel], name: str, field: FieldInfo) -> str:
    text = " ".join((field.description or "").split())
    if not text and model is DomainConfig:
        tables = [t for t in OVERRIDDEN if name in _fields_of(t)]
        text = " ".join(f"Replaces `{table}.{name}`." for table in tables)
    return text.replace("|", "\\|")


def _fields_of(table: str) -> dict[str, FieldInfo]:
    model: Any = TrainConfig.model_fields[table].annotation
    return model.model_fields


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
