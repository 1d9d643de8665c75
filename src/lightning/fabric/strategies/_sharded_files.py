"""Files of strategies whose modules are sharded: a folder that all ranks write, or one file that rank 0 writes.

What a folder looks like is in ``utilities/sharded_folder.py``. The file is the one that every other strategy writes and
reads: full tensors, optimizers by number. Either is read on any number of ranks, into modules that are sharded in
any way or not at all.
"""

import copy
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.modules.module import _IncompatibleKeys
from torch.optim import Optimizer

from lightning.fabric.checkpoint.pickling import naming_the_key, warn_of_what_loading_refuses
from lightning.fabric.checkpoint.safetensors_files import is_safetensors
from lightning.fabric.checkpoint.saving import Prepared, Written
from lightning.fabric.checkpoint.snapshot import detached
from lightning.fabric.strategies._dtensor import distribute_like, full_tensor, local_shard, local_tensor
from lightning.fabric.strategies._single_file import (
    _apply_filter,
    _validate_keys_for_strict_loading,
    by_names_of,
    check_module,
    check_optimizer,
    is_stateful,
    loads_in_its_own_way,
    misfit,
    prefixes_of_custom_loading,
    wrong_names,
)
from lightning.fabric.strategies.parallel import ParallelStrategy
from lightning.fabric.strategies.strategy import Strategy, _read
from lightning.fabric.utilities import sharded_folder
from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol, _local_path
from lightning.fabric.utilities.load import is_sharded_folder
from lightning.fabric.utilities.optimizer import parameter_names
from lightning.fabric.utilities.ranks import all_or_none
from lightning.fabric.utilities.sharded_folder import Place, ShardedFolder, Shards
from lightning.fabric.utilities.types import _PATH

_Filter = Mapping[str, Callable[[str, Any], bool]]

# -- saving

_PREPARING = "collecting what is saved"


def prepare(
    strategy: ParallelStrategy,
    state: Mapping[str, Any],
    *,
    sharded: bool,
    storage_options: Any = None,
    filter: _Filter | None = None,
) -> Prepared:
    """Collective: return ``state`` as it is to be written, the same kind of it on every rank.

    ``sharded`` makes a folder, with a file from each rank. Else rank 0 writes one file, and holds a full copy of the
    state on the CPU from now on.

    Raises:
        TypeError: for ``storage_options``.
        NotImplementedError: for a ``filter`` if ``sharded``.
        ValueError: if ``sharded`` and there is no module, or an optimizer's module is missing; for
            ``model.state_dict()`` in place of the model.
        RuntimeError: on the other ranks, if one fails; that one raises its own error.

    """
    if storage_options is not None:
        raise TypeError(
            f"{type(strategy).__name__} takes no `storage_options`, but got {storage_options!r}. Leave them out."
        )
    if not sharded:
        return _prepare_file(strategy, state, filter or {})
    if filter:
        raise NotImplementedError(
            f"`filter` chooses among full tensors, but {type(strategy).__name__} saves shards. Save a full checkpoint "
            "(state_dict_type='full', or save_distributed_checkpoint=False), or leave `filter` out."
        )
    return _prepare_folder(strategy, state)


def _prepare_file(strategy: ParallelStrategy, state: Mapping[str, Any], filter: _Filter) -> Prepared:
    with all_or_none(strategy, _PREPARING):
        parts = _Parts.of(strategy, state)
        rest = parts.plain_values()
    full: dict[str, Any] = {}
    for key in state:
        if key in parts.modules:
            full[key] = full_module_state(parts.modules[key], rank_zero_only=True)
        elif key in parts.optimizers:
            full[key] = full_optimizer_state(parts.optimizers[key], rank_zero_only=True)
        else:
            full[key] = rest[key]
    checkpoint: dict[str, Any] = {}
    with all_or_none(strategy, _PREPARING):
        for key, value in full.items() if strategy.is_global_zero else ():
            _apply_filter(key, filter, value, checkpoint)
    return strategy._prepared_file(checkpoint if strategy.is_global_zero else None)


