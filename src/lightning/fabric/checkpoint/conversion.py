"""A checkpoint of any form, made into one of another form."""

import os
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch.serialization import MAGIC_NUMBER

from lightning.fabric.checkpoint.contents import Contents, Sharded, verified_contents
from lightning.fabric.checkpoint.manifest import MANIFEST, DamagedCheckpointError, Manifest, read_manifest
from lightning.fabric.checkpoint.safetensors_files import (
    begins_as_safetensors,
    is_index,
    is_safetensors,
    names_of_parts,
    write_safetensors,
)
from lightning.fabric.checkpoint.saving import OneRank, Prepared, SaveOptions, Written, save
from lightning.fabric.checkpoint.sizes import size_in_bytes
from lightning.fabric.utilities import sharded_folder
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol, _local_path, get_filesystem
from lightning.fabric.utilities.load import is_sharded_folder
from lightning.fabric.utilities.types import _PATH

Format = Literal["torch", "safetensors", "sharded"]
_SHARD_SIZE = "5GB"
_MODEL = "model"
_ARCHIVE = b"PK\x03\x04"
_OLD_FORMAT = pickle.dumps(MAGIC_NUMBER, protocol=2)  # of torch.save before it wrote archives
_ENOUGH_TO_SEE = 1024  # bytes
_SHARDED_FILE = re.compile(r"__\d+_\d+\.distcp|\.metadata|meta\.pt")


@dataclass(frozen=True)
class Converted:
    """What :func:`convert` has made.

    Attributes:
        path: where it is.
        left_out: the keys of what the new form has no room for.
        has_manifest: whether damage to it will be noticed; a single safetensors file has no room for one.
        was_verified: whether the source had a manifest, and was as that says.

    """

    path: _PATH
    left_out: tuple[str, ...] = ()
    has_manifest: bool = True
    was_verified: bool = True


def convert(
    source: _PATH,
    target: _PATH,
    format: Format = "torch",
    *,
    key: str | None = None,
    max_shard_size: int | str | None = None,
    weights_only: bool | None = None,
    overwrite: bool = False,
) -> Converted:
    """Read the checkpoint ``source``, after verifying it, and write it to ``target`` in another form, with a manifest.

    One process does this, on the CPU; tensors of a file are mapped, those of a sharded folder held in memory. What is
    written appears whole or not at all.

    Args:
        source: any checkpoint that ``fabric.load`` reads, one without a manifest too; of a folder of checkpoints, the
            newest good one.
        target: a path where nothing is.
        format: ``"torch"`` is one file, as strategies save that do not shard. ``"safetensors"`` holds the weights
            alone: one file if ``target`` ends with ``.safetensors``, else a folder as Hugging Face lays it out.
            ``"sharded"`` is a folder, as FSDP saves it.
        key: the entry with the weights; by default ``"model"``, or the only one that looks like a module's. Of a
            source that is a bare state dict, the key that it gets.
        max_shard_size: of a file of safetensors in a folder: bytes, or a text such as ``"5GB"``, which is the default.
        weights_only: ``False`` runs code that the files may hold.
        overwrite: replace the checkpoint at ``target``. What else lies in its folder stays there.

    Raises:
        FileNotFoundError: if there is nothing at ``source``.
        FileExistsError: if something is at ``target``, unless it is a checkpoint and ``overwrite``.
        IsADirectoryError: if a file is to replace a folder that has other things in it than a checkpoint.
        DamagedCheckpointError: if ``source`` is not as it was saved.
        ValueError: if arguments do not go together; if ``source`` has not what the form needs.
        pickle.UnpicklingError: if it holds what ``weights_only`` refuses.

    """
    if format not in get_args(Format):
        raise ValueError(f"`format` must be one of {list(get_args(Format))}, but got {format!r}.")
    limit = _shard_size(target, format, max_shard_size)
    _check_target(target, overwrite, format, is_folder=limit is not None or format == "sharded")
    with verified_contents(source, weights_only) as (contents, manifest):
        form = _FORMS[format](contents, key, limit)
        _save(form, target, manifest or Manifest({}))
    return Converted(target, form.left_out, form.is_folder or format == "torch", manifest is not None)


