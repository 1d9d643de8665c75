"""State in one file: objects to state dicts and back, everything checked before anything is changed."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.serialization import get_crc32_options

from lightning.fabric.checkpoint.pickling import naming_the_key, warn_of_what_loading_refuses
from lightning.fabric.checkpoint.saving import Prepared, Written
from lightning.fabric.checkpoint.snapshot import detached
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol, _local_path
from lightning.fabric.utilities.compilation import PREFIX, name_without_compilation
from lightning.fabric.utilities.load import is_sharded_folder
from lightning.fabric.utilities.types import _PATH

# -- saving


class SingleFile:
    """A file to be written through ``io``; ``checkpoint`` None: by another rank."""

    def __init__(self, io: CheckpointIO, checkpoint: dict[str, Any] | None, storage_options: Any = None) -> None:
        self._io = io
        self._checkpoint = checkpoint
        self._storage_options = storage_options

    def prepared(self) -> Prepared:
        """Return how it is saved."""
        if self._checkpoint is not None:
            warn_of_what_loading_refuses(self._checkpoint)
        if not self._io.to_any_path or self._storage_options is not None:  # it knows what they mean, if anything
            return Prepared(self._write_in_place, in_place=True)
        return Prepared(self._write, detach=self._detach, check=refuse_other_folders)

    def _write_in_place(self, path: Any) -> Written:
        if self._checkpoint is not None:
            self._io.save_checkpoint(checkpoint=self._checkpoint, path=path, storage_options=self._storage_options)
        return Written()

    def _write(self, staged: Path) -> Written:
        if self._checkpoint is None:
            return Written()
        with naming_the_key(self._checkpoint):
            self._io.write_checkpoint(self._checkpoint, staged)
        return Written([""], in_archives=get_crc32_options())

    def _detach(self, copy: Callable[[Tensor], Tensor]) -> None:
        if self._checkpoint is not None:
            with naming_the_key(self._checkpoint):
                self._checkpoint = detached(self._checkpoint, copy)


def refuse_other_folders(path: _PATH) -> None:
    """Raise if there is a folder at ``path`` that is more than a checkpoint: a file must not take its place."""
    if not _is_local_file_protocol(path) or not (folder := _local_path(path)).is_dir():
        return
    if is_sharded_folder(folder):
        from lightning.fabric.utilities.sharded_folder import foreign_entries

        if not foreign_entries(folder):
            return
    raise IsADirectoryError(
        f"Cannot save a file as {str(path)!r}: there is a folder of that name, with other things in it than a "
        "checkpoint. Choose the path of a file."
    )


# -- loading

_CHECKPOINT_PREFIX = "_checkpoint_wrapped_module."  # what torch puts into the names of modules, but not into keys


def _validate_keys_for_strict_loading(
    requested_keys: Iterable[str], checkpoint_keys: Iterable[str], strict: bool
) -> None:
    """Every requested key is in the checkpoint, unless not ``strict``; ``KeyError`` naming both sets."""
    requested, found = sorted(map(str, requested_keys)), sorted(map(str, checkpoint_keys))
    absent = [key for key in requested if key not in found]
    if strict and absent:
        raise KeyError(
            f"The requested state contains a key {absent[0]!r} that does not exist in the loaded checkpoint"
            + (f" (and {absent[1:]})" if absent[1:] else "")
            + f". The state asks for {requested}, the checkpoint has {found}. "
            "To load what is there, set `strict=False`."
        )


def _apply_filter(
    key: str,
    filter: Mapping[str, Callable[[str, Any], bool]],
    source_dict: Any,
    target_dict: dict[str, Any],
) -> None:
    """Put ``source_dict`` into ``target_dict[key]``, leaving out the entries that ``filter[key]`` refuses."""
    if key not in filter:
        target_dict[key] = source_dict
        return
    if not isinstance(source_dict, Mapping):
        raise TypeError(
            f"filter[{key!r}] chooses among the entries of a state dict, but state[{key!r}] is {source_dict!r}. "
            f"Leave {key!r} out of `filter`."
        )
    keep = filter[key]
    target_dict[key] = {name: value for name, value in source_dict.items() if keep(name, value)}


def is_stateful(obj: Any) -> bool:
    """Whether ``obj`` is restored in place; everything else is a plain value."""
    return callable(getattr(obj, "state_dict", None)) and callable(getattr(obj, "load_state_dict", None))


def by_names_of(module: nn.Module, saved: Any) -> Any:
    """Return the state dict ``saved`` by the names of ``module``, where they differ in which parts are compiled."""
    if not isinstance(saved, Mapping):
        return saved
    own = module.state_dict(keep_vars=True).keys()
    if not any(PREFIX in str(key) for key in (*own, *saved)):
        return saved
    own_name = {name_without_compilation(key): key for key in own}
    renamed = OrderedDict(
        (key if key in own else own_name.get(name_without_compilation(key), key), value) for key, value in saved.items()
    )
    if len(renamed) < len(saved):
        return saved  # has both of some names, so what is surplus is to be named
    if hasattr(saved, "_metadata"):
        metadata = {name_without_compilation(key): value for key, value in saved._metadata.items()}
        names = [name for name, _ in module.named_modules()]
        own_metadata = {name: metadata.get(name_without_compilation(name)) for name in names}
        renamed._metadata = {name: value for name, value in own_metadata.items() if value}  # type: ignore[attr-defined]
    return renamed


def check_module(module: nn.Module, saved: Any, strict: bool, name: str, by_itself: bool = True) -> None:
    """Raise what ``load_state_dict`` would raise for keys and shapes, before it has changed a part of the module.

    Where a module has its own way of loading, only that can tell about shapes, and about keys if it loads
    ``by_itself``: the decision is left to it. ``name`` is what the user calls the module. Tensors of ``saved`` may be
    on the meta device, but not those of ``module``: loading would leave them as they are.
    """
    if not isinstance(saved, Mapping):
        raise TypeError(f"The checkpoint has {type(saved).__name__} where the state dict of {name} should be.")
    own = module.state_dict()
    _refuse_meta(own, name)
    custom = ("",) if loads_in_its_own_way(module) else prefixes_of_custom_loading(module)

    def is_left(key: str) -> bool:
        return by_itself and key.startswith(custom)

    missing = [key for key in own if key not in saved and not is_left(key)]
    unexpected = [key for key in saved if key not in own and not is_left(key)]
    sizes = [text for key, text in _size_mismatches(own, saved) if not key.startswith(custom)]
    problems = [*(wrong_names(missing, unexpected) if strict else ()), *sizes]
    if problems:
        raise RuntimeError(misfit(module, name, problems, "nothing was"))


def _refuse_meta(own: Mapping[str, Any], name: str) -> None:
    on_meta = [key for key, value in own.items() if isinstance(value, Tensor) and value.is_meta and not is_lazy(value)]
    if on_meta:
        raise RuntimeError(
            f"{name} has parameters on the meta device, which have no memory to load into: {on_meta[:10]}. Where the "
            "strategy shares parameters out, set the module up first, with `fabric.setup(...)`; else create it under "
            '`fabric.init_module(empty_init=True)` in place of `torch.device("meta")`.'
        )


def wrong_names(missing: Iterable[str], unexpected: Iterable[str]) -> list[str]:
    """Say it as torch does."""
    return [
        *(f'Missing key(s) in state_dict: "{name}".' for name in missing),
        *(f'Unexpected key(s) in state_dict: "{name}".' for name in unexpected),
    ]


def misfit(module: nn.Module, name: str, problems: Iterable[str], what_was: str) -> str:
    """Return the text of the error; ``what_was`` completes "... changed"."""
    made_as = next(cls for cls in type(module).__mro__ if not cls.__module__.startswith("torch.distributed."))
    title = name if name == made_as.__name__ else f"{made_as.__name__} ({name})"
    return f"Error(s) in loading state_dict for {title}; {what_was} changed:\n\t" + "\n\t".join(problems)


def _size_mismatches(own: Mapping[str, Any], saved: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, tensor in own.items():
        value = saved.get(key)
        if not isinstance(tensor, Tensor) or not isinstance(value, Tensor) or is_lazy(tensor):
            continue
        if value.shape != tensor.shape and not (tensor.ndim == 0 and value.shape == (1,)):  # torch takes that
            shapes = f"the checkpoint has {tuple(value.shape)}, the model {tuple(tensor.shape)}"
            yield key, f'size mismatch for "{key}": {shapes}.'


def loads_in_its_own_way(module: nn.Module) -> bool:
    """Whether loading goes through code of the user's, which may rename or keep what it is given."""
    hooks = (
        hook
        for part in module.modules()
        for hook in (*part._load_state_dict_pre_hooks.values(), *part._load_state_dict_post_hooks.values())
    )
    return type(module).load_state_dict is not nn.Module.load_state_dict or any(
        # sharding and checkpointing of activations have hooks too, which keep the names
        not getattr(hook, "__module__", "").startswith("torch.distributed.")
        for hook in hooks
    )


