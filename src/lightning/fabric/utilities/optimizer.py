"""Optimizers whose parameters move or are replaced."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning.fabric.utilities.apply_func import apply_to_collection, move_data_to_device
from lightning.fabric.utilities.types import _DEVICE


def _optimizers_to_device(optimizers: Iterable[Optimizer], device: _DEVICE) -> None:
    """Move the state of every optimizer to ``device``, in place."""
    for optimizer in optimizers:
        _optimizer_to_device(optimizer, device)


def _optimizer_to_device(optimizer: Optimizer, device: _DEVICE) -> None:
    """Move the state of ``optimizer`` to ``device``, in place.

    Step counters stay where they are unless the update runs them on the device (``capturable`` or ``fused``): torch
    reads them on the CPU otherwise, and would wait for the device at each step.
    """
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    for parameter, state in optimizer.state.items():
        group = groups.get(parameter, {})
        step_moves = bool(group.get("capturable") or group.get("fused"))
        optimizer.state[parameter] = (
            {key: value if key == "step" and not step_moves else _moved(value, device) for key, value in state.items()}
            if isinstance(state, dict)
            else _moved(state, device)
        )


def _moved(value: Any, device: _DEVICE) -> Any:
    return apply_to_collection(value, Tensor, move_data_to_device, device)


def refuse_meta_parameters(optimizer: Optimizer) -> None:
    """Raise ``RuntimeError`` if ``optimizer`` has parameters on the meta device: its steps would do nothing."""
    groups = getattr(optimizer, "param_groups", ())
    number = sum(parameter.is_meta for group in groups for parameter in group["params"])
    if number:
        raise RuntimeError(
            f"{type(optimizer).__name__} has {number} parameter(s) on the meta device. The model gets others as soon "
            "as it has memory, and those would not be updated. Create the optimizer after that, from "
            "`model.parameters()` as they are then."
        )


def parameter_names(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of ``module`` by name; a tied parameter is there under each of its names."""
    return dict(module.named_parameters(remove_duplicate=False))


def repoint_optimizers(optimizers: Iterable[Optimizer], before: Mapping[str, nn.Parameter], module: nn.Module) -> None:
    """Make optimizers that refer to former parameters of ``module`` refer to its present ones, in place.

    ``before`` is what :func:`parameter_names` returned before the parameters were replaced. Order, hyperparameters and
    state (under its new key) are kept; parameters that ``before`` does not know stay. Two that have become one appear
    once.
    """
    after = parameter_names(module)
    replacement: dict[Tensor, Tensor] = {}
    for name, old in before.items():
        if name in after:
            replacement.setdefault(old, after[name])
    if all(old is new for old, new in replacement.items()):
        return
    for optimizer in optimizers:
        _replace_parameters(optimizer, replacement)


def _replace_parameters(optimizer: Optimizer, replacement: Mapping[Tensor, Tensor]) -> None:
    former: dict[Tensor, Tensor] = {}
    for group in optimizer.param_groups:
        pairs = [(replacement.get(old, old), old) for old in group["params"]]
        # what became one is updated once; what somebody listed twice stays listed twice
        # the list stays the same object: some optimizers hold on to it
        group["params"][:] = [new for new, old in pairs if former.setdefault(new, old) is old]
    states = list(optimizer.state.items())
    optimizer.state.clear()
    for parameter, state in states:
        optimizer.state.setdefault(replacement.get(parameter, parameter), state)
