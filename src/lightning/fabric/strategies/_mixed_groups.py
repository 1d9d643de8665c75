"""Optimizers over DTensors and plain tensors, which torch cannot step in one go."""

from typing import Any

from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


def step_one_by_one_if_mixed(optimizer: Optimizer) -> None:
    """Let ``optimizer`` step parameters one after the other in groups that have both kinds; else change nothing.

    There, torch would choose ``foreach`` itself on CUDA. What it may not choose is taken back after each step, so that
    it is in no checkpoint.

    Raises:
        ValueError: if ``foreach`` or ``fused`` was asked for in such a group.

    """
    mixed = {index: group for index, group in enumerate(optimizer.param_groups) if _is_mixed(group)}
    for index, group in mixed.items():
        for way in ("foreach", "fused"):
            if group.get(way):
                raise ValueError(
                    f"param_groups[{index}] of {type(optimizer).__name__} has {way}=True, which torch cannot do for "
                    "parameters that are split (DTensor) and ones that are whole together. Give each kind a group of "
                    f"its own, or leave `{way}` out."
                )
    if mixed:
        _OneByOne().attach(optimizer)


def _is_mixed(group: dict[str, Any]) -> bool:
    return len({isinstance(parameter, DTensor) for parameter in group["params"]}) > 1


def _takes_foreach_by_default(group: dict[str, Any]) -> bool:
    return "foreach" in group and group["foreach"] is None and not group.get("fused") and _is_mixed(group)


class _OneByOne:
    def __init__(self) -> None:
        self._chosen_for: list[dict[str, Any]] = []

    def attach(self, optimizer: Optimizer) -> None:
        optimizer.register_step_pre_hook(self._choose)
        optimizer.register_step_post_hook(self._take_back)

    def _choose(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._chosen_for = [group for group in optimizer.param_groups if _takes_foreach_by_default(group)]
        for group in self._chosen_for:
            group["foreach"] = False

    def _take_back(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in self._chosen_for:
            group["foreach"] = None
