"""What a ``Fabric`` object has set up: remembered weakly, so that nothing lives longer for it."""

import weakref
from typing import Any, NamedTuple


class Samplers(NamedTuple):
    """Where a loader's indices come from."""

    sampler: Any
    batch_sampler: Any

    @classmethod
    def of(cls, dataloader: Any) -> "Samplers":
        """What ``dataloader`` has now."""
        return cls(getattr(dataloader, "sampler", None), getattr(dataloader, "batch_sampler", None))


class SetUpLoader(NamedTuple):
    """What a set-up loader reads from (the user's own, or one made again with another sampler), and what was before."""

    dataloader: Any
    before: Samplers


class Inventory:
    """Modules, optimizers and loaders in the order of their set-up; in another process there are none."""

    def __init__(self) -> None:
        self._modules: list[weakref.ref[Any]] = []
        self._optimizers: list[weakref.ref[Any]] = []
        self._loaders: weakref.WeakKeyDictionary[Any, SetUpLoader] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Inventory, ()

    def add_module(self, wrapped: Any) -> None:
        self._modules = [*(each for each in self._modules if each() is not None), weakref.ref(wrapped)]

    def add_optimizer(self, wrapped: Any) -> None:
        self._optimizers = [*(each for each in self._optimizers if each() is not None), weakref.ref(wrapped)]

    def add_loader(self, wrapped: Any, dataloader: Any, before: Samplers) -> None:
        self._loaders[wrapped] = SetUpLoader(dataloader, before)

    @property
    def modules(self) -> list[Any]:
        """What users hold of the modules that are still there."""
        return _there(self._modules)

    @property
    def optimizers(self) -> list[Any]:
        """What users hold of the optimizers that are still there."""
        return _there(self._optimizers)

    @property
    def loaders(self) -> list[tuple[Any, SetUpLoader]]:
        """What users hold of the loaders that are still there, and what is known of each."""
        return list(self._loaders.items())


def _there(references: "list[weakref.ref[Any]]") -> list[Any]:
    return [found for reference in references if (found := reference()) is not None]
