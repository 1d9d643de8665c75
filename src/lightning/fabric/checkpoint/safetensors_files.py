"""Weights in safetensors files, alone or many with an index, as Hugging Face lays them out.

Such files hold tensors by name and nothing else, and reading them runs no code.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lightning.fabric.utilities.cloud_io import _is_local_file_protocol, _local_path
from lightning.fabric.utilities.types import _PATH

_SUFFIX = ".safetensors"
_INDEX_SUFFIX = ".safetensors.index.json"
_WEIGHTS = f"model{_SUFFIX}"
_INDEX = f"model{_INDEX_SUFFIX}"
_FILE = re.compile(r".+\.safetensors(\.index\.json)?")
_WRITER = "format"  # the key in a file's metadata
_HEADER_LIMIT = 100_000_000  # bytes; the format's own


def is_safetensors(path: _PATH) -> bool:
    """Return whether the local ``path`` is a safetensors file, by its name or by how it begins, an index of some, or a
    folder with an index or a ``model.safetensors``.
    """
    if not _is_local_file_protocol(path):
        return False
    local = _local_path(path)
    if local.is_dir():
        return not (local / ".metadata").exists() and (bool(_indices(local)) or (local / _WEIGHTS).is_file())
    return local.is_file() and (_FILE.fullmatch(local.name) is not None or begins_as_safetensors(local))


def is_index(name: str) -> bool:
    """Return whether a file of this name in a folder is an index of safetensors files."""
    return name.endswith(_INDEX_SUFFIX)


def names_of_parts(folder: Path) -> set[str]:
    """Return the names of what in ``folder`` belongs to the weights that are read of it; not those in folders of it."""
    try:
        index = _index_of(folder)
    except ValueError:  # there are several
        return {_WEIGHTS}
    if index is None:
        return {_WEIGHTS}
    try:
        return {_WEIGHTS, index.name, *_files_in(index)}
    except (RuntimeError, ValueError):  # it is damaged
        return {_WEIGHTS, index.name}


def _indices(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{_INDEX_SUFFIX}"))


def begins_as_safetensors(path: Path) -> bool:
    """Return whether a file of any name may be a safetensors file."""
    with path.open("rb") as file:
        begin = file.read(9)
    length = int.from_bytes(begin[:8], "little")
    return begin[8:] == b"{" and length <= min(_HEADER_LIMIT, path.stat().st_size - 8)


# -- reading


def read_safetensors(path: _PATH) -> dict[str, Tensor]:
    """Return the tensors of what :func:`is_safetensors`, on the CPU.

    They are mapped: the operating system reads what is used. The files may be replaced or deleted meanwhile, but must
    not be overwritten. A name that a file's metadata gives as another one's is that one's tensor, tied to it.

    Raises:
        FileNotFoundError: if there is nothing, or a file of the index is missing.
        ValueError: if the index names files outside of its folder; if several indices could be meant.
        RuntimeError: if a file is damaged, or has other tensors than the index says.

    """
    local = _local_path(path)
    index = _index_of(local)
    if index is None:
        tensors, ties = _read_file(local / _WEIGHTS if local.is_dir() else local)
        return tensors | ties
    return _read_indexed(index)


def _index_of(path: Path) -> Path | None:
    if not path.is_dir():
        return path if is_index(path.name) else None
    found = _indices(path)
    if len(found) < 2:
        return found[0] if found else None
    if (path / _INDEX) in found:
        return path / _INDEX
    names = [each.name for each in found]
    raise ValueError(f"The folder {str(path)!r} has several indices: {names}. Pass the path of the one that is meant.")


def _read_indexed(index: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, wanted in _files_in(index).items():
        file = index.parent / name
        if not file.is_file():
            raise FileNotFoundError(f"The file {str(file)!r} is missing, which {index.name!r} names.")
        found, ties = _read_file(file)
        if missing := sorted(wanted - found.keys() - ties.keys()):
            raise RuntimeError(f"The file {str(file)!r} lacks tensors that {index.name!r} names: {missing[:10]}.")
        if extra := sorted(found.keys() - wanted):
            raise RuntimeError(f"The file {str(file)!r} has tensors that {index.name!r} does not: {extra[:10]}.")
        tensors |= found | ties
    return tensors


def _files_in(index: Path) -> dict[str, set[str]]:
    """Return the names of tensors that each file is to have."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files: dict[str, set[str]] = {str(file): set() for file in places.values()}
        for tensor, file in places.items():
            files[file].add(tensor)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RuntimeError(f"{str(index)!r} is no index of safetensors files, or is damaged: {error!r}") from error
    for file in files:
        parts = PurePosixPath(file)
        if parts.is_absolute() or ".." in parts.parts or "\\" in file or ":" in file:
            raise ValueError(f"{str(index)!r} names the file {file!r}, which is not inside of its folder.")
    return files


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the file's tensors, and those that further names stand for."""
    library = _library()
    if not path.is_file():
        raise FileNotFoundError(f"There is no safetensors file {str(path)!r}.")
    try:
        with library.safe_open(os.fspath(path), framework="pt", device="cpu") as file:
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata: dict[str, str] = file.metadata() or {}
    except library.SafetensorError as error:
        raise RuntimeError(f"The safetensors file {str(path)!r} is damaged: {error}") from error
    # as `safetensors.torch.save_model` notes which names share a tensor; `format` says what has written the file
    ties = {name: kept for name, kept in metadata.items() if name != _WRITER and name not in tensors}
    return tensors, {name: tensors[kept] for name, kept in ties.items() if kept in tensors}