def _prepare_folder(strategy: ParallelStrategy, state: Mapping[str, Any]) -> Prepared:
    with all_or_none(strategy, _PREPARING):
        parts = _Parts.of(strategy, state)
        parts.need_module("Saving shards")
        values, rest = parts.values_to_write(), parts.plain_values()
        if strategy.is_global_zero:
            warn_of_what_loading_refuses(rest)
    shards = Shards.plan(values, strategy._peers())
    part = _PartOfFolder(shards, rest if strategy.is_global_zero else None)
    return Prepared(
        part.write, shards.finish, is_folder=True, detach=part.detach, foreign=sharded_folder.foreign_entries
    )


class _PartOfFolder:
    """What one rank adds to a folder: its shards; and the plain values, which are None but on rank 0."""

    def __init__(self, shards: Shards, plain: Mapping[str, Any] | None) -> None:
        self._shards = shards
        self._plain = plain

    def detach(self, copy: Callable[[Tensor], Tensor]) -> None:
        self._shards.detach(copy)
        self._plain = detached(self._plain, copy)

    def write(self, folder: Path) -> Written:
        files, result = self._shards.write(folder)
        if self._plain is not None:
            with naming_the_key(self._plain):
                files.append(sharded_folder.write_meta(folder, self._plain))
        return Written(files, result)


# -- the parts of a state


@dataclass(frozen=True)
class _Parts:
    """A state taken apart; each part by its key in the state."""

    modules: dict[str, nn.Module] = field(default_factory=dict)
    optimizers: dict[str, Optimizer] = field(default_factory=dict)
    rest: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, strategy: Strategy, state: Mapping[str, Any]) -> "_Parts":
        parts = cls()
        for key, obj in state.items():
            if isinstance(obj, nn.Module):
                parts.modules[key] = strategy._module_with_state(obj)
            elif isinstance(obj, Optimizer):
                parts.optimizers[key] = obj
            else:
                parts.rest[key] = obj
        return parts

    def need_module(self, doing: str) -> None:
        if self.modules:
            return
        for key, value in self.rest.items():
            _refuse_sharded_tensors(key, value)
        raise ValueError(
            f"{doing} needs the module, but the state has none: its keys are {[*self.optimizers, *self.rest]}. "
            "Pass the model itself, as in {'model': model}."
        )

    def plain_values(self) -> dict[str, Any]:
        """Collective, if the state of one of the objects is: what is neither module nor optimizer, as it is saved."""
        values = {
            key: obj.state_dict() if callable(getattr(obj, "state_dict", None)) else obj
            for key, obj in self.rest.items()
        }
        for key, value in values.items():
            _refuse_sharded_tensors(key, value)
        return values

    def values_to_write(self) -> dict[Place, Any]:
        """Return what modules and optimizers hold, sharded as it is, by its place in the state."""
        values: dict[Place, Any] = {}
        for key, module in self.modules.items():
            values |= {(key, name): value for name, value in module.state_dict().items()}
        for key, optimizer in self.optimizers.items():
            values |= {(key, *place): value for place, value in _by_name(optimizer, self.names(key)).items()}
        return values

    def names(self, key: str) -> "_Names":
        return _Names.of(self.optimizers[key], self.modules, key)


def _refuse_sharded_tensors(key: str, value: Any) -> None:
    found: list[DTensor] = []
    apply_to_collection(value, DTensor, found.append)
    if found:
        raise ValueError(
            f"state[{key!r}] has sharded tensors in it (DTensor, the first of shape {tuple(found[0].shape)}), as the "
            "`state_dict()` of a model does. Pass the model itself (or the optimizer), not its `state_dict()`."
        )


# -- full states


def full_module_state(module: nn.Module, *, rank_zero_only: bool) -> dict[str, Any]:
    """Collective: ``module``'s state with full tensors on the CPU, gathered one after the other.

    With ``rank_zero_only``, other ranks get ``{}``, and never hold more than one full tensor. Names of one tied
    parameter share a tensor. What is not sharded is the tensor itself, not a copy.
    """
    keep = not rank_zero_only or _rank() == 0
    # with the parameters themselves, for only they tell on every rank alike which are tied
    own = module.state_dict(keep_vars=True)
    full: dict[str, Any] = {}
    gathered: dict[Tensor, Tensor | None] = {}
    for name, value in own.items():
        if not isinstance(value, Tensor):
            full[name] = value
            continue
        if value not in gathered:
            whole = full_tensor(value.detach())
            gathered[value] = whole.cpu() if keep else None
        full[name] = gathered[value]
    return _like(own, full) if keep else {}


