"""Of diffusers only what is used is imported: its packages of networks run when somebody asks them for a name.

`diffusers.models.unets` and `diffusers.models.transformers` import every network there is as they are imported, `diffusers.hooks` (at a model's
first `.to`) every hook, and they with these scipy, transformers and peft where those are installed: a second or, with peft, three of every trainer's
and every worker's start, for a class or a function of one of their modules. Owns that deferral. Must not know what is built, and imports nothing
heavy itself.
"""

import importlib.abc
import importlib.machinery
import sys
import threading
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Final

DEFERRED: Final = frozenset({"diffusers.hooks", "diffusers.models.transformers", "diffusers.models.unets"})


def defer_networks() -> None:
    """Once a process, before diffusers is imported: those packages' modules can be imported without the packages' own code.

    That code runs at the first look for a name that the package has not got yet, so whoever imports from the package sees no difference.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in DEFERRED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Makes the package and leaves its code for later."""

    def __init__(self, own: importlib.abc.Loader) -> None:
        self.own = own

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Package(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing yet."""


class _Package(ModuleType):
    """A package whose code has not run. `__getattr__` is asked only for names that are not there."""

    _running = threading.RLock()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what the import machinery and inspect look for is there, or is not to be had
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        with self._running:
            if type(self) is _Package:
                spec = self.__spec__
                assert spec is not None
                assert isinstance(spec.loader, _Loader)
                deferred = spec.loader
                self.__class__ = ModuleType  # type: ignore[assignment]  # a plain module from here on, for its own code too
                self.__loader__ = spec.loader = deferred.own
                try:
                    deferred.own.exec_module(self)
                except BaseException:  # the next who asks tries again, and hears the same
                    self.__class__ = _Package
                    self.__loader__ = spec.loader = deferred
                    raise
        return getattr(self, name)
