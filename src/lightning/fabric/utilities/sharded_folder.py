"""Checkpoints in a folder: tensors in torch's distributed format, a file per rank; plain values in ``meta.pt``.

A state ``{"model": ..., "optimizer": ..., "epoch": 3}`` lies on disk as

* ``__<rank>_<n>.distcp`` and ``.metadata``, as ``torch.distributed.checkpoint`` writes them: each tensor under
  ``model.<name>``, ``optimizer.state.<name>.<entry>`` and ``optimizer.param_groups.<i>.<option>``;
* ``meta.pt``: ``{"epoch": 3}``.

Tools of torch that read such folders read these too. Folders that torch itself has written are read as well: of states
that are nested or flat, with or without ``meta.pt``, with optimizers by names or by numbers.
"""

import io
import math
import os
import pickle
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StoragePrefix
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, WriteItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from lightning.fabric.utilities.cloud_io import _load
from lightning.fabric.utilities.data import AttributeDict
from lightning.fabric.utilities.load import _INDEX_FILENAME, _METADATA_FILENAME, HAS_MANIFEST
from lightning.fabric.utilities.ranks import Ranks, all_or_none

_CHECKPOINT_FILE = re.compile(r"__\d+_\d+\.distcp|\.metadata|meta\.pt|manifest\.json")
_REFUSED = re.compile(r"GLOBAL (\S+)|allowlisted.*got <class '(.+?)'>", re.DOTALL)  # of torch's unpickler

torch.serialization.add_safe_globals([AttributeDict, bytes])  # torch knows all bytes but the empty ones

Place = tuple[str | int, ...]  # of a value in the nested state: keys of dicts, indices of lists


def foreign_entries(folder: Path) -> list[Path]:
    """Return what lies in ``folder`` but is no part of a checkpoint."""
    return [entry for entry in folder.iterdir() if not _CHECKPOINT_FILE.fullmatch(entry.name)]


# -- writing

Result: TypeAlias = list[WriteResult]  # of one rank's writing


class Shards:
    """What this rank writes of values that ranks share: planned by all together, written by each on its own.

    In this order: :meth:`plan`, perhaps :meth:`detach`, :meth:`write`, and on rank 0 :meth:`finish`.
    """

    def __init__(self, planner: "_SavePlanner", plan: SavePlan, metadata: Metadata | None) -> None:
        self._planner = planner
        self._plan = plan
        self._metadata = metadata  # of all ranks' shards; on rank 0

    @classmethod
    def plan(cls, values: Mapping[Place, Any], ranks: Ranks) -> "Shards":
        """Collective: decide which rank writes which part of ``values``, by their places in the nested state.

        Sharded tensors are written by the ranks that have them; of what every rank has, the lowest rank's is written.

        Raises:
            ValueError: on that rank, if values cannot be told apart by name.
            RuntimeError: on the other ranks, if one fails; that one raises its own error.

        """
        planner = _SavePlanner()
        doing = "planning which rank saves what"
        with all_or_none(ranks, doing):
            own = planner.plan_of(values)
        plans = ranks.gather(own)
        with all_or_none(ranks, doing):
            merged = None if plans is None else planner.merged(plans)
        kept: list[list[int]] = ranks.share(None if merged is None else merged[0])
        items = [own.items[number] for number in kept[ranks.rank]]
        plan = replace(own, items=items, storage_data=_StoragePrefix(f"__{ranks.rank}_"))
        return cls(planner, plan, None if merged is None else merged[1])

    def detach(self, copy: Callable[[Tensor], Tensor]) -> None:
        """Let what is written be what the values are now, though they change; ``copy`` copies this rank's parts."""
        self._planner.detach(self._plan, copy)

    def write(self, folder: Path) -> tuple[list[str], Result]:
        """Write this rank's part, and return the names of its files, with a word for :meth:`finish`.

        Any thread may call it. Nothing is brought to the disk by force.
        """
        if not self._plan.items:
            return [], []
        writer = FileSystemWriter(folder, sync_files=False)
        result: Result = writer.write_data(self._plan, self._planner).wait()
        return sorted({written.storage_data.relative_path for written in result}), result

    def finish(self, folder: Path, results: Iterable[Result]) -> None:
        """Write the index, of what :meth:`write` returned on every rank. Rank 0 calls it."""
        assert self._metadata is not None
        _IndexWriter(folder, sync_files=False).finish(self._metadata, list(results))