def full_optimizer_state(optimizer: Optimizer, *, rank_zero_only: bool) -> dict[str, Any]:
    """Collective: ``optimizer.state_dict()`` with full tensors on the CPU, gathered one after the other.

    With ``rank_zero_only``, other ranks get ``{}``, and never hold more than one full tensor.
    """
    keep = not rank_zero_only or _rank() == 0

    def gather(tensor: Tensor) -> Tensor | None:
        whole = full_tensor(tensor.detach())
        return whole.cpu() if keep else None

    own = optimizer.state_dict()
    # in an order that is the same on every rank
    state = {key: apply_to_collection(own["state"][key], Tensor, gather) for key in sorted(own["state"], key=str)}
    groups = apply_to_collection(own["param_groups"], Tensor, gather)
    return {**own, "state": {key: state[key] for key in own["state"]}, "param_groups": groups} if keep else {}


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


@torch.no_grad()
def load_full_module_state(module: nn.Module, state_dict: Mapping[str, Any], strict: bool = True) -> _IncompatibleKeys:
    """Copy each rank's part of full tensors, or sharded ones, into ``module``, whose parameters may be sharded.

    Collective only for sharded tensors that are laid out otherwise than the module's. Holds one tensor at a time;
    keys and shapes are checked before anything is changed. Returns what ``Module.load_state_dict`` does.

    Raises:
        RuntimeError: if a shape is another one; if ``strict``, for keys that are missing or unexpected.

    """
    title = type(module).__name__
    check_module(module, state_dict, strict, title)
    return _copy_into(module, state_dict, strict, title)


def _copy_into(module: nn.Module, saved: Mapping[str, Any], strict: bool, title: str) -> _IncompatibleKeys:
    own = module.state_dict()
    if loads_in_its_own_way(module):
        laid_out = {name: _laid_out(value, own.get(name)) for name, value in saved.items()}
        result: _IncompatibleKeys = module.load_state_dict(_like(saved, laid_out), strict=strict)
        return result
    customs = prefixes_of_custom_loading(module)
    left = {
        name: _laid_out(value, own.get(name))
        for name, value in saved.items()
        if name.startswith(customs) or not isinstance(value, Tensor)
    }
    result = _load_parts(module, left, saved, strict, title)
    for name, value in saved.items():  # in this order on every rank: parts of another layout are exchanged
        if name in own and name not in left:
            _copy_part(value, own[name])
    others = [name for name in own if name not in saved and not name.startswith(customs)]
    surplus = [name for name in saved if name not in own and name not in left]
    return _IncompatibleKeys([*others, *result.missing_keys], [*surplus, *result.unexpected_keys])


def _load_parts(
    module: nn.Module, left: dict[str, Any], saved: Mapping[str, Any], strict: bool, title: str
) -> _IncompatibleKeys:
    """Hand ``left`` to the parts of ``module`` that load in their own way; what they miss is only known then."""
    customs = prefixes_of_custom_loading(module)
    if not left and not customs:
        return _IncompatibleKeys([], [])
    missing, unexpected = module.load_state_dict(_like(saved, left), strict=False)
    missing = [name for name in missing if name.startswith(customs)]
    if strict and (missing or unexpected):
        problems = wrong_names(missing, unexpected)
        raise RuntimeError(misfit(module, title, problems, "parts that load in their own way were"))
    return _IncompatibleKeys(missing, unexpected)


