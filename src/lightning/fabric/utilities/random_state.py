"""States of the random number generators of python, numpy and torch, as tensors and plain values.

Such a state can be in a file that is read with ``weights_only=True``.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.fabric.utilities.seed import _collect_rng_states, _seed_generators, _set_rng_states

_CUDA = "torch.cuda"


def random_state(include_cuda: bool = True) -> dict[str, Any]:
    """Return the state of this process's global generators: python's, numpy's if it is imported, and torch's.

    CUDA's, of every device that is visible here, are included if CUDA is in use.
    """
    return packed(_collect_rng_states(include_cuda))


def packed(states: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``_collect_rng_states`` gave as tensors and plain values."""
    version, words, gauss = states["python"]
    plain: dict[str, Any] = {
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "torch": states["torch"],
    }
    if "numpy" in states:
        plain["numpy"] = _plain(_as_dict(states["numpy"]))
    if _CUDA in states:
        plain[_CUDA] = {"states": list(states[_CUDA]), "current": torch.cuda.current_device()}
    return plain


def unpacked(state: Mapping[str, Any]) -> dict[str, Any]:
    """Undo :func:`packed`, but for CUDA."""
    python = state["python"]
    states: dict[str, Any] = {
        "python": (python["version"], tuple(python["words"].tolist()), python["gauss"]),
        "torch": state["torch"],
    }
    if "numpy" in state:
        states["numpy"] = _as_numpy_has_it(state["numpy"])
    return states


def set_random_state(state: Mapping[str, Any], rank: int) -> None:
    """Put back what :func:`random_state` returned on ``rank``, and check that it is there.

    Raises:
        RuntimeError: if a part is not the state of a generator, as on other versions of the libraries. Nothing was
            changed then.

    """
    before = _collect_rng_states(include_cuda=False)
    name = "the whole"
    try:
        for name, put in _SETTERS.items():
            if name in state:
                put(state[name])
        now = random_state()
        for name in state.keys() & now.keys() - {_CUDA}:
            if not is_same(state[name], now[name]):
                raise ValueError("it is another one when it is read back")
    except Exception as error:
        _set_rng_states(before)
        raise RuntimeError(
            f"The checkpoint's random state of rank {rank} cannot be restored; that of {name} does not fit: "
            f"{type(error).__name__}: {error}. It may come from another version of the library."
        ) from error


def seed_for(seed: int, step: int, rank: int) -> None:
    """Seed the global generators for a ``rank`` that was not there when ``step`` was saved; each gets its own seeds."""
    digest = hashlib.sha256(f"{seed}, {step}, {rank}".encode()).digest()
    python_seed, numpy_seed, torch_seed = digest[:8], digest[8:12], digest[12:20]
    _seed_generators(*(int.from_bytes(part, "big") for part in (python_seed, numpy_seed, torch_seed)))


def is_same(first: Any, second: Any) -> bool:
    """Whether two nestings of dicts, lists, tensors and plain values are equal."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(is_same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(map(is_same, first, second))
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first.cpu(), second.cpu())
    return type(first) is type(second) and bool(first == second)


def _set_python(state: Mapping[str, Any]) -> None:
    import random

    random.setstate((state["version"], tuple(state["words"].tolist()), state["gauss"]))


def _set_numpy(state: Mapping[str, Any]) -> None:
    try:
        import numpy as np
    except ModuleNotFoundError:
        rank_zero_warn("The checkpoint has a random state of numpy, which is not installed here: it is left out.")
        return
    np.random.set_state(_as_numpy_has_it(state))


def _set_cuda(state: Mapping[str, Any]) -> None:
    count = torch.cuda.device_count()
    if not count:
        rank_zero_warn("The checkpoint has random states of CUDA devices, and there is none here: they are left out.")
        return
    states, current = list(state["states"]), torch.cuda.current_device()
    if len(states) != count:  # what counts is the one that this rank computes on
        states, devices = [states[state["current"]]], [current]
    else:
        devices = list(range(count))
    for device, of_device in zip(devices, states, strict=True):
        torch.cuda.set_rng_state(of_device, device)
        if not torch.equal(torch.cuda.get_rng_state(device), of_device):
            raise ValueError("it is another one when it is read back")


_SETTERS: dict[str, Callable[[Any], None]] = {
    "python": _set_python,
    "numpy": _set_numpy,
    "torch": torch.set_rng_state,
    _CUDA: _set_cuda,
}


# -- numpy


def _as_dict(state: Any) -> dict[str, Any]:
    """The state of any generator of numpy's in the newer of its two forms; the older one is for the usual generator."""
    if isinstance(state, dict):
        return state
    name, key, position, has_gauss, gauss = state
    return {"bit_generator": name, "state": {"key": key, "pos": position}, "has_gauss": has_gauss, "gauss": gauss}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if getattr(value, "ndim", None):  # an array of unsigned integers, which not all versions of torch have
        return {"dtype": value.dtype.name, "values": torch.from_numpy(value.astype("int64"))}
    return value.item() if hasattr(value, "item") else value


def _as_numpy_has_it(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    if value.keys() == {"dtype", "values"}:
        return value["values"].numpy().astype(value["dtype"])
    return {key: _as_numpy_has_it(inner) for key, inner in value.items()}
