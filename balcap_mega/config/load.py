"""YAML and `key=value` overrides to a `RunConfig`; each mistake is one `UserError` with where and remedy."""

import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from reprlib import Repr
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from balcap_mega.config.schema import RunConfig, Section
from balcap_mega.errors import UserError

S = TypeVar("S", bound=Section)

MOST_BYTES = 2**20  # of a config file
MOST_COMPLAINTS = 10
CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
SECRET_BEARING = ("base_url", "api_key_env")  # keys whose values people put credentials into; no error repeats them

_REPR = Repr()
_REPR.maxstring = _REPR.maxother = 200


class _Loader(yaml.SafeLoader):
    """Plain data in YAML 1.1, read by PyYAML's safe loader, but `1e-6` is a number and a date is not.

    A key given twice is an error, and so are aliases, of which a few lines can stand for billions of values, tags, and
    control characters.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.tag is not None:
            raise ComposerError(None, None, "aliases and tags are not read here", event.start_mark)
        return super().compose_node(parent, index)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError):  # 0x_, or more digits than Python reads
            problem = f"{node.value[:40]!r} is no number"
            raise ConstructorError(None, None, problem, node.start_mark) from None

    def construct_scalar(self, node: yaml.Node) -> str:
        value = super().construct_scalar(node)
        if CONTROL_CHARACTERS.search(value):
            raise ConstructorError(None, None, "a value holds control characters", node.start_mark)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ConstructorError(None, None, "a key is no plain word", key.start_mark)
            if key.value in seen:
                raise ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":merge", ":value"))]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run from a YAML file; each override is `dotted.key=value`, its value parsed as YAML, the last one wins.

    Raises UserError for a file that cannot be read, a key given twice, an unknown key (naming the nearest one), and any
    value that the schema refuses.
    """
    tree = _read(Path(path))
    overridden = [_apply(tree, override) for override in overrides]
    return validate(RunConfig, tree, path, overridden)


def validate(kind: type[S], tree: Any, source: str | Path, overridden: Sequence[str] = ()) -> S:
    """`tree` as a section of that kind. Raises one UserError that names every bad key of `source`."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        complaints = [
            _explain(detail, source, overridden) for detail in error.errors(include_url=False)[:MOST_COMPLAINTS]
        ]
        problems, remedies = zip(*complaints)
        raise UserError("; ".join(problems), remedy="; ".join(dict.fromkeys(remedies))) from None


def dump_config(config: RunConfig) -> str:
    """The resolved run as YAML, every default spelled out; `load_config` reads it back to an equal value."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def dotted_fields(section: type[Section] = RunConfig, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key a file may hold, sections before what is in them (`*`: any name): `model`, `model.path`, …"""
    for name, field in section.model_fields.items():
        yield prefix + name, field
        entry = "*." if get_origin(field.annotation) is dict else ""
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, Section):
                yield from dotted_fields(kind, f"{prefix}{name}.{entry}")


def dotted_keys() -> Iterator[str]:
    return (key for key, _ in dotted_fields())


def _read(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise UserError(
            f"cannot read the config {path}: {error.strerror}", remedy="give a YAML file, see configs/"
        ) from None
    if len(content) > MOST_BYTES:
        raise UserError(f"{path} is larger than any config", remedy="give a YAML file, see configs/")
    try:
        tree = yaml.load(content.decode("utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {_where(error)}", remedy="mend that line") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no keys", remedy="write one `key: value` a line, see configs/")
    return tree


def _apply(tree: dict[str, Any], override: str) -> str:
    """Set one override in place and return its dotted key."""
    key, equals, text = override.partition("=")
    key = key.strip()
    shown = f"{key}=..." if "endpoint" in override or len(override) > 200 else override
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise UserError(f"override {shown[:200]!r} is not key=value", remedy="write it like rollout.group_size=8")
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"override {shown!r} has no valid YAML value: {_where(error)}", remedy="quote it") from None
    *parents, leaf = key.split(".")
    node = tree
    for depth, name in enumerate(parents, start=1):
        if node.get(name) is None:
            node[name] = {}
        node = node[name]
        if not isinstance(node, dict):
            parent = ".".join(parents[:depth])
            raise UserError(f"override {shown!r}: {parent} is a value, not a section", remedy=f"set {parent} itself")
    node[leaf] = value
    return key


def _explain(detail: dict[str, Any], path: str | Path, overridden: Iterable[str]) -> tuple[str, str]:
    """One pydantic error as (problem, remedy)."""
    key = ".".join(str(part) for part in detail["loc"] if part != "[key]")
    value, kind = detail["input"], detail["type"]
    where = "override" if any(f"{key}.".startswith(f"{other}.") for other in overridden) else f"{path}:"
    if kind == "extra_forbidden":
        where = "override" if any(f"{other}.".startswith(f"{key}.") for other in overridden) else where
        return f"{where} {key} is no known key", _advice(key)
    if kind == "missing":
        return f"{path}: {key} is missing", f"add {key}"
    if kind == "value_error":  # our own validators say "problem; remedy"
        problem, _, remedy = str(detail["ctx"]["error"]).rpartition("; ")
        return f"{path}: {key}: {problem}" if key else f"{path}: {problem}", remedy
    if detail["loc"][-1] == "[key]":
        return f"{where} {key} is no known key", detail["msg"].replace("Input", "the key")
    shown = "..." if key.endswith(SECRET_BEARING) else _REPR.repr(value)
    return f"{where} {key}={shown} is refused", detail["msg"].replace("Input", "it")


def _advice(key: str) -> str:
    """The key meant, if one is near: a sibling, or the same name in another section."""
    parent, _, name = key.rpartition(".")
    prefix = f"{parent}." if parent else ""
    places = {known: known.rpartition(".") for known in dotted_keys()}
    siblings = [leaf for section, _, leaf in places.values() if fnmatchcase(parent, section)]
    if near := get_close_matches(name, siblings, n=1):
        return f"did you mean {prefix}{near[0]}?"
    elsewhere = {leaf: known for known, (_, _, leaf) in reversed(places.items()) if "*" not in known}
    if near := get_close_matches(name, elsewhere, n=1, cutoff=0.7):
        return f"did you mean {elsewhere[near[0]]}?"
    return f"known here: {', '.join(siblings)}" if siblings else f"{parent} has no keys of its own"


def _where(error: yaml.YAMLError | UnicodeDecodeError | RecursionError) -> str:
    """`line 3: what is wrong`, on one line."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return " ".join(str(error).split())
