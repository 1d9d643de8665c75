"""What a checkpoint of any form holds: opened, with tensors that are read when they are used."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning.fabric.checkpoint.loading import opened
from lightning.fabric.checkpoint.manifest import Manifest, read_manifest
from lightning.fabric.checkpoint.safetensors_files import is_safetensors, read_safetensors
from lightning.fabric.checkpoint.saving import OneRank
from lightning.fabric.utilities import sharded_folder
from lightning.fabric.utilities.cloud_io import _load, _local_path
from lightning.fabric.utilities.load import is_sharded_folder
from lightning.fabric.utilities.sharded_folder import Place, ShardedFolder
from lightning.fabric.utilities.types import _PATH

Leaves = dict[Place, Callable[[], Any]]  # what reads each value that is no container


@contextmanager
def verified_contents(path: _PATH, weights_only: bool | None = None) -> Iterator[tuple["Contents", Manifest | None]]:
    """A context with what :func:`open_contents` opens, compared with its manifest; and that, if it has one.

    Of a folder of checkpoints it is the newest good one. What is not on a local disk is copied there.

    Raises:
        DamagedCheckpointError: if it is not as it was saved.

    """
    # an index of safetensors files has its manifest beside it
    index = _local_path(path) if str(path).endswith(".index.json") and is_safetensors(path) else None
    with opened(path if index is None else index.parent, True, OneRank()) as found:
        manifest = read_manifest(_local_path(found))
        yield open_contents(index or _local_path(found), weights_only), manifest


def open_contents(path: str | os.PathLike[str], weights_only: bool | None = None) -> "Contents":
    """Open a local file of ``torch.save``, a sharded folder, or safetensors.

    Args:
        path: where it is.
        weights_only: ``False`` runs code that the files may hold; ``None`` is torch's default.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: if it is a folder without a checkpoint of these forms.
        pickle.UnpicklingError: if it holds objects that ``weights_only`` refuses.
        RuntimeError: if it is damaged.

    """
    path = Path(path)
    if is_sharded_folder(path):
        return Sharded(ShardedFolder(path, weights_only))
    if is_safetensors(path):
        return Whole(read_safetensors(path))
    if path.is_dir():
        raise ValueError(
            f"The folder {str(path)!r} holds no checkpoint that can be read here: it has neither a `.metadata`, as "
            "those of FSDP and model parallelism have, nor safetensors files."
        )
    return Whole(_read_file(path, weights_only))


def _read_file(path: Path, weights_only: bool | None) -> Any:
    try:
        return _load(path, "cpu", weights_only=weights_only, mmap=True)
    except OSError:
        raise
    except Exception as error:  # of what is no such file, unpickling may raise anything
        if sharded_folder.is_refusal(error):
            raise sharded_folder._refused(path, error) from error
        raise RuntimeError(
            f"The file {str(path)!r} is no checkpoint that can be read here, or is damaged: "
            f"{type(error).__name__}: {error}"
        ) from error


class Contents(ABC):
    """A checkpoint, opened."""

    @property
    @abstractmethod
    def is_bare(self) -> bool:
        """Whether it is the state dict of one module, and not a state with entries."""

    @property
    @abstractmethod
    def keys(self) -> list[str]:
        """The keys of the state."""

    @abstractmethod
    def whole(self) -> Any:
        """All of it, as a strategy that does not shard would have saved it: optimizers by number."""

    @abstractmethod
    def entry(self, key: str) -> Any:
        """One entry of the state, or KeyError."""

    @abstractmethod
    def leaves(self) -> Leaves:
        """All values, by their places in :meth:`whole`."""

    @abstractmethod
    def weights_keys(self) -> list[str]:
        """The keys of entries that look like the state dict of a module."""

    def part(self, key: str) -> Leaves:
        """The leaves of one entry; all of what is bare, for that is an entry's content itself."""
        if self.is_bare:
            return self.leaves()
        if key not in self.keys:
            raise KeyError(f"There is no entry {key!r}; the checkpoint has {self.keys}.")
        return {place[1:]: read for place, read in self.leaves().items() if place[0] == key}


def is_weights(value: Any) -> bool:
    """Whether ``value`` looks like the state dict of a module: tensors by name, and extra state perhaps."""
    if not isinstance(value, Mapping) or not any(isinstance(each, Tensor) for each in value.values()):
        return False
    return all(
        isinstance(name, str) and (isinstance(each, Tensor) or name.endswith("_extra_state"))
        for name, each in value.items()
    )