def _like(saved: Mapping[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return ``values`` with the version numbers of ``saved``, which travel as an attribute."""
    if not hasattr(saved, "_metadata"):
        return values
    state = OrderedDict(values)
    state._metadata = saved._metadata  # type: ignore[attr-defined]
    return state


def _copy_part(value: Tensor, into: Tensor) -> None:
    value = value.reshape(into.shape)  # of what is no dimension and what is one number
    if isinstance(into, DTensor) and not isinstance(value, DTensor):
        local_tensor(into).copy_(local_shard(value, into))
    elif isinstance(value, DTensor) and not isinstance(into, DTensor):
        into.copy_(full_tensor(value))
    else:
        into.copy_(value)


def _laid_out(value: Any, like: Any) -> Any:
    """Return ``value`` as a tensor laid out like ``like``; it refers to no other tensor's memory."""
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    if isinstance(like, DTensor) and not isinstance(value, DTensor):
        part = distribute_like(value, like)
        if local_tensor(part).numel() < value.numel():
            return part  # has memory of its own
        value = part
    return value.clone()


def load_full_optimizer_state(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Load what :func:`full_optimizer_state` or ``Optimizer.state_dict`` returned; parameters may be sharded.

    State of a sharded parameter's shape is sharded like the parameter. Raises ``ValueError`` before anything is
    changed, if the groups do not have as many parameters.
    """
    check_optimizer(optimizer, state_dict, type(optimizer).__name__)
    saved = [number for group in state_dict["param_groups"] for number in group["params"]]
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parameter_of = dict(zip(saved, own, strict=True))
    laid_out = {
        number: apply_to_collection(values, Tensor, _state_like, parameter_of.get(number))
        for number, values in state_dict["state"].items()
    }
    optimizer.load_state_dict({**state_dict, "state": laid_out})


def _state_like(value: Tensor, parameter: Tensor | None) -> Tensor:
    return _laid_out(value, None if parameter is None else _layout(value, parameter))


def _layout(state: Tensor, parameter: Tensor) -> Tensor | None:
    """Return a tensor that is laid out as ``state`` of ``parameter`` should be; None for a plain one."""
    if not isinstance(parameter, DTensor) or state.ndim == 0:
        return None
    if state.shape == parameter.shape:
        return parameter.detach()
    # as operations of torch make it, that turn a sharded tensor into one of another shape
    mesh = parameter.device_mesh
    blank = torch.empty(state.shape, dtype=state.dtype, device=parameter.device)
    return DTensor.from_local(blank, mesh, [Replicate()] * mesh.ndim, run_check=False)


# -- names


@dataclass(frozen=True)
class _Names:
    """The names of an optimizer's parameters in the modules of the state.

    Attributes:
        groups: a name for each parameter, group by group.
        number_of: the number that ``Optimizer.state_dict`` gives to the parameter, by each of its names.
        title: what the optimizer is called in errors.

    """

    groups: list[list[str]]
    number_of: dict[str, int]
    title: str

    @classmethod
    def of(cls, optimizer: Optimizer, modules: Mapping[str, nn.Module], key: str) -> "_Names":
        title = f"state[{key!r}]"
        names_of = _owner(optimizer, {name: _names_of_parameters(module) for name, module in modules.items()})
        groups: list[list[str]] = []
        number_of: dict[str, int] = {}
        for group in optimizer.param_groups:
            groups.append([])
            for parameter in group["params"]:
                if parameter not in names_of:
                    raise ValueError(
                        f"{title} ({type(optimizer).__name__}) optimizes a parameter of shape "
                        f"{tuple(parameter.shape)} that is in no module of the state, which has the modules "
                        f"{list(modules)}. Pass the optimizer's model too."
                    )
                number_of.update(dict.fromkeys(names_of[parameter], sum(map(len, groups))))
                groups[-1].append(names_of[parameter][0])
        return cls(groups, number_of, title)

    @property
    def numbers(self) -> list[list[int]]:
        return [[self.number_of[name] for name in group] for group in self.groups]

    def check(self, saved_groups: list[list[str]]) -> None:
        """Raise ``ValueError`` unless the same parameters are in the same groups."""
        saved = [{self.number_of.get(name, name) for name in group} for group in saved_groups]
        if saved == [set(numbers) for numbers in self.numbers]:
            return
        known = {name for group in saved_groups for name in group}
        unknown = sorted(known - self.number_of.keys())
        mine = {name for group in self.groups for name in group}
        lacking = sorted(mine - known)
        raise ValueError(
            f"The checkpoint has {self.title} for other parameters, or in other groups: it has "
            f"{[len(group) for group in saved_groups]} parameters in its groups, the optimizer "
            f"{[len(group) for group in self.groups]}; nothing was changed."
            + (f" Only in the checkpoint: {unknown}." if unknown else "")
            + (f" Only in the optimizer: {lacking}." if lacking else "")
            + " Build the optimizer as it was when the checkpoint was written."
        )


def _names_of_parameters(module: nn.Module) -> dict[Tensor, list[str]]:
    """Return the names that each parameter has in the state dict; else, its own."""
    names: dict[Tensor, list[str]] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if isinstance(value, nn.Parameter):
            names.setdefault(value, []).append(name)
    for name, parameter in parameter_names(module).items():
        if parameter not in names:
            names[parameter] = [name]
    return names


def _owner(optimizer: Optimizer, modules: Mapping[str, dict[Tensor, list[str]]]) -> dict[Tensor, list[str]]:
    """Return the names in the module that has all parameters; where none has, names that start with the key."""
    parameters = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for names in modules.values():
        if parameters <= names.keys():
            return names
    longer: dict[Tensor, list[str]] = {}
    for key, names in modules.items():
        for parameter, each in names.items():
            longer.setdefault(parameter, []).extend(f"{key}.{name}" for name in each)
    return longer


def _by_name(optimizer: Optimizer, names: _Names) -> dict[Place, Any]:
    """Return the optimizer's state, sharded as it is, by its place in a state dict that goes by names."""
    own = optimizer.state_dict()
    name_of = dict(enumerate(name for group in names.groups for name in group))
    values: dict[Place, Any] = {}
    for number, entries in own["state"].items():
        for entry, value in entries.items():
            values |= _split(("state", name_of[number], entry), value)
    for index, group in enumerate(own["param_groups"]):
        options = {**group, "params": names.groups[index]}
        values |= {("param_groups", index, option): value for option, value in options.items()}
    return values


def _split(place: Place, value: Any) -> dict[Place, Any]:
    """Return the parts of ``value`` that are written one by one: only sharded tensors have to be."""
    found: list[DTensor] = []
    apply_to_collection(value, DTensor, found.append)
    if isinstance(value, Tensor) or not found:
        return {place: value}
    items = list(value.items()) if isinstance(value, Mapping) else list(enumerate(value))
    if isinstance(value, Mapping) and not all(isinstance(name, str) for name, _ in items):
        raise NotImplementedError(
            f"The optimizer keeps sharded tensors in a dict with the keys {list(value)} under {place[-1]!r}, which are "
            "not all text, so they have no names in a sharded checkpoint. Save a full one."
        )
    parts: dict[Place, Any] = {}
    for name, part in items:
        parts |= _split((*place, name), part)
    return parts


# -- loading


def load_checkpoint(
    strategy: Strategy,
    path: _PATH,
    state: nn.Module | Optimizer | MutableMapping[str, Any] | None,
    *,
    strict: bool = True,
    weights_only: bool | None = None,
    in_parts: bool = True,
) -> dict[str, Any]:
    """Collective: restore ``state`` in place from a sharded folder or a full file, and return what else is in there.

    ``state`` is what :func:`prepare` takes; or a module or an optimizer, for a file that holds its bare state dict,
    which of a module may be a folder too. The number of ranks may be another one than when saving. Each rank reads
    only its shards of a folder; a file is mapped, and one tensor at a time is held beyond that. Keys and shapes are
    checked before anything is changed. A module keeps its dtypes, and is given what was saved in these; the state of
    an optimizer is as it was saved.

    Of a folder, the modules and optimizers that ``state`` does not name are not read, and not returned either. Of a
    file they are returned, with tensors that are read when they are first used: the file may be replaced or deleted,
    but must not be overwritten before that.

    Not ``in_parts`` is for a strategy whose ranks have all of a module: plain values may be loaded alone, and without
    ``state`` each rank gets all that a folder holds, as it would be in a file.

    Raises:
        FileNotFoundError: if there is nothing at ``path``.
        ValueError: if ``in_parts`` and ``state`` has no module; if the path is a folder without a checkpoint; if an
            optimizer does not fit, or its module is missing.
        KeyError: if ``strict`` and the checkpoint lacks a key of ``state``.
        RuntimeError: if a module does not fit: by its keys if ``strict``, by its shapes in any case. On the other
            ranks, if one fails; that one raises its own error.

    """
    doing = f"loading {os.fspath(path)!r}"
    if isinstance(state, (nn.Module, Optimizer)):
        _load_bare(strategy, path, state, strict, weights_only, doing)
        return {}
    if not in_parts and not state:
        with all_or_none(strategy, doing):
            return sharded_folder.read_all(_local_path(path), weights_only)
    with all_or_none(strategy, doing):
        if not isinstance(state, MutableMapping) and state is not None:
            raise TypeError(f"`state` must be a dict, a module or an optimizer, but got {state!r}.")
        parts = _Parts.of(strategy, state or {})
        if in_parts:
            parts.need_module("Loading works in place, so it")
        folder = ShardedFolder(_local_path(path), weights_only) if _is_folder(path) else None
    assert state is not None
    if folder is None:
        with all_or_none(strategy, doing):
            remainder, restore = _prepare_from_file(strategy, path, parts, strict, weights_only)
    else:
        remainder, restore = _prepare_from_folder(strategy, folder, parts, strict, doing)
    with all_or_none(strategy, doing):
        state.update(restore())
    return remainder


def _is_folder(path: _PATH) -> bool:
    """Whether there is a sharded folder; False for what holds full tensors."""
    if not _is_local_file_protocol(path):
        return False
    local = _local_path(path)
    if not local.exists():
        raise FileNotFoundError(f"There is no checkpoint {str(path)!r}.")
    if is_safetensors(path):
        return False
    if local.is_dir() and not is_sharded_folder(local):
        raise ValueError(
            f"The folder {str(path)!r} holds no complete sharded checkpoint: it has no `.metadata`. "
            f"It has {sorted(entry.name for entry in local.iterdir())[:10]}. Pass the path of a checkpoint."
        )
    return local.is_dir()


def _load_bare(
    strategy: Strategy, path: _PATH, obj: nn.Module | Optimizer, strict: bool, weights_only: bool | None, doing: str
) -> None:
    """Collective."""
    with all_or_none(strategy, doing):
        folder = ShardedFolder(_local_path(path), weights_only) if _is_folder(path) else None
        if folder is None:
            saved, _ = _read(strategy.checkpoint_io, path, weights_only, mmap=True)
            if isinstance(obj, nn.Module):
                module = strategy._module_with_state(obj)
                load_full_module_state(module, by_names_of(module, saved), strict)
            else:
                load_full_optimizer_state(obj, saved)
    if folder is not None:
        _load_bare_folder(strategy, folder, obj, strict, doing)


_BARE = "bare"  # the key that what has none is given


def _load_bare_folder(
    strategy: Strategy, folder: ShardedFolder, obj: nn.Module | Optimizer, strict: bool, doing: str
) -> None:
    """Collective."""
    with all_or_none(strategy, doing):
        module = strategy._module_with_state(obj) if isinstance(obj, nn.Module) else None
        if module is None or not _is_state_of(module, folder):
            raise ValueError(
                f"{str(folder.folder)!r} is a sharded checkpoint, which holds a state with the keys "
                f"{sorted(folder.keys())[:10]}, not the bare state dict of a module. Use `load` with a dict, as in "
                "`fabric.load(path, {'model': model})`."
            )
        folder.as_entry(_BARE)
        check_module(module, _shapes(folder, _BARE), strict, type(module).__name__, by_itself=False)
        tensors = _targets(folder, _BARE, module)
    with all_or_none(strategy, doing):
        folder.read(tensors)
    with all_or_none(strategy, doing):
        _load_what_is_not_in_place(module, _entry(folder, _BARE, tensors))


def _is_state_of(module: nn.Module, folder: ShardedFolder) -> bool:
    """Whether the folder holds a bare state dict, though perhaps not one that fits."""
    return folder.is_bare or (not folder.meta and not folder.stored.keys().isdisjoint(module.state_dict()))


def _shapes(folder: ShardedFolder, key: str) -> dict[Any, Tensor | None]:
    return {place[0]: folder.blank(name, "meta") for name, place in folder.below(key) if place}


_Restore = Callable[[], dict[str, Any]]  # changes the objects, and returns the new plain values


def _prepare_from_file(
    strategy: Strategy, path: _PATH, parts: _Parts, strict: bool, weights_only: bool | None
) -> tuple[dict[str, Any], _Restore]:
    """Read and check; return what the state does not name, and what is to be done."""
    saved, mapped = _read(strategy.checkpoint_io, path, weights_only, mmap=True)
    keys = [*parts.modules, *parts.optimizers, *parts.rest]
    if not isinstance(saved, Mapping):
        raise TypeError(
            f"{str(path)!r} holds {type(saved).__name__}, not a dict with the keys {keys}. "
            "For a file with a bare state dict, use `load_raw`."
        )
    _validate_keys_for_strict_loading(keys, saved.keys(), strict)
    optimizers = {}
    states = {key: by_names_of(module, saved[key]) for key, module in parts.modules.items() if key in saved}
    for key, state in states.items():
        check_module(parts.modules[key], state, strict, f"state[{key!r}]")
    for key, optimizer in parts.optimizers.items():
        if key in saved:
            optimizers[key] = _numbered(parts, key, saved[key])
            check_optimizer(optimizer, optimizers[key], f"state[{key!r}]")

    def restore() -> dict[str, Any]:
        with torch.no_grad():
            for key, state in states.items():
                _copy_into(parts.modules[key], state, strict, f"state[{key!r}]")
        for key, state in optimizers.items():
            load_full_optimizer_state(parts.optimizers[key], state)
        rest = {key: saved[key] for key in parts.rest if key in saved}
        return _restore_rest(parts.rest, copy.deepcopy(rest) if mapped else rest)

    return {key: value for key, value in saved.items() if key not in keys}, restore


def _numbered(parts: _Parts, key: str, saved: Any) -> Any:
    """Return the optimizer state by numbers; files of other programs have it by names."""
    groups = sharded_folder.named_groups(saved)
    if groups is None:
        return saved
    names = parts.names(key)
    names.check(groups)
    return sharded_folder.by_number(saved, names.number_of, names.numbers)


def _restore_rest(objects: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Load what is stateful; return the new values of what is not."""
    values = {}
    for key, value in saved.items():
        if is_stateful(objects[key]):
            objects[key].load_state_dict(value)
        else:
            values[key] = value
    return values


def _prepare_from_folder(
    strategy: Strategy, folder: ShardedFolder, parts: _Parts, strict: bool, doing: str
) -> tuple[dict[str, Any], _Restore]:
    """Collective: check, then read, tensors of modules in place; return what is not named, and what is to be done."""
    with all_or_none(strategy, doing):
        found = _check_keys(folder, parts, strict)
        others = {**_blank_groups(folder, found.optimizers), **_blank_plain(folder, parts)}
        folder.read(others)
        numbers_of = {key: _numbers_of(folder, found, key, others) for key in found.optimizers}
        tensors: dict[str, Any] = {}
        for key, optimizer in found.optimizers.items():
            tensors |= _blank_state(folder, key, optimizer, numbers_of[key])
        for key, module in found.modules.items():
            tensors |= _targets(folder, key, module)
    with all_or_none(strategy, doing):
        folder.read(tensors)
    plain = {
        key: sharded_folder._numbered(_entry(folder, key, others)) for key in _keys_of_plain(folder, parts)
    } | folder.meta

    def restore() -> dict[str, Any]:
        for key, module in found.modules.items():
            _load_what_is_not_in_place(module, _entry(folder, key, tensors))
        for key, optimizer in found.optimizers.items():
            state = _entry(folder, key, {**others, **tensors})
            optimizer.load_state_dict(sharded_folder.by_number(state, numbers_of[key], _own_numbers(optimizer)))
        return _restore_rest(found.rest, {key: plain[key] for key in found.rest})

    return {key: value for key, value in plain.items() if key not in found.rest}, restore


def _check_keys(folder: ShardedFolder, parts: _Parts, strict: bool) -> _Parts:
    """Return the parts that the folder has; raise where keys or shapes do not fit."""
    folder.split_names(parts.modules)
    folder.split_optimizers(parts.optimizers)
    keys = folder.keys()
    if strict and folder.is_bare and keys.isdisjoint(parts.modules):
        raise KeyError(
            f"The requested state contains {list(parts.modules)}, but {str(folder.folder)!r} holds the bare state dict "
            f"of a module, with {sorted(keys)[:10]}. For that, use `load_raw`."
        )
    stateful = [key for key, module in parts.modules.items() if module.state_dict()]
    _validate_keys_for_strict_loading([*stateful, *parts.optimizers, *parts.rest], keys, strict)
    for key in stateful:
        if key in keys:
            check_module(parts.modules[key], _shapes(folder, key), strict, f"state[{key!r}]", by_itself=False)
    return _Parts(
        {key: parts.modules[key] for key in stateful if key in keys},
        {key: optimizer for key, optimizer in parts.optimizers.items() if key in keys},
        {key: value for key, value in parts.rest.items() if key in keys},
    )


def _keys_of_plain(folder: ShardedFolder, parts: _Parts) -> list[str]:
    """Return the keys of plain values that are among the shards, where other programs write them.

    What ``parts`` does not name is one if it can be nothing else.
    """
    named = {*parts.modules, *parts.optimizers}
    return sorted(({*parts.rest} & folder.keys() | folder.single_values() - named) - folder.meta.keys())


def _blank_plain(folder: ShardedFolder, parts: _Parts) -> dict[str, Tensor | None]:
    return {name: folder.blank(name) for key in _keys_of_plain(folder, parts) for name, _ in folder.below(key)}


def _entry(folder: ShardedFolder, key: str, values: Mapping[str, Any]) -> Any:
    """Return what was read of the state's entry ``key``, nested as it is in the state."""
    return sharded_folder.nested({place: values[name] for name, place in folder.below(key) if name in values})


def _blank_groups(folder: ShardedFolder, keys: Iterable[str]) -> dict[str, Tensor | None]:
    """Return what to read the optimizers' groups into: all but the state of parameters."""
    return {name: folder.blank(name) for key in keys for name, place in folder.below(key) if place[:1] != ("state",)}


def _numbers_of(folder: ShardedFolder, parts: _Parts, key: str, others: Mapping[str, Any]) -> dict[str, int]:
    """Return the number of each parameter in the optimizer, by its name or number in the folder."""
    optimizer, saved = parts.optimizers[key], _entry(folder, key, others)
    groups = sharded_folder.named_groups(saved)
    if groups is not None:
        names = parts.names(key)
        names.check(groups)
        return names.number_of
    if not isinstance(saved, Mapping) or not isinstance(saved.get("param_groups"), Sequence):
        raise ValueError(
            f"The checkpoint has no state of an optimizer under {key!r}, with groups of parameters; it has "
            f"{sorted(name for name, _ in folder.below(key))[:10]}."
        )
    check_optimizer(optimizer, saved, f"state[{key!r}]")
    numbers = (str(number) for group in saved["param_groups"] for number in group["params"])
    return dict(zip(numbers, chain(*_own_numbers(optimizer)), strict=False))


def _own_numbers(optimizer: Optimizer) -> list[list[int]]:
    """Return the numbers that ``Optimizer.state_dict`` gives to the parameters, by group."""
    number = count()
    return [[next(number) for _ in group["params"]] for group in optimizer.param_groups]


def _blank_state(
    folder: ShardedFolder, key: str, optimizer: Optimizer, number_of: Mapping[str, int]
) -> dict[str, Tensor | None]:
    """Return tensors to read the optimizer's state into, sharded as its parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    blanks: dict[str, Tensor | None] = {}
    for name, place in folder.below(key):
        if place[:1] == ("state",):
            stored = folder.blank(name, "meta")
            parameter = parameters[_number(name, place, number_of)]
            blanks[name] = None if stored is None else _blank_like(stored, _layout(stored, parameter))
    return blanks


def _number(name: str, place: Place, number_of: Mapping[str, int]) -> int:
    if (parameter := str(place[1])) not in number_of:
        raise ValueError(
            f"The checkpoint has {name!r}, the state of a parameter {parameter!r} that is in none of the optimizer's "
            f"groups; these have {list(number_of)[:10]}."
        )
    return number_of[parameter]


def _blank_like(stored: Tensor, like: Tensor | None) -> Tensor:
    if like is None:
        return torch.empty_like(stored, device="cpu")  # loading moves what has to be on the device
    return torch.empty_like(like, dtype=stored.dtype)


def _targets(folder: ShardedFolder, key: str, module: nn.Module) -> dict[str, Tensor | None]:
    """Return tensors to read the module's state into: its own, wherever they can take it."""
    own = module.state_dict()
    targets: dict[str, Tensor | None] = {}
    for name, place in folder.below(key):
        if place and place[0] in own:
            target, stored = own[str(place[0])], folder.blank(name, "meta")
            fits = isinstance(target, Tensor) and stored is not None and stored.shape == target.shape
            targets[name] = target if fits else folder.blank(name)
    return targets


def _load_what_is_not_in_place(module: nn.Module, loaded: Mapping[str, Any]) -> None:
    """Hand the module what it loads in its own way, now that tensors have been read into it."""
    own = module.state_dict()
    customs = ("",) if loads_in_its_own_way(module) else prefixes_of_custom_loading(module)
    left = {
        name: value
        for name, value in loaded.items()
        if name.startswith(customs) or not isinstance(value, Tensor) or value.shape != own[name].shape
    }
    if left:
        module.load_state_dict(_like(own, left), strict=False)