def prefixes_of_custom_loading(module: nn.Module, that_may_keep: bool = False) -> tuple[str, ...]:
    """Return the beginnings of the keys that parts of ``module`` load in their own way.

    ``that_may_keep`` leaves out parts which say that they copy what they load.
    """
    return tuple(
        f"{name}.".replace(_CHECKPOINT_PREFIX, "") if name else ""
        for name, part in module.named_modules(remove_duplicate=False)
        if type(part)._load_from_state_dict is not nn.Module._load_from_state_dict
        and not (that_may_keep and getattr(type(part), "copies_what_it_loads", False))
    )


def check_optimizer(optimizer: Optimizer, saved: Any, name: str) -> None:
    """As many groups, with as many parameters each, as the checkpoint has; else ``ValueError``."""
    if not isinstance(saved, Mapping):
        raise TypeError(f"The checkpoint has {type(saved).__name__} where the state dict of {name} should be.")
    if not _loads_like_torch(optimizer) or optimizer._optimizer_load_state_dict_pre_hooks:
        return
    own_sizes = [len(group["params"]) for group in optimizer.param_groups]
    saved_sizes = [len(group["params"]) for group in saved.get("param_groups", ())]
    if own_sizes != saved_sizes:
        raise ValueError(
            f"The checkpoint's state of {name} has {saved_sizes} parameters in its groups, but "
            f"{type(optimizer).__name__} has {own_sizes}; nothing was changed. "
            "Build the optimizer as it was when the checkpoint was written."
        )