class Whole(Contents):
    """What is in memory, or mapped."""

    def __init__(self, state: Any) -> None:
        self.state = state

    @property
    def is_bare(self) -> bool:
        return is_weights(self.state)

    @property
    def keys(self) -> list[str]:
        return list(self.state) if isinstance(self.state, Mapping) else []

    def whole(self) -> Any:
        return self.state

    def entry(self, key: str) -> Any:
        return self.state[key]

    def weights_keys(self) -> list[str]:
        return [key for key in self.keys if is_weights(self.state[key])]

    def leaves(self) -> Leaves:
        state = self.state
        if isinstance(state, Mapping) and not self.is_bare:
            state = {key: sharded_folder._numbered(value) for key, value in state.items()}
        return {place: _giving(value) for place, value in _flat(state)}


class Sharded(Contents):
    """A folder in torch's distributed format."""

    def __init__(self, folder: ShardedFolder) -> None:
        self.folder = folder

    @property
    def is_bare(self) -> bool:
        return self.folder.is_bare

    def _is_tensor(self, name: str) -> bool:
        return self.folder.blank(name, "meta") is not None

    @property
    def keys(self) -> list[str]:
        return sorted(self.folder.keys())

    def whole(self) -> Any:
        values = self.values_by_place()
        state = sharded_folder.nested(values) if values else {}
        return {**{key: sharded_folder._numbered(value) for key, value in state.items()}, **self.folder.meta}

    def entry(self, key: str) -> Any:
        if key in self.folder.meta:
            return self.folder.meta[key]
        names = dict(self.folder.below(key))
        if not names:
            raise KeyError(key)
        values = self._read(names)
        return sharded_folder._numbered(sharded_folder.nested({names[name]: values[name] for name in names}))

    def weights_keys(self) -> list[str]:
        found = {str(place[0]) for place in self.folder.paths.values()}
        return [key for key in sorted(found) if self._is_weights(key)]

    def _is_weights(self, key: str) -> bool:
        inside = dict(self.folder.below(key))
        return any(map(self._is_tensor, inside)) and all(
            len(place) == 1 and (self._is_tensor(name) or str(place[0]).endswith("_extra_state"))
            for name, place in inside.items()
        )

    def values_by_place(self) -> dict[Place, Any]:
        """What is in the shards, by its place in the state: optimizers by name."""
        return {self.folder.paths[name]: value for name, value in self._read(self.folder.stored).items()}

    def _read(self, names: Iterable[str]) -> dict[str, Any]:
        values: dict[str, Any] = {name: self.folder.blank(name) for name in names}
        self.folder.read(values)
        return values

    def _read_one(self, name: str) -> Any:
        return self._read([name])[name]

    def leaves(self) -> Leaves:
        found: Leaves = {}
        objects = self._read([name for name in self.folder.stored if not self._is_tensor(name)])
        numbers = {key: self._numbers(key, objects) for key in self.keys}
        for name, place in self.folder.paths.items():
            number_of = numbers[str(place[0])]
            if number_of and place[1:2] == ("state",):
                place = (*place[:2], number_of.get(str(place[2]), place[2]), *place[3:])
            if name not in objects:
                found[place] = partial(self._read_one, name)
            else:
                inside = {(*place, *inner): value for inner, value in _flat(objects[name])}
                found |= {
                    whole: _giving(number_of[value] if number_of and _is_parameter(whole) else value)
                    for whole, value in inside.items()
                }
        for key, number_of in numbers.items():
            if number_of and not any(place[:2] == (key, "state") for place in found):
                found[key, "state"] = dict
        return found | {place: _giving(value) for place, value in _flat(self.folder.meta) if place}

    def _numbers(self, key: str, objects: Mapping[str, Any]) -> dict[str, int]:
        """The number of each parameter of an optimizer, by its name; none if ``key`` is no optimizer."""
        inside = {place: objects[name] for name, place in self.folder.below(key) if name in objects and place}
        groups = {place: value for place, value in inside.items() if place[0] == "param_groups"}
        names = sharded_folder.named_groups(sharded_folder.nested(groups)) if groups else None
        return {name: number for number, name in enumerate(name for group in names or () for name in group)}


def _is_parameter(place: Place) -> bool:
    """Whether an optimizer has the name of a parameter there: key, "param_groups", group, "params", number."""
    return place[1:2] == ("param_groups",) and place[3:4] == ("params",) and len(place) == 5


def _flat(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Yield what is in nested containers, and empty containers themselves."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, (list, tuple)):
        items = list(enumerate(value))
    if not items:
        yield place, value
    for key, inner in items:
        yield from _flat(inner, (*place, key))


def _giving(value: Any) -> Callable[[], Any]:
    return lambda: value
