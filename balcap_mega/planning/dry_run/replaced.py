"""Attributes of modules and classes, replaced for as long as a `with` lasts."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

Replacement = tuple[Any, str, Any]
"""(owner, name, what stands there instead)."""


@contextmanager
def replaced(*replacements: Replacement) -> Iterator[None]:
    """Inside, each owner's attribute is the replacement; afterwards it is what it was, if need be none of its own."""
    with ExitStack() as restore:
        for owner, name, replacement in replacements:
            if name in vars(owner):
                restore.callback(setattr, owner, name, vars(owner)[name])
            else:
                restore.callback(delattr, owner, name)
            setattr(owner, name, replacement)
        yield