class _IndexWriter(FileSystemWriter):
    """Says in the index that there is a manifest, and not under which hidden name the folder was made."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(modules=[HAS_MANIFEST])


def write_meta(folder: Path, values: Mapping[str, Any]) -> str:
    """Write the plain ``values``, and return the name of the file; one rank calls it."""
    torch.save(dict(values), folder / _METADATA_FILENAME)
    return _METADATA_FILENAME


def _flat(path: Place) -> str:
    return ".".join(map(str, path))


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_meta


class _SavePlanner(DefaultSavePlanner):
    """Takes values that are flat already, and remembers where they are in the nested state."""

    def __init__(self) -> None:
        super().__init__(dedup_save_to_lowest_rank=True)
        self.is_coordinator = False  # asked for, and not used
        self._detached: dict[MetadataIndex, Any] | None = None

    def plan_of(self, values: Mapping[Place, Any]) -> SavePlan:
        """Return what this rank could write."""
        paths = {_flat(path): path for path in values}
        if len(paths) < len(values):
            doubles = sorted({_flat(path) for path in values if paths[_flat(path)] != path})
            raise ValueError(
                f"Two values would get the same name in the checkpoint: {doubles}. Rename a key of the state that is "
                "the beginning of another one."
            )
        self.state_dict = {_flat(path): value for path, value in values.items()}
        if odd := [
            name for name, value in self.state_dict.items() if isinstance(value, Tensor) and not _is_dense(value)
        ]:
            raise ValueError(
                f"A sharded checkpoint holds dense tensors with values, but these are sparse, quantized or meta: {odd}."
            )
        self.mappings = paths
        return self.create_local_plan()

    def merged(self, plans: list[SavePlan]) -> tuple[list[list[int]], Metadata]:
        """Return which items each rank keeps of its plan, by their numbers, and what all of them are."""
        merged, metadata = self.create_global_plan(plans)
        kept = [{item.index for item in plan.items} for plan in merged]
        return [
            [number for number, item in enumerate(plan.items) if item.index in indices]
            for plan, indices in zip(plans, kept, strict=True)
        ], metadata

    def detach(self, plan: SavePlan, copy: Callable[[Tensor], Tensor]) -> None:
        detached = {}
        for item in plan.items:
            data = super().resolve_data(item)
            detached[item.index] = copy(data.detach()) if isinstance(data, Tensor) else data
        self._detached = detached
        self.state_dict = {}  # so that it need not be kept

    def resolve_data(self, write_item: WriteItem) -> Any:
        return super().resolve_data(write_item) if self._detached is None else self._detached[write_item.index]


# -- reading


class ShardedFolder:
    """A checkpoint in a folder, opened: what is in it is known, no tensor is read yet.

    Attributes:
        meta: the plain values.
        paths: where each value is in the nested state, by its name in the files.

    Args:
        folder: where it is.
        weights_only: ``False`` runs code that the files may hold; ``None`` is torch's default for plain values.

    Raises:
        pickle.UnpicklingError: if the files hold objects that ``weights_only`` refuses.
        RuntimeError: if the index is damaged, or lacks a part of a tensor.

    """

    def __init__(self, folder: str | os.PathLike[str], weights_only: bool | None = None) -> None:
        self.folder = Path(folder)
        self._weights_only = weights_only
        self._reader = _Reader(self.folder, trusted=weights_only is False)
        index = self._reader.index
        self.stored: dict[str, TensorStorageMetadata | BytesStorageMetadata] = index.state_dict_metadata
        known: dict[str, Any] = index.planner_data or {}
        self._tells_places = bool(known)
        self.paths: dict[str, Place] = {name: known.get(name) or tuple(name.split(".", 1)) for name in self.stored}
        self.meta = self._read_meta()
        for key in {path[0] for path in self.paths.values() if path[1:2] == ("param_groups",)} if not known else ():
            self._split_optimizer(str(key))

    def _read_meta(self) -> dict[str, Any]:
        path = self.folder / _METADATA_FILENAME
        if not path.is_file():
            return {}
        try:
            meta: Any = _load(path, "cpu", weights_only=self._weights_only)
            if not isinstance(meta, dict):
                raise _DamageError(f"holds {type(meta).__name__}, no dict")
        except ImportError:  # what is trusted may need packages
            raise
        except Exception as error:  # of what is damaged, unpickling may raise anything
            raise _explained(self.folder, _METADATA_FILENAME, error) from error
        return meta

    @property
    def is_bare(self) -> bool:
        """Whether there are tensors by name and nothing else, as in the state dict of one module."""
        tensors_alone = not any(isinstance(stored, BytesStorageMetadata) for stored in self.stored.values())
        return tensors_alone and not self.meta and all(len(place) == 1 for place in self.paths.values())

    def as_entry(self, key: str) -> None:
        """Take all of what is bare as the entry ``key`` of a state."""
        self.paths = {name: (key, *(place if self._tells_places else (name,))) for name, place in self.paths.items()}

    def split_names(self, keys: Iterable[str]) -> None:
        """Take what lies under names such as ``model.weight``, in a state that was flat, as parts of these ``keys``."""
        known = self.keys()
        for key in keys:
            for name, (first, *rest) in self.paths.items() if key not in known else ():
                if str(first).startswith(f"{key}."):
                    self.paths[name] = (key, str(first)[len(key) + 1 :], *rest)

    def split_optimizers(self, keys: Collection[str]) -> None:
        """Take what lies under names such as ``state.weight.exp_avg``, in what was flat, as parts of the optimizers.

        Raises:
            ValueError: if a name says neither of which parameter nor of which group it is.

        """
        self.split_names(keys)
        for key in keys:
            self._split_optimizer(key)
            for name, place in self.below(key):
                if place and str(place[0]).startswith(("state.", "param_groups.")):
                    raise ValueError(
                        f"The checkpoint has a value {name!r} of an optimizer, and such a name says neither of which "
                        "parameter nor of which group it is. Save the optimizer's `state_dict()`, with its groups."
                    )

    def _split_optimizer(self, key: str) -> None:
        for name, place in self.below(key):
            self.paths[name] = (key, *_place_in_optimizer(place))

    def keys(self) -> set[str]:
        """Return the keys of the state."""
        return {*(str(path[0]) for path in self.paths.values()), *self.meta}

    def single_values(self) -> set[str]:
        """Return the keys under which there is one value that is no tensor."""
        plain = {name for name, stored in self.stored.items() if isinstance(stored, BytesStorageMetadata)}
        return {name for name in plain if self.paths[name] == (name,)}

    def below(self, key: str) -> list[tuple[str, Place]]:
        """Return the name of each value of the state's entry ``key``, and where it is in that entry."""
        return [(name, path[1:]) for name, path in self.paths.items() if path[0] == key]

    def blank(self, name: str, device: torch.device | str = "cpu") -> Tensor | None:
        """Return an uninitialised tensor to read ``name`` into; None if it is no tensor."""
        stored = self.stored[name]
        if isinstance(stored, BytesStorageMetadata):
            return None
        return torch.empty(stored.size, dtype=stored.properties.dtype, device=device)

    def read(self, values: dict[str, Any]) -> None:
        """Read what ``values`` names: into its tensors in place, sharded or not; other values are replaced.

        Needs no other rank: each reads only what its own part of a tensor needs. Values are cast to the dtype of the
        tensors.

        Raises:
            pickle.UnpicklingError: if there are objects that ``weights_only`` refuses.
            RuntimeError: if a file is damaged.

        """
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
                load(values, storage_reader=self._reader, planner=_LoadPlanner(self._weights_only), no_dist=True)
        except CheckpointException as failed:  # it is no `Exception`
            ((error, _),) = failed.failures.values()
            if not isinstance(error, Exception):  # the user's Ctrl+C
                raise error from None
            raise _explained(self.folder, self._reader.file, error) from error


