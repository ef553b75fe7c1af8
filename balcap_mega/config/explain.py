"""`launch/pretrain_rl.py --explain`: each key of the schema with its type, bounds, default, and what it is for."""

import textwrap
from collections.abc import Iterator
from fnmatch import fnmatchcase
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from balcap_mega.config.load import dotted_fields
from balcap_mega.config.schema import MAY_CHANGE, Section
from balcap_mega.errors import UserError

WIDTH = 100
BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def explain(section: str = "") -> str:
    """Every key in `section` (a dotted name; "" for all), in the schema's order. Raises UserError for no known name."""
    keys = dict(dotted_fields())
    wanted = {key: field for key, field in keys.items() if not section or f"{key}.".startswith(f"{section}.")}
    if not wanted:
        near = [key for key in keys if fnmatchcase(key, f"*{section.rpartition('.')[2]}*")] or [*keys]
        raise UserError(f"--explain {section}: no such section or key", remedy=f"try one of: {', '.join(near[:12])}")
    changing = [f"{key}." for key, field in keys.items() if MAY_CHANGE in field.metadata]
    return "\n".join(_entry(key, field, f"{key}.".startswith(tuple(changing))) for key, field in wanted.items())


def _entry(key: str, field: FieldInfo, may_change: bool) -> str:
    facts = [] if _is_section(field) else [_type(field), *_bounds(field), _default(field)]
    facts += [MAY_CHANGE] if may_change else []
    text = textwrap.fill(" ".join((field.description or "").split()), WIDTH - 4)
    return f"{key}{': ' if facts else ''}{', '.join(facts)}\n{textwrap.indent(text, '    ')}"


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def _type(field: FieldInfo) -> str:
    return _type_name(field.annotation)


def _type_name(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, UnionType):
        return " | ".join(map(_type_name, arguments))
    if origin in (tuple, dict, list):
        return f"{origin.__name__} of {', '.join(_type_name(each) for each in arguments if each is not ...)}"
    if hasattr(kind, "__metadata__"):  # Annotated
        return _type_name(arguments[0])
    if kind is NoneType:
        return "null"
    return "section" if isinstance(kind, type) and issubclass(kind, Section) else getattr(kind, "__name__", str(kind))


def _bounds(field: FieldInfo) -> Iterator[str]:
    """Of the field itself, and of each value where it holds several or may be null."""
    for holder in (field, *get_args(field.annotation)):
        yield from _constraints(getattr(holder, "metadata", None) or getattr(holder, "__metadata__", ()))


def _constraints(metadata: Any) -> Iterator[str]:
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from _constraints(item.metadata)
        for name, sign in BOUNDS.items():
            if (value := getattr(item, name, None)) is not None:
                yield f"{sign} {value}"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = to_jsonable_python(field.default)
    return "default " + yaml.safe_dump(default, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()