# -- writing


def write_safetensors(state: Mapping[str, Any], target: Path, max_shard_size: int | None = None) -> None:
    """Write the tensors of ``state``: into the file ``target``; or, with ``max_shard_size``, into the folder.

    In the folder goes ``model.safetensors`` if that has room for all, else files of at most ``max_shard_size`` bytes
    (or one tensor) and their index. Names that share one tensor are written once, and the others noted in the file's
    metadata: readers that tie by themselves need no more, and :func:`read_safetensors` gives every name back.

    Raises:
        TypeError: if something is no tensor.
        ValueError: if a tensor is of a kind that such files cannot hold.

    """
    _library()
    _check(state)
    kept, ties = _without_ties(state)
    if max_shard_size is None:
        _write_file(target, kept, ties)
        return
    shards = list(_split(kept, max_shard_size))
    target.mkdir(parents=True, exist_ok=True)
    if len(shards) == 1:
        _write_file(target / _WEIGHTS, shards[0], ties)
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}{_SUFFIX}"
        _write_file(target / name, shard, ties)
        places |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": sum(map(_size, kept.values()))}, "weight_map": dict(sorted(places.items()))}
    (target / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _check(state: Mapping[str, Any]) -> None:
    others = {name: type(value).__name__ for name, value in state.items() if not isinstance(value, Tensor)}
    if others:
        raise TypeError(f"A safetensors file holds tensors by name and nothing else, but the state has {others}.")
    odd = [
        name
        for name, value in state.items()
        if value.layout is not torch.strided or value.is_quantized or value.is_meta
    ]
    if odd:
        raise ValueError(
            f"A safetensors file holds dense tensors with values, but these are sparse, quantized or meta: {odd}."
        )


def _without_ties(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return each tensor under the first of its names, and the first name of each further one."""
    first: dict[tuple[Any, ...], str] = {}
    kept: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    for name, tensor in state.items():
        # what has no elements has no place in memory either
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else (name,)
        if place in first and name != _WRITER:  # which would be taken for something else
            ties[name] = first[place]
        else:
            first.setdefault(place, name)
            kept[name] = tensor
    return kept, ties


def _split(state: Mapping[str, Tensor], limit: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in state.items():
        if shard and size + _size(tensor) > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += _size(tensor)
    yield shard


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _write_file(path: Path, tensors: Mapping[str, Tensor], ties: Mapping[str, str]) -> None:
    from safetensors.torch import save_file

    own: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        own[name] = _apart(tensor, own.values())
    metadata = {name: kept for name, kept in ties.items() if kept in tensors} | {_WRITER: "pt"}
    try:
        save_file(own, path, metadata=metadata)
    except KeyError as error:  # it knows no name for a dtype
        names = [name for name, tensor in tensors.items() if tensor.dtype in error.args]
        raise ValueError(f"A safetensors file cannot hold {error}, which is the dtype of {names[:10]}.") from error
    except _library().SafetensorError as error:
        kinds: Sequence[str] = sorted({str(tensor.dtype) for tensor in tensors.values()})
        raise ValueError(f"Cannot write {str(path)!r} with tensors of {kinds}: {error!r}") from error


def _apart(tensor: Tensor, others: Iterable[Tensor]) -> Tensor:
    """Return the tensor on the CPU, contiguous, with nothing else in its memory, of ``others`` neither."""
    tensor = tensor.detach().cpu().contiguous()
    has_all = tensor.untyped_storage().nbytes() == _size(tensor)
    is_first = tensor.data_ptr() not in {other.data_ptr() for other in others}
    return tensor if has_all and is_first else tensor.clone()


def _library() -> ModuleType:
    try:
        import safetensors
    except ModuleNotFoundError as error:
        if error.name != "safetensors":
            raise
        raise ModuleNotFoundError(
            "Safetensors files need the package `safetensors`. Install it with: pip install safetensors",
            name="safetensors",
        ) from error
    return safetensors
