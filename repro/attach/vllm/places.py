"""Find and replace functions and methods of vLLM by their names. The recorder and the guard both use this file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, NamedTuple

from repro.attach.record.imports import replace


class Place(NamedTuple):
    """An attribute of vLLM: the class or module that defines it, and its name."""

    owner: Any
    attribute: str

    def replace(self, make: Callable[[Any], Any]) -> None:
        """Replace the attribute by ``make(original)``. A static method stays a static method."""
        if isinstance(vars(self.owner)[self.attribute], staticmethod):
            replace(self.owner, self.attribute, lambda original: staticmethod(make(original)))
        else:
            replace(self.owner, self.attribute, make)


def find(module: ModuleType, names: Iterable[str]) -> Place | None:
    """Find a function or method of a module that has different names in different versions of the module.

    Returns the first of the names that the module defines, with its class or module; None if the module defines none.

    names: "Class.method" or "function"
    """
    for name in names:
        *outer, attribute = name.split(".")
        owner: Any = module
        for part in outer:
            owner = getattr(owner, part, None)
        if owner is not None and attribute in vars(owner):
            return Place(owner, attribute)
    return None