def _place_in_optimizer(place: Place) -> Place:
    """Return where a value with names such as ``state.weight.exp_avg`` was; ``place`` if they do not tell."""
    names, rest = ".".join(map(str, place[:1])), place[1:]
    if match := re.fullmatch(r"param_groups\.(\d+)(?:\.(.+))?", names):
        return ("param_groups", int(match[1]), *filter(None, [match[2]]), *rest)
    if match := re.fullmatch(r"state\.(.+)" if rest else r"state\.(.+)\.(.+)", names):
        return ("state", *match.groups(), *rest)
    return place


class _DamageError(ValueError):
    """What is wrong with a file, which is the subject of the sentence."""


def is_refusal(error: Exception) -> bool:
    """Whether unpickling failed because of an object that ``weights_only`` does not make, not because of damage."""
    return isinstance(error, pickle.UnpicklingError) and _REFUSED.search(str(error)) is not None


def _refused(path: Path, error: Exception) -> pickle.UnpicklingError:
    found = _REFUSED.search(str(error))
    assert found is not None
    return pickle.UnpicklingError(
        f"The checkpoint {str(path)!r} holds an object of {found[1] or found[2]}, which `weights_only=True` (the "
        "default) refuses, because a file with such objects can run any code. If you trust the file, pass "
        "`weights_only=False`."
    )


