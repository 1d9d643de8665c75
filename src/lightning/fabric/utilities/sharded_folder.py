"""Checkpoints in a folder: tensors in torch's distributed format, a file per rank; plain values in ``meta.pt``.

A state ``{"model": ..., "optimizer": ..., "epoch": 3}`` lies on disk as

* ``__<rank>_<n>.distcp`` and ``.metadata``, as ``torch.distributed.checkpoint`` writes them: each tensor under
  ``model.<name>``, ``optimizer.state.<name>.<entry>`` and ``optimizer.param_groups.<i>.<option>``;
* ``meta.pt``: ``{"epoch": 3}``.

Tools of torch that read such folders read these too, and a folder of torch's own without ``meta.pt`` is read as well.
"""

import io
import os
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from lightning.fabric.utilities.cloud_io import _load
from lightning.fabric.utilities.data import AttributeDict
from lightning.fabric.utilities.load import _METADATA_FILENAME

_INDEX = ".metadata"
_CHECKPOINT_FILE = re.compile(r"__\d+_\d+\.distcp|\.metadata|meta\.pt")

torch.serialization.add_safe_globals([AttributeDict, bytes])  # torch knows all bytes but the empty ones

Place = tuple[str | int, ...]  # of a value in the nested state: keys of dicts, indices of lists


def is_sharded_folder(folder: str | os.PathLike[str]) -> bool:
    """Return whether ``folder`` holds a complete checkpoint; the index is what a save writes last."""
    return os.path.isfile(os.path.join(folder, _INDEX))


def foreign_entries(folder: Path) -> list[Path]:
    """Return what lies in ``folder`` but is no part of a checkpoint."""
    return [entry for entry in folder.iterdir() if not _CHECKPOINT_FILE.fullmatch(entry.name)]


# -- writing


def write(folder: Path, values: Mapping[Place, Any]) -> None:
    """Collective: write ``values``, by their places in the nested state, into the fresh ``folder``.

    Sharded tensors are written by the ranks that have them; of what every rank has, the lowest rank's is written.

    Raises:
        CheckpointException: on all ranks, if one fails; it is no ``Exception``.

    """
    paths = {_flat(path): path for path in values}
    if len(paths) < len(values):
        doubles = sorted({_flat(path) for path in values if paths[_flat(path)] != path})
        raise ValueError(
            f"Two values would get the same name in the checkpoint: {doubles}. Rename a key of the state that is "
            "the beginning of another one."
        )
    flat = {_flat(path): value for path, value in values.items()}
    save(flat, storage_writer=FileSystemWriter(folder), planner=_SavePlanner(paths))


def write_meta(folder: Path, values: Mapping[str, Any]) -> None:
    """Write the plain ``values``; one rank calls it."""
    torch.save(dict(values), folder / _METADATA_FILENAME)


def _flat(path: Place) -> str:
    return ".".join(map(str, path))


