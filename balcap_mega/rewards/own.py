"""A reward of one's own: the protocol of its class, and how the class that a configuration names becomes a reward."""

import importlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, get_type_hints

from pydantic import ConfigDict, ValidationError, create_model

from balcap_mega.config.schema import ComponentConfig
from balcap_mega.data.records import CaptionRecord
from balcap_mega.errors import UserError


class Reward(Protocol):
    """One component of the reward, asked for one caption at a time, the moment the caption is finished.

    The keyword arguments of its constructor are its options: they come from `rewards.components.NAME.options` and are
    validated by their annotations. Calls come from several threads at once. It may also have

        check()   called once before training; what it raises ends the run
        close()   called once at the end
    """

    def score(self, record: CaptionRecord, caption: str) -> float | None:
        """A number in [0, 1], or None where there is none to give: the reward is then missing, which is not 0.

        What it raises is told in the log, and makes the reward missing as well.
        """
        ...


def load_reward(name: str, config: ComponentConfig) -> Reward:
    """The reward behind component `name`. Raises one UserError with the component's name for whatever is wrong."""
    kind, options = find_reward(name, config)
    try:
        reward = kind(**options)
    except Exception as error:
        raise UserError(
            f"{_key(name, config)}: its constructor raised {in_one_line(error)}", remedy="mend the class or its options"
        ) from error
    return reward


def find_reward(name: str, config: ComponentConfig) -> tuple[type, dict[str, Any]]:
    """Its class, imported from an installed package or the folder `config.path`, and its options, validated."""
    kind = _load_class(name, config)
    if not callable(getattr(kind, "score", None)):
        raise UserError(f"{_key(name, config)} has no method score(record, caption)", remedy="give the class one")
    return kind, _options(name, kind, config.options)


def _key(name: str, config: ComponentConfig) -> str:
    return f"rewards.components.{name}: {config.source}"


def in_one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _load_class(name: str, config: ComponentConfig) -> type:
    module_name, _, class_name = config.source.partition(":")
    if config.path is not None and not Path(config.path).is_dir():
        raise UserError(
            f"rewards.components.{name}.path={config.path} is no folder", remedy=f"give the folder of {module_name}"
        )
    with _named_places(config.path):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            missing = error.name or module_name
            where = f"nor in {config.path}" if config.path else "and rewards.components has no path for it"
            if not f"{module_name}.".startswith(f"{missing}."):
                where = f"which {module_name} imports"
            raise UserError(
                f"{_key(name, config)}: {missing} is not installed, {where}",
                remedy=f"install it, or in a new run name the folder it stands in: rewards.components.{name}.path",
            ) from error
        except Exception as error:
            raise UserError(
                f"{_key(name, config)}: importing {module_name} raised {in_one_line(error)}", remedy="mend the module"
            ) from error
    kind = getattr(module, class_name, None)
    if not isinstance(kind, type):
        raise UserError(
            f"{_key(name, config)}: {getattr(module, '__file__', module_name)} holds no class {class_name}",
            remedy="name a class of that module",
        )
    return kind


@contextmanager
def _named_places(path: str | None) -> Iterator[None]:
    """Imports look where Python has things installed and, last, in `path`; never in the current or the script's folder.

    `path` comes last, so that a file in it cannot take the place of an installed module, and stays for later imports.
    """
    before = list(sys.path)
    here = {Path.cwd(), Path(sys.argv[0] or ".").resolve().parent}
    sys.path[:] = [place for place in before if place and Path(place).resolve() not in here]
    if path is not None:
        sys.path.append(str(Path(path).resolve()))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = before
        if path is not None and str(Path(path).resolve()) not in before:
            sys.path.append(str(Path(path).resolve()))


def _options(name: str, kind: type, options: dict[str, Any]) -> dict[str, Any]:
    """The options as the constructor's annotations want them."""
    parameters = list(inspect.signature(kind).parameters.values())
    hints = get_type_hints(kind.__init__) if "__init__" in vars(kind) else {}
    fields: dict[str, Any] = {
        each.name: (hints.get(each.name, Any), ... if each.default is each.empty else each.default)
        for each in parameters
        if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
    }
    model = create_model("Options", __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **fields)
    try:
        found = model.model_validate(options)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(["rewards.components", name, "options", *map(str, first["loc"])])
        known = f"it takes {', '.join(fields)}" if fields else "it takes none"
        problem = "is no option" if first["type"] == "extra_forbidden" else f"is refused: {first['msg']}"
        raise UserError(f"{key} {problem}", remedy=f"see the constructor of {kind.__qualname__}: {known}") from error
    return {field: getattr(found, field) for field in fields}