def _explained(folder: Path, file: str, error: Exception) -> Exception:
    if is_refusal(error):
        return _refused(folder / file, error)
    if isinstance(error, _DamageError):
        return _damaged(folder, file, str(error))
    if isinstance(error, FileNotFoundError):
        return _damaged(folder, file, "is missing")
    if isinstance(error, OSError):
        return error
    text = str(error).partition("WeightsUnpickler error:")[2] or str(error)  # around that is advice to trust the file
    reason = re.split(r"\.\s|\n", text.strip())[0].rstrip(".")
    return _damaged(folder, file, f"cannot be read: {type(error).__name__}{reason and f': {reason}'}")


def _damaged(folder: Path, file: str, what: str) -> RuntimeError:
    return RuntimeError(f"The checkpoint {str(folder)!r} is damaged: its file {file!r} {what}.")


class _LoadPlanner(DefaultLoadPlanner):
    """Takes names as they are in the files; does not run code that the files hold, unless told to."""

    def __init__(self, weights_only: bool | None) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._weights_only = weights_only

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        self.state_dict[name] = torch.load(value, map_location="cpu", weights_only=self._weights_only)


class _Reader(FileSystemReader):
    """Reads the index once, and runs no code that it may hold, unless it is ``trusted``.

    Attributes:
        index: what the checkpoint has.
        file: the name of that which is read, or was when reading failed.

    """

    def __init__(self, folder: Path, trusted: bool) -> None:
        super().__init__(folder)
        self.file = _INDEX_FILENAME
        data = (folder / _INDEX_FILENAME).read_bytes()
        try:
            self.index: Metadata = pickle.loads(data) if trusted else _IndexUnpickler(io.BytesIO(data)).load()
            _check_index(self.index)
        except _RefusedError as error:
            raise pickle.UnpicklingError(
                f"The index of the checkpoint {str(folder)!r} names {error}, which is no part of an index. It could "
                "run any code. If you trust the checkpoint, pass `weights_only=False`."
            ) from None
        except ImportError:
            raise
        except Exception as error:
            raise _explained(folder, _INDEX_FILENAME, error) from error

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.index

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """As torch does it, one file after the other, so that it is known which one cannot be read."""
        self.file = _INDEX_FILENAME
        items: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            items.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for self.file in items:
            super().read_data(replace(plan, items=items[self.file]), planner)
        return super().read_data(replace(plan, items=[]), planner)