def _shard_size(target: _PATH, format: str, given: int | str | None) -> int | None:
    """Return the limit; None for what goes into one file."""
    in_a_folder = format == "safetensors" and not str(target).endswith(".safetensors")
    if given is not None and not in_a_folder:
        what = "a single file" if format == "safetensors" else f"format={format!r}"
        raise ValueError(
            f"`max_shard_size` is for safetensors files in a folder, but {os.fspath(target)!r} is {what}. Leave it out."
        )
    if not in_a_folder:
        return None
    size = size_in_bytes(_SHARD_SIZE) if given is None else given if isinstance(given, int) else size_in_bytes(given)
    if size < 1:
        raise ValueError(f"`max_shard_size` must be at least 1 byte, but got {given!r}.")
    return size


# -- the forms


@dataclass(frozen=True)
class _Form:
    """What is to be written, to a file or into a folder."""

    write: Callable[[Path], Written]
    is_folder: bool = False
    finish: Callable[[Path, list[Any]], None] = lambda staged, results: None
    left_out: tuple[str, ...] = ()


def _torch_file(contents: Contents, key: str | None, limit: int | None) -> _Form:
    if key is not None and not contents.is_bare:
        raise ValueError(f"format='torch' takes all entries of the checkpoint, so leave out key={key!r}.")
    state = contents.whole() if key is None else {key: contents.whole()}

    def write(staged: Path) -> Written:
        torch.save(state, staged)
        return Written([""])

    return _Form(write)


def _safetensors(contents: Contents, key: str | None, limit: int | None) -> _Form:
    if contents.is_bare:
        state, left_out = contents.whole(), []
    else:
        chosen = _weights_key(contents, key)
        state, left_out = contents.entry(chosen), [each for each in contents.keys if each != chosen]
    if not isinstance(state, Mapping):
        raise ValueError(f"The checkpoint has {type(state).__name__} under {key!r}, no state dict of a module.")

    def write(staged: Path) -> Written:
        write_safetensors(state, staged, limit)
        names = [] if limit is None else [file.name for file in staged.iterdir()]
        return Written(names or [""])

    return _Form(write, is_folder=limit is not None, left_out=tuple(left_out))


def _sharded(contents: Contents, key: str | None, limit: int | None) -> _Form:
    values, meta = _values_by_place(contents, key)
    shards = sharded_folder.Shards.plan(values, OneRank())

    def write(staged: Path) -> Written:
        names, result = shards.write(staged)
        return Written([*names, sharded_folder.write_meta(staged, meta)], result)

    return _Form(write, is_folder=True, finish=shards.finish)


_FORMS: Mapping[str, Callable[[Contents, str | None, int | None], _Form]] = {
    "torch": _torch_file,
    "safetensors": _safetensors,
    "sharded": _sharded,
}


def _weights_key(contents: Contents, key: str | None) -> str:
    keys, weights = contents.keys, contents.weights_keys()
    if key is not None:
        if key not in keys:
            raise ValueError(f"The checkpoint has no entry {key!r}. Pass as `key` one of {keys}.")
        return key
    if _MODEL in weights:
        return _MODEL
    if len(weights) != 1:
        look = f"{weights} all look" if weights else "none of them looks"
        raise ValueError(
            f"The checkpoint has the entries {keys}, and {look} like the state dict of a module. Pass as `key` the one "
            "with the weights."
        )
    return weights[0]


def _values_by_place(contents: Contents, key: str | None) -> tuple[dict[sharded_folder.Place, Any], dict[str, Any]]:
    """Return what goes into the shards, by its place in the state; and the plain values."""
    if contents.is_bare:
        return {(key or _MODEL, name): value for name, value in contents.whole().items()}, {}
    if isinstance(contents, Sharded):
        return contents.values_by_place(), contents.folder.meta
    chosen = _weights_key(contents, key)
    surplus = [each for each in contents.weights_keys() if each != chosen]
    if surplus:
        raise ValueError(
            f"Besides {chosen!r}, the entries {surplus} look like state dicts of modules, and nothing tells whether "
            "they are: modules and plain values lie apart in a sharded folder. Load the file with `fabric.load` under "
            "a strategy that shards, and save it there."
        )
    values: dict[sharded_folder.Place, Any] = {}
    meta = {}
    for name in contents.keys:
        value = contents.entry(name)
        if name == chosen:
            values |= {(name, inner): each for inner, each in value.items()}
        elif _is_optimizer(value):
            values |= _optimizer_by_place(name, _by_name(name, value, contents.entry(chosen)))
        else:
            meta[name] = value
    return values, meta


def _is_optimizer(value: Any) -> bool:
    groups = value.get("param_groups") if isinstance(value, Mapping) else None
    return isinstance(groups, Sequence) and "state" in value


