"""Imports without their cost: modules that code names while it is imported, and that are never run.

Building a model without numbers takes the classes of its layers, and none of the kernels that they would call. Those,
and what they import in turn, are half of the time.
"""

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence


class _Placeholder:
    """What a hollow module has under every name: a class that takes any arguments, and decorates to no effect."""

    def __new__(cls, *arguments: object, **_):
        if arguments and isinstance(arguments[0], types.FunctionType):
            return arguments[0]  # @name
        return super().__new__(cls)

    def __init__(self, *_, **__):
        pass

    def __call__(self, *arguments: object, **_):
        return arguments[0] if arguments else None  # @name(...)


class _HollowModule(types.ModuleType):
    __path__ = ()  # so that modules below it are asked for, and are hollow in turn

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (_Placeholder,), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: Sequence[str]):
        self._names = names

    def find_spec(self, fullname: str, path: object, target: object = None):
        if any(fullname == name or fullname.startswith(f"{name}.") for name in self._names):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _HollowModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def make_hollow(*names: str) -> None:
    """Let these modules, and all below them, be imported in this process as modules of placeholder classes.

    It cannot be undone: for a process that does one thing and ends.
    """
    sys.meta_path.insert(0, _Finder(names))
