"""Serve one package under a second name, with the same module objects, so that ``isinstance`` and pickles agree."""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType


def serve(alias: str, target: str) -> None:
    """Make ``import alias.x.y`` give the module ``target.x.y``.

    Called from the ``__init__`` of the package ``alias``, which the package ``target`` then replaces.
    """
    finder = _AliasFinder(alias, target)
    if finder not in sys.meta_path:
        # In front: the packages share one __path__, from which the ordinary finder would load a second copy.
        sys.meta_path.insert(0, finder)
    sys.modules[alias] = importlib.import_module(target)


class _AliasFinder(MetaPathFinder):
    def __init__(self, alias: str, target: str) -> None:
        self.alias, self.target = alias, target

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _AliasFinder) and vars(self) == vars(other)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(f"{self.alias}."):
            return None
        real = importlib.util.find_spec(self.target + fullname.removeprefix(self.alias))
        if real is None:
            return None
        spec = ModuleSpec(
            fullname, _AliasLoader(real), origin=real.origin, is_package=real.submodule_search_locations is not None
        )
        spec.submodule_search_locations = real.submodule_search_locations
        spec.has_location = real.has_location
        return spec


class _AliasLoader(Loader):
    def __init__(self, real: ModuleSpec) -> None:
        self.real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return importlib.import_module(self.real.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.real  # the import system has just put the alias there

    def get_code(self, fullname: str) -> CodeType | None:
        """For ``python -m alias.x``."""
        loader = self.real.loader
        return loader.get_code(self.real.name) if loader is not None and hasattr(loader, "get_code") else None