_LIKE_THE_PARAMETER = {"momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "sum"}


def check_optimizer_shapes(optimizer: Optimizer, saved: Any, name: str) -> None:
    """What torch's optimizers keep in the shape of a parameter has the shape of this one's; else ``ValueError``."""
    if not _loads_like_torch(optimizer) or not isinstance(saved.get("state"), Mapping):
        return
    numbers = chain.from_iterable(group["params"] for group in saved.get("param_groups", ()))
    parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for position, (number, parameter) in enumerate(zip(numbers, parameters, strict=False)):
        for entry, value in saved["state"].get(number, {}).items():
            if entry in _LIKE_THE_PARAMETER and isinstance(value, Tensor) and value.shape != parameter.shape:
                raise ValueError(
                    f"The checkpoint's state of {name} has {entry!r} of the shape {tuple(value.shape)} for parameter "
                    f"{position}, which has {tuple(parameter.shape)}; nothing was changed. Give the optimizer its "
                    "parameters in the order in which it had them when the checkpoint was written."
                )


def _loads_like_torch(optimizer: Optimizer) -> bool:
    return type(optimizer).load_state_dict is Optimizer.load_state_dict


def own_module_state(module: nn.Module, saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return ``saved`` with a copy of each entry that ``module`` may keep rather than copy out of.

    Parameters and buffers are copied by loading itself. What has its own way of loading may keep what it is given.
    """
    if loads_in_its_own_way(module):
        return copy.deepcopy(saved)
    custom = prefixes_of_custom_loading(module, that_may_keep=True)
    kept = {
        key for key, value in saved.items() if key.startswith(custom) or not isinstance(value, Tensor)
    }  # a value that is no tensor is extra state
    if not kept:
        return saved
    owned = copy.copy(saved)  # keeps the version numbers that travel as an attribute
    owned.update({key: copy.deepcopy(saved[key]) for key in kept})  # type: ignore[attr-defined]
    return owned


def load_optimizer(optimizer: Optimizer, saved: Mapping[str, Any], mapped: bool) -> None:
    """Load ``saved``; where it is ``mapped`` from a file, leave nothing in the optimizer that still refers to it."""
    if mapped and not _loads_like_torch(optimizer):
        saved = copy.deepcopy(saved)
    optimizer.load_state_dict(saved)  # type: ignore[arg-type]
    if mapped and _loads_like_torch(optimizer):
        # loading keeps a tensor that has the right device and dtype already; one tensor at a time is copied
        for param, values in optimizer.state.items():
            optimizer.state[param] = apply_to_collection(values, Tensor, _own)


def _own(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.device.type == "cpu" else tensor