def _check_index(index: Metadata) -> None:
    """Raise if it is none; if it names files outside; if a part of a tensor is nowhere, for reading would leave what
    was there before.
    """
    for name, stored in index.state_dict_metadata.items():
        if not isinstance(stored, BytesStorageMetadata):
            whole = torch.empty(stored.size, dtype=stored.properties.dtype, device="meta").numel()
            parts = sum(math.prod(chunk.sizes) for chunk in stored.chunks)
            if parts < whole:
                raise _DamageError(f"has {parts} of the {whole} numbers of {name!r}")
    for place in (index.planner_data or {}).values():
        if not isinstance(place, tuple) or not place or not all(isinstance(part, (str, int)) for part in place):
            raise _DamageError(f"has {place!r} for the place of a value")
    for part in index.storage_data.values():
        path = PurePosixPath(part.relative_path)
        if path.is_absolute() or ".." in path.parts or "\\" in str(path) or ":" in str(path):
            raise _DamageError(f"names the file {str(path)!r}, which is not inside of the checkpoint")


class _RefusedError(pickle.UnpicklingError):
    """An index has what is no part of one."""


class _IndexUnpickler(pickle.Unpickler):
    """Makes what an index consists of, and nothing else."""

    _ALLOWED = frozenset(
        {
            *(
                ("torch.distributed.checkpoint.metadata", name)
                for name in (
                    "Metadata",
                    "MetadataIndex",
                    "TensorStorageMetadata",
                    "TensorProperties",
                    "BytesStorageMetadata",
                    "ChunkStorageMetadata",
                    "StorageMeta",
                    "_MEM_FORMAT_ENCODING",
                )
            ),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch.serialization", "_get_layout"),
            ("torch", "Size"),
            ("collections", "OrderedDict"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if module.partition(".")[0] == "pathlib":  # where it was written: of whichever system that was
            return _a_path
        raise _RefusedError(f"{module}.{name}")


def _a_path(*parts: str) -> str:
    return "/".join(parts)


# -- states


def nested(values: Mapping[Place, Any]) -> Any:
    """Return the dicts and lists in which the ``values`` are where their paths say."""
    if () in values:
        return values[()]
    parts: dict[str | int, dict[Place, Any]] = {}
    for path, value in values.items():
        parts.setdefault(path[0], {})[path[1:]] = value
    if all(isinstance(part, int) for part in parts):
        return [nested(parts[place]) for place in sorted(parts)]
    return {part: nested(inside) for part, inside in parts.items()}


def named_groups(state: Any) -> list[list[str]] | None:
    """Return the names of the parameters in each group of an optimizer state; None if it is none by names."""
    groups = state.get("param_groups") if isinstance(state, Mapping) else None
    if not isinstance(groups, Sequence) or not all(isinstance(group, Mapping) for group in groups):
        return None
    names = [list(group.get("params", ())) for group in groups]
    return names if any(names) and all(isinstance(name, str) for group in names for name in group) else None


def by_number(state: Mapping[str, Any], number_of: Mapping[str, int], groups: list[list[int]]) -> dict[str, Any]:
    """Return the optimizer ``state``, which is by names, as ``Optimizer.state_dict`` would: by numbers."""
    return {
        **state,
        "state": {number_of[name]: values for name, values in state.get("state", {}).items()},
        "param_groups": [
            {**group, "params": params} for group, params in zip(state["param_groups"], groups, strict=True)
        ],
    }


def read_all(folder: str | os.PathLike[str], weights_only: bool | None = None) -> dict[str, Any]:
    """Return all of a checkpoint, as a strategy that does not shard would have saved it: optimizers by number."""
    opened = ShardedFolder(folder, weights_only)
    values: dict[str, Any] = {name: opened.blank(name) for name in opened.stored}
    opened.read(values)
    state = nested({opened.paths[name]: value for name, value in values.items()}) if values else {}
    return {**{key: _numbered(value) for key, value in state.items()}, **opened.meta}


def _numbered(state: Any) -> Any:
    names = named_groups(state)
    if names is None:
        return state
    number_of = {name: number for number, name in enumerate(name for group in names for name in group)}
    return by_number(state, number_of, [[number_of[name] for name in group] for group in names])