class _SavePlanner(DefaultSavePlanner):
    """Takes values that are flat already, and remembers where they are in the nested state."""

    def __init__(self, paths: dict[str, Any]) -> None:
        super().__init__(dedup_save_to_lowest_rank=True)
        self._paths = paths

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        self.state_dict, self.mappings, self.is_coordinator = state_dict, self._paths, is_coordinator


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
        RuntimeError: if the index is damaged.

    """

    def __init__(self, folder: str | os.PathLike[str], weights_only: bool | None = None) -> None:
        self.folder = Path(folder)
        self._weights_only = weights_only
        self._reader = _Reader(self.folder, trusted=weights_only is False)
        index = self._reader.index
        self.stored: dict[str, TensorStorageMetadata | BytesStorageMetadata] = index.state_dict_metadata
        known: dict[str, Any] = index.planner_data or {}
        self.paths: dict[str, Place] = {name: known.get(name) or tuple(name.split(".", 1)) for name in self.stored}
        self.meta = self._read_meta()

    def _read_meta(self) -> dict[str, Any]:
        path = self.folder / _METADATA_FILENAME
        if not path.is_file():
            return {}
        try:
            meta: dict[str, Any] = _load(path, "cpu", weights_only=self._weights_only)
        except pickle.UnpicklingError as error:
            raise _refused(path, error) from error
        return meta

    def keys(self) -> set[str]:
        """Return the keys of the state."""
        return {*(str(path[0]) for path in self.paths.values()), *self.meta}

    def below(self, key: str) -> Iterator[tuple[str, Place]]:
        """Yield the name of each value of the state's entry ``key``, and where it is in that entry."""
        return ((name, path[1:]) for name, path in self.paths.items() if path[0] == key)

    def blank(self, name: str, device: torch.device | str = "cpu") -> Tensor | None:
        """Return an uninitialised tensor to read ``name`` into; None if it is no tensor."""
        stored = self.stored[name]
        if isinstance(stored, BytesStorageMetadata):
            return None
        return torch.empty(stored.size, dtype=stored.properties.dtype, device=device)

    def read(self, values: dict[str, Any], on_all_ranks: bool = True) -> None:
        """Read what ``values`` names: into its tensors in place, sharded or not; other values are replaced.

        Collective, unless not ``on_all_ranks``; every rank names the same. Each reads only what it needs. Values are
        cast to the dtype of the tensors.

        Raises:
            CheckpointException: on all ranks, if one fails; it is no ``Exception``. See :func:`cause`.

        """
        planner = _LoadPlanner(self._weights_only)
        if on_all_ranks:
            load(values, storage_reader=self._reader, planner=planner)
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
            load(values, storage_reader=self._reader, planner=planner, no_dist=True)

    def cause(self, failed: CheckpointException, rank: int) -> Exception | None:
        """Return why ``rank`` failed, as an exception for users; None if others did."""
        if rank not in failed.failures:
            return None
        error = failed.failures[rank][0]
        if isinstance(error, pickle.UnpicklingError):
            return _refused(self.folder, error)
        damaged = RuntimeError(f"The checkpoint {str(self.folder)!r} is damaged: {type(error).__name__}: {error}")
        damaged.__cause__ = error
        return damaged


def _refused(path: Path, error: Exception) -> pickle.UnpicklingError:
    found = re.search(r"GLOBAL (\S+)|got <class '(.+?)'>", str(error))
    what = f"an object of {found[1] or found[2]}" if found else f"something else than plain values ({error})"
    return pickle.UnpicklingError(
        f"The checkpoint {str(path)!r} holds {what}, which `weights_only=True` (the default) refuses, because a file "
        "with such objects can run any code. If you trust the file, pass `weights_only=False`."
    )


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
    """Reads the index once, and runs no code that it may hold, unless it is ``trusted``."""

    def __init__(self, folder: Path, trusted: bool) -> None:
        super().__init__(folder)
        try:
            data = (folder / _INDEX).read_bytes()
            self.index: Metadata = pickle.loads(data) if trusted else _IndexUnpickler(io.BytesIO(data)).load()
        except _RefusedError as error:
            raise pickle.UnpicklingError(f"{error}") from None
        except (EOFError, pickle.UnpicklingError, AttributeError, ValueError, KeyError, IndexError) as error:
            raise RuntimeError(f"The checkpoint {str(folder)!r} is damaged: its {_INDEX}: {error}") from error

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.index


class _RefusedError(pickle.UnpicklingError):
    pass


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
        raise _RefusedError(
            f"The index of the checkpoint names {module}.{name}, which is no part of an index. It could run any code. "
            "If you trust the checkpoint, pass `weights_only=False`."
        )


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
    try:
        opened.read(values, on_all_ranks=False)
    except CheckpointException as failed:
        raise opened.cause(failed, 0) or RuntimeError(str(failed)) from None
    state = nested({opened.paths[name]: value for name, value in values.items()}) if values else {}
    return {**{key: _numbered(value) for key, value in state.items()}, **opened.meta}


def _numbered(state: Any) -> Any:
    names = named_groups(state)
    if names is None:
        return state
    number_of = {name: number for number, name in enumerate(name for group in names for name in group)}
    return by_number(state, number_of, [[number_of[name] for name in group] for group in names])