def _by_name(key: str, state: Mapping[str, Any], weights: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the optimizer's state by names of parameters, which it has, or knows if it was made with them."""
    if sharded_folder.named_groups(state) is not None:
        return state
    groups: Sequence[Mapping[str, Any]] = state["param_groups"]
    names = [list(group.get("param_names", ())) for group in groups]
    known = all(len(each) == len(group["params"]) for each, group in zip(names, groups, strict=True))
    if not known or not all(name in weights for each in names for name in each):
        raise ValueError(
            f"The optimizer {key!r} has its parameters by number, and a sharded folder has them by name; the file does "
            "not say which number has which name. Load it with `fabric.load` under a strategy that shards, which reads "
            "this file, and save it there."
        )
    name_of = {
        number: name
        for each, group in zip(names, groups, strict=True)
        for number, name in zip(group["params"], each, strict=True)
    }
    return {
        **state,
        "state": {name_of[number]: values for number, values in state["state"].items()},
        "param_groups": [{**group, "params": each} for group, each in zip(groups, names, strict=True)],
    }


def _optimizer_by_place(key: str, state: Mapping[str, Any]) -> dict[sharded_folder.Place, Any]:
    values: dict[sharded_folder.Place, Any] = {
        (key, "state", name, entry): value
        for name, entries in state["state"].items()
        for entry, value in entries.items()
    }
    for index, group in enumerate(state["param_groups"]):
        values |= {(key, "param_groups", index, option): value for option, value in group.items()}
    return values


# -- the target


def _save(form: _Form, target: _PATH, facts: Manifest) -> None:
    prepared = Prepared(
        form.write,
        form.finish,
        is_folder=form.is_folder,
        foreign=_foreign,
    )
    options = SaveOptions(step=facts.step, metrics=facts.metrics)
    save(prepared, target, options, OneRank(), strategy=facts.strategy)


def _check_target(target: _PATH, overwrite: bool, format: str, is_folder: bool) -> None:
    if not _is_local_file_protocol(target):
        exists = get_filesystem(target).exists(str(target))
    else:
        local = _local_path(target)
        exists = os.path.lexists(local)
        if overwrite and local.is_dir():
            _check_folder(local, format, is_folder)
        elif overwrite and local.exists() and not _is_checkpoint_file(local):
            raise FileExistsError(
                f"{str(target)!r} is no checkpoint, as far as can be seen, so it is not replaced by one. Delete it, or "
                "choose another path."
            )
    if exists and not overwrite:
        raise FileExistsError(f"{str(target)!r} exists. Delete it, choose another path, or say `overwrite`.")


def _check_folder(target: Path, format: str, is_folder: bool) -> None:
    """Raise if it must not be replaced: by anything, or by this form."""
    if not _is_checkpoint(target):
        raise FileExistsError(f"The folder {str(target)!r} holds no checkpoint, so it is not replaced by one.")
    foreign = [entry.name for entry in _foreign(target)]
    if not is_folder and foreign:
        raise IsADirectoryError(
            f"The folder {str(target)!r} has {foreign[0]!r} in it, which is no part of a checkpoint, so no file takes "
            "its place. Choose the path of a file."
        )
    if format == "safetensors" and (indices := [name for name in foreign if is_index(name)]):
        raise FileExistsError(
            f"The folder {str(target)!r} has the index {indices[0]!r} of other weights, which would be read in place "
            "of what is written. Choose another path."
        )


def _is_checkpoint(folder: Path) -> bool:
    if (folder / MANIFEST).is_file() or is_sharded_folder(folder) or is_safetensors(folder):
        return True
    return not any(folder.iterdir())


def _is_checkpoint_file(path: Path) -> bool:
    """Whether it is one, though perhaps damaged; what is empty is none, and nothing is lost with it."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        begin = file.read(_ENOUGH_TO_SEE)
    is_archive = begin.startswith(_ARCHIVE) and b"/data.pkl" in begin  # the first thing in what torch saves
    return not begin or is_archive or begin.startswith(_OLD_FORMAT) or begins_as_safetensors(path)


def _foreign(former: Path) -> list[Path]:
    """Return what is no part of the ``former`` checkpoint."""
    try:
        manifest = read_manifest(former)
    except DamagedCheckpointError:
        manifest = None
    own = {MANIFEST, *(name.split("/")[0] for name in (manifest.files if manifest else ()))}
    if is_safetensors(former):
        own |= names_of_parts(former)
    is_sharded = is_sharded_folder(former)
    return [
        entry
        for entry in former.iterdir()
        if entry.name not in own and not (is_sharded and _SHARDED_FILE.fullmatch(entry.name))
    ]
