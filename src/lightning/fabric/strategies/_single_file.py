"""State in one file: objects to state dicts and back, everything checked before anything is changed."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning.fabric.utilities.apply_func import apply_to_collection


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


def check_module(module: nn.Module, saved: Any, strict: bool, name: str) -> None:
    """Raise what ``load_state_dict`` would raise for keys and shapes, before it has changed a part of the module.

    Where a module has its own way of loading, only that can tell, and the decision is left to it.
    """
    if not isinstance(saved, Mapping):
        raise TypeError(f"The checkpoint has {type(saved).__name__} where the state dict of {name} should be.")
    if type(module).load_state_dict is not nn.Module.load_state_dict or _rewrites_keys(module):
        return
    own = module.state_dict()
    custom = _prefixes_of_custom_loading(module)
    problems = []
    if strict:
        problems += [f'Missing key(s) in state_dict: "{key}".' for key in own if key not in saved]
        problems += [f'Unexpected key(s) in state_dict: "{key}".' for key in saved if key not in own]
    problems += list(_size_mismatches(own, saved))
    problems = [text for text in problems if not text.split('"')[1].startswith(custom)]
    if problems:
        raise RuntimeError(
            f"Error(s) in loading state_dict for {type(module).__name__} ({name}); nothing was changed:\n\t"
            + "\n\t".join(problems)
        )


def _size_mismatches(own: Mapping[str, Any], saved: Mapping[str, Any]) -> Iterator[str]:
    for key, tensor in own.items():
        value = saved.get(key)
        if not isinstance(tensor, Tensor) or not isinstance(value, Tensor) or is_lazy(tensor):
            continue
        if value.shape != tensor.shape and not (tensor.ndim == 0 and value.shape == (1,)):  # torch takes that
            yield (
                f'size mismatch for "{key}": the checkpoint has {tuple(value.shape)}, the model {tuple(tensor.shape)}.'
            )


def _rewrites_keys(module: nn.Module) -> bool:
    return any(part._load_state_dict_pre_hooks or part._load_state_dict_post_hooks for part in module.modules())


def _prefixes_of_custom_loading(module: nn.Module) -> tuple[str, ...]:
    return tuple(
        f"{name}." if name else ""
        for name, part in module.named_modules(remove_duplicate=False)
        if type(part)._load_from_state_dict is not nn.Module._load_from_state_dict
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


def _loads_like_torch(optimizer: Optimizer) -> bool:
    return type(optimizer).load_state_dict is Optimizer.load_state_dict


def own_module_state(module: nn.Module, saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return ``saved`` with a copy of each entry that ``module`` may keep rather than copy out of.

    Parameters and buffers are copied by loading itself. What has its own way of loading may keep what it is given.
    """
    if type(module).load_state_dict is not nn.Module.load_state_dict or _rewrites_keys(module):
        return copy.deepcopy(saved)
    custom = _prefixes_of_custom_loading(module)
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
