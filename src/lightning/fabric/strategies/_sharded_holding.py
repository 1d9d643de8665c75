"""What a rank holds of DTensors, and of what units of ``fully_shard`` keep; asked of the tensors themselves."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning.fabric.plugins.precision.precision import dtype_name
from lightning.fabric.strategies._dtensor import local_tensor
from lightning.fabric.strategies._fsdp_module import _groups
from lightning.fabric.strategies._holding import WHOLE, Holding, ranks

Plain = Callable[[str, Tensor], Holding]  # what is held of a parameter that is not split


def holdings_of(module: nn.Module, forward_module: nn.Module, plain: Plain) -> list[Holding]:
    """Return what this rank keeps of each parameter of ``module``, also while parameters are whole after a forward."""
    in_units = {place: unit for unit in _in_units(forward_module) for place in unit.places}
    found: list[Holding] = []
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        unit = in_units.get((id(module.get_submodule(owner)), leaf))
        if unit is not None:
            found.append(unit.holding(name))
        else:
            found.append(of_dtensor(name, parameter) if isinstance(parameter, DTensor) else plain(name, parameter))
    return found


def of_dtensor(name: str, parameter: DTensor, gradients: str = "") -> Holding:
    shape, here, has_gradient = tuple(parameter.shape), local_tensor(parameter), parameter.grad is not None
    return Holding(name, parameter, here, shape, _layout(parameter), gradients, has_gradient=has_gradient)


def _layout(tensor: DTensor) -> str:
    """The part that this rank has, and over which axes of the mesh the whole is split or repeated."""
    mesh = tensor.device_mesh
    if mesh.get_coordinate() is None:
        return "nothing: this rank is not in its mesh"
    said = []
    for axis, placement in enumerate(tensor.placements):
        size, dim = mesh.size(axis), getattr(placement, "dim", None)
        if size == 1:
            continue
        over = f"over {_axis_name(mesh, axis)} ({ranks(size)})"
        said.append(f"repeated {over}" if dim is None else f"1/{size} of dim {dim} {over}")
    return ", ".join(said) or WHOLE


def _axis_name(mesh: Any, axis: int) -> str:
    return repr(mesh.mesh_dim_names[axis]) if mesh.mesh_dim_names else f"mesh axis {axis}"


class _InUnit:
    """A parameter that a unit of ``fully_shard`` keeps: torch's own records of it."""

    def __init__(self, group: Any, record: Any) -> None:
        self._group, self._record = group, record

    @property
    def places(self) -> list[tuple[int, str]]:
        """Modules (by identity) and the name that the parameter has in them."""
        info = self._record._module_info
        owners, names = [info.module, *info.shared_modules], [info.param_name, *info.shared_param_names]
        return [(id(owner), name) for owner, name in zip(owners, names, strict=True)]

    def holding(self, name: str) -> Holding:
        parameter, policy = self._record.sharded_param, self._group.mp_policy
        casts = policy.param_dtype is not None and parameter.is_floating_point()
        computes_in = dtype_name(policy.param_dtype) if casts else None
        return replace(of_dtensor(name, parameter, self._gradients(parameter)), computes_in=computes_in)

    def _gradients(self, parameter: Tensor) -> str:
        info, policy, divisor = self._group.mesh_info, self._group.mp_policy, self._group.gradient_divide_factor
        number = getattr(info, "shard_mesh_size", 1) * getattr(info, "replicate_mesh_size", 1)
        if number == 1:
            return ""
        how = f"averaged over {ranks(number)}"
        if divisor is not None and divisor != number:
            how = f"summed over {ranks(number)} and divided by {divisor:g}"
        return f"{how} in {dtype_name(policy.reduce_dtype or policy.param_dtype or parameter.dtype)}"


def _in_units(forward_module: nn.Module) -> Iterator[_InUnit]:
    for unit in forward_module.modules():
        if isinstance(unit, FSDPModule):
            for group in _groups(unit):
                for record in group.fsdp_params:
                    yield _InUnit(group, record)
