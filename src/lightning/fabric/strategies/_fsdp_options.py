"""What the user wants of FSDP: arguments sorted into records, and checked, when the strategy is made."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    BackwardPrefetch,
    CPUOffload,
    CPUOffloadPolicy,
    MixedPrecision,
    MixedPrecisionPolicy,
    OffloadPolicy,
    ShardingStrategy,
)
from torch.nn.modules.batchnorm import _BatchNorm

from lightning.fabric.plugins.precision.fsdp import FSDPPrecision
from lightning.fabric.plugins.precision.precision import Precision
from lightning.fabric.strategies._wrap_policy import Choice, choice_of
from lightning.fabric.utilities.rank_zero import rank_zero_deprecation
from lightning.fabric.utilities.text import did_you_mean

_HYBRID = (ShardingStrategy.HYBRID_SHARD, ShardingStrategy._HYBRID_SHARD_ZERO2)
_MESH_AXES = ("replicate", "shard")


@dataclass(frozen=True)
class FSDPOptions:
    """What the user wants of ``fully_shard``; and options of its predecessor, as far as they mean something here.

    ``ignored_modules`` and ``ignored_params`` (``ignored_states``: of either kind) stay whole on every rank, and their
    gradients stay the rank's own. ``param_init_fn(submodule)`` fills a submodule whose parameters were created on the
    meta device. ``forward_prefetch`` asks for the next unit's parameters while a unit runs; ``backward_prefetch=None``
    asks for nothing in advance.
    """

    process_group: Any = None
    ignored_modules: tuple[nn.Module, ...] = ()
    ignored_params: tuple[nn.Parameter, ...] = ()
    param_init_fn: Callable[[nn.Module], None] | None = None
    device_id: int | torch.device | None = None
    sync_module_states: bool = True
    forward_prefetch: bool = False
    backward_prefetch: BackwardPrefetch | None = BackwardPrefetch.BACKWARD_PRE
    reshard_after_forward: bool | int | None = None
    shard_placement_fn: Callable[[nn.Parameter], Any] | None = None
    mp_policy: MixedPrecisionPolicy | None = None
    offload_policy: OffloadPolicy | None = None

    @classmethod
    def from_keywords(cls, keywords: Mapping[str, Any]) -> "FSDPOptions":
        """Sort ``keywords`` into the record; an unknown one raises ``TypeError``, one that cannot be ``ValueError``."""
        wanted = dict(keywords)
        for name, (only, why) in _WITHOUT_CHOICE.items():
            if name in wanted and wanted.pop(name) is not only:
                raise ValueError(f"`{name}={keywords[name]!r}` is not possible: {why} Leave it out.")
        states = list(wanted.pop("ignored_states", None) or ())
        modules = [*(wanted.pop("ignored_modules", None) or ()), *(s for s in states if isinstance(s, nn.Module))]
        parameters = [*(wanted.pop("ignored_params", None) or ()), *(s for s in states if isinstance(s, Tensor))]
        known = [field.name for field in fields(cls)]
        for name in wanted:
            if name not in known:
                raise TypeError(_unknown_keyword(name, [*known, "ignored_states", *_WITHOUT_CHOICE]))
        return cls(**wanted, ignored_modules=tuple(modules), ignored_params=tuple(parameters))

    def parameters_to_ignore(self) -> set[nn.Parameter]:
        """All parameters that stay whole."""
        return {*self.ignored_params, *(parameter for part in self.ignored_modules for parameter in part.parameters())}


_WITHOUT_CHOICE: dict[str, tuple[bool, str]] = {
    "use_orig_params": (True, "parameters keep their names and shapes always, they are never flattened together."),
    "limit_all_gathers": (True, "memory for gathered parameters is limited always."),
}
_DECIDED_HERE = {
    "module": "it is what `fabric.setup` gets",
    "mesh": "pass `device_mesh`",
    "device_type": "it follows from the accelerator",
}


def _unknown_keyword(name: str, known: list[str]) -> str:
    if name in _DECIDED_HERE:
        return f"`{name}` cannot be passed to FSDPStrategy: {_DECIDED_HERE[name]}."
    return f"FSDPStrategy has no option {name!r}.{did_you_mean(name, known)} Known: {', '.join(sorted(known))}."


def sharding_strategy_of(given: Any) -> ShardingStrategy:
    if isinstance(given, ShardingStrategy):
        return given
    known = {strategy.name: strategy for strategy in ShardingStrategy}
    if isinstance(given, str) and given.upper() in known:
        return known[given.upper()]
    hint = did_you_mean(given, known) if isinstance(given, str) else ""
    raise ValueError(f"Unknown sharding_strategy {given!r}.{hint} Known: {', '.join(known)}.")


@dataclass(frozen=True)
class Layout:
    """Over which ranks parameters are shared out, and over which they are repeated; checked as far as it can be."""

    strategy: ShardingStrategy
    sizes: tuple[int, ...] | None = None
    mesh: DeviceMesh | None = None
    process_group: Any = None

    @classmethod
    def of(cls, strategy: ShardingStrategy, device_mesh: Any, process_group: Any, has_policy: bool) -> "Layout":
        """Check what the user passed, and return the record.

        Raises:
            ValueError: if the arguments contradict each other.
            RuntimeError: if a hybrid strategy is not told how many ranks share, and which are repeated.
            TypeError: if ``device_mesh`` or ``process_group`` is something else.

        """
        if device_mesh is not None and process_group is not None:
            raise ValueError(
                "`device_mesh` and `process_group` both say which ranks share parameters. Keep one of them."
            )
        if strategy in _HYBRID and device_mesh is None and process_group is None and not has_policy:
            raise RuntimeError(
                f"sharding_strategy={strategy.name!r} shares parameters out within a group of ranks and repeats them "
                "over such groups, so it needs to know the groups or the units. Pass one of `device_mesh` (such as "
                "`(2, 4)`: 2 groups of 4 ranks), `process_group` or `auto_wrap_policy`."
            )
        ndim = _ndim_of_mesh(device_mesh)
        _check_groups(strategy, process_group)
        if ndim is not None and ndim != (2 if strategy in _HYBRID else 1):
            raise ValueError(
                f"device_mesh={device_mesh!r} has {ndim} dimension(s), but sharding_strategy={strategy.name!r} needs "
                + ("two: (groups, ranks per group)." if strategy in _HYBRID else "one: (ranks,).")
                + (" To repeat over the first and share over the second, use 'HYBRID_SHARD'." if ndim == 2 else "")
            )
        mesh = device_mesh if isinstance(device_mesh, DeviceMesh) else None
        sizes = None if device_mesh is None or mesh is not None else tuple(device_mesh)
        return cls(strategy, sizes, mesh, process_group)

    def build(self, device_type: str, num_nodes: int, num_processes: int) -> DeviceMesh:
        """Collective: make the mesh; of one axis ``"shard"``, or of ``("replicate", "shard")``.

        Raises:
            ValueError: if it is not for as many ranks as there are.

        """
        world = num_nodes * num_processes
        if self.process_group is not None:
            return _mesh_of_groups(self.process_group, device_type)
        sizes = self.sizes or (None if self.mesh is None else tuple(self.mesh.shape))
        if sizes is not None and math.prod(sizes) != world:
            raise ValueError(
                f"device_mesh={sizes} is for {math.prod(sizes)} processes, but there are {world} ({num_nodes} "
                f"machine(s) with {num_processes} each). Make the product of its sizes {world}."
            )
        if self.mesh is not None:
            return self._with_axes(self.mesh, device_type)
        if self.strategy is ShardingStrategy.NO_SHARD:
            sizes = (world, 1)
        elif sizes is None:
            sizes = (num_nodes, num_processes) if self.strategy in _HYBRID else (world,)
        return init_device_mesh(device_type, sizes, mesh_dim_names=_MESH_AXES[-len(sizes) :])

    def _with_axes(self, mesh: DeviceMesh, device_type: str) -> DeviceMesh:
        if mesh.device_type != device_type:
            raise ValueError(
                f"device_mesh is of {mesh.device_type!r} devices, but the strategy runs on {device_type!r}. "
                "Pass the sizes alone, as a tuple."
            )
        ranks = mesh.mesh
        if self.strategy is ShardingStrategy.NO_SHARD:
            return DeviceMesh(device_type, ranks.reshape(-1, 1), mesh_dim_names=_MESH_AXES)
        if mesh.mesh_dim_names is None:  # torch wants names for two dimensions
            return DeviceMesh(device_type, ranks, mesh_dim_names=_MESH_AXES[-mesh.ndim :])
        return mesh


def _ndim_of_mesh(device_mesh: Any) -> int | None:
    if device_mesh is None:
        return None
    if isinstance(device_mesh, DeviceMesh):
        return device_mesh.ndim
    if isinstance(device_mesh, (tuple, list)) and all(type(size) is int and size > 0 for size in device_mesh):
        return len(device_mesh)
    raise TypeError(
        f"`device_mesh` must be a tuple of sizes, such as (2, 4), or a DeviceMesh, but got {device_mesh!r}."
    )


def _check_groups(strategy: ShardingStrategy, process_group: Any) -> None:
    if process_group is None:
        return
    is_pair = isinstance(process_group, (tuple, list))
    if strategy is ShardingStrategy.NO_SHARD:
        raise ValueError(
            "sharding_strategy='NO_SHARD' averages gradients over all ranks and takes no `process_group`. Leave it out."
        )
    if is_pair != (strategy in _HYBRID) or (is_pair and len(process_group) != 2):
        needs = "two groups, (the one to share in, the one to repeat over)" if strategy in _HYBRID else "one group"
        raise ValueError(f"sharding_strategy={strategy.name!r} needs {needs}, but got process_group={process_group!r}.")
    for group in process_group if is_pair else (process_group,):
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"`process_group` must be made of process groups, but got {group!r}.")


def _mesh_of_groups(process_group: Any, device_type: str) -> DeviceMesh:
    if not isinstance(process_group, (tuple, list)):
        return DeviceMesh.from_group(process_group, device_type, mesh_dim_names=("shard",))
    share, repeat = process_group
    rows: list[Any] = [None] * dist.get_world_size(repeat)
    dist.all_gather_object(rows, dist.get_process_group_ranks(share), group=repeat)
    return DeviceMesh.from_group(
        [repeat, share], device_type, mesh=torch.tensor(rows, dtype=torch.int), mesh_dim_names=_MESH_AXES
    )


@dataclass(frozen=True)
class Casting:
    """Where dtypes change. ``output_dtype`` is with the whole only: a unit's output is the next one's input.

    Batch norms of ``uncast`` classes compute in the dtype they are stored in, as do all their statistics.
    """

    whole: MixedPrecisionPolicy
    unit: MixedPrecisionPolicy
    buffers: torch.dtype | None = None
    uncast: tuple[type[nn.Module], ...] = (_BatchNorm,)

    @classmethod
    def of(cls, given: MixedPrecision | MixedPrecisionPolicy | None, precision: Precision) -> "Casting":
        """Return what ``given`` says, or else what ``precision`` says."""
        if isinstance(given, MixedPrecision):
            return cls._of_predecessor(given)
        if given is not None:
            return cls._of_policy(given)
        if not isinstance(precision, FSDPPrecision) or precision.precision == "32-true":
            return cls._of_policy(MixedPrecisionPolicy())  # a module that is stored in other dtypes computes in them
        dtypes = precision.dtypes
        if precision.autocasts:
            plain = MixedPrecisionPolicy(reduce_dtype=dtypes.reduce, cast_forward_inputs=False)
            return cls(plain, plain, dtypes.buffer)
        # what is returned is cast by the precision
        plain = MixedPrecisionPolicy(param_dtype=dtypes.param, reduce_dtype=dtypes.reduce)
        return cls(plain, plain, dtypes.buffer, uncast=())

    @classmethod
    def _of_policy(cls, policy: MixedPrecisionPolicy) -> "Casting":
        whole = policy
        if policy.param_dtype is not None and policy.output_dtype is None:
            whole = replace(policy, output_dtype=torch.get_default_dtype())
        return cls(whole, replace(policy, output_dtype=None))

    @classmethod
    def _of_predecessor(cls, given: MixedPrecision) -> "Casting":
        if given.keep_low_precision_grads:
            raise ValueError(
                "`MixedPrecision(keep_low_precision_grads=True)` is not possible: gradients have the dtype of the "
                "parameters that the optimizer updates. Leave it out, or store parameters in 16 bit: "
                "precision='bf16-true'."
            )
        reduce_dtype = given.reduce_dtype or given.param_dtype
        unit = MixedPrecisionPolicy(given.param_dtype, reduce_dtype, cast_forward_inputs=given.cast_forward_inputs)
        whole = cls._of_policy(replace(unit, cast_forward_inputs=given.cast_root_forward_inputs)).whole
        return cls(whole, unit, given.buffer_dtype, tuple(given._module_classes_to_ignore))

    def of_uncast(self, stored: torch.dtype) -> MixedPrecisionPolicy:
        """For a unit that computes in ``stored`` between others that do not."""
        return MixedPrecisionPolicy(stored, output_dtype=self.unit.param_dtype)

    def of_kept(self, is_outermost: bool) -> MixedPrecisionPolicy:
        """For a unit that is kept in 32 bit: it casts its inputs itself."""
        output_dtype = self.unit.param_dtype if is_outermost else None
        return MixedPrecisionPolicy(torch.float32, torch.float32, output_dtype, cast_forward_inputs=False)


def when_to_reshard(strategy: ShardingStrategy, options: FSDPOptions) -> bool | int | None:
    """Whether a unit is whole only while it runs; None: so, except what is outside of all units."""
    given = options.reshard_after_forward
    if strategy in (ShardingStrategy.FULL_SHARD, ShardingStrategy.HYBRID_SHARD):
        return given
    if given:
        raise ValueError(
            f"reshard_after_forward={given!r} contradicts sharding_strategy={strategy.name!r}, under which parameters "
            "stay whole until backward is done. Keep one of them."
        )
    return False


def offload_of(given: Any, policy: OffloadPolicy | None) -> CPUOffloadPolicy | None:
    if given is not None and policy is not None:
        raise ValueError("`cpu_offload` and `offload_policy` say the same. Keep one of them.")
    given = policy if policy is not None else given
    if isinstance(given, CPUOffload):
        given = given.offload_params
    if isinstance(given, CPUOffloadPolicy):
        return given
    if given is None or isinstance(given, (bool, OffloadPolicy)):
        return CPUOffloadPolicy() if given is True else None
    raise TypeError(f"`cpu_offload` must be a bool, `CPUOffload` or `CPUOffloadPolicy`, but got {given!r}.")


def mixed_precision_of(given: Any, policy: MixedPrecisionPolicy | None) -> MixedPrecision | MixedPrecisionPolicy | None:
    if given is not None and policy is not None:
        raise ValueError("`mixed_precision` and `mp_policy` say the same. Keep one of them.")
    given = policy if policy is not None else given
    if given is not None and not isinstance(given, (MixedPrecision, MixedPrecisionPolicy)):
        raise TypeError(
            "`mixed_precision` must be a `MixedPrecision` or `MixedPrecisionPolicy` of `torch.distributed.fsdp`, but "
            f"got {given!r}. For a precision by its name, use `Fabric(precision=...)`."
        )
    Casting.of(given, Precision())  # what cannot be is refused now
    return given


def choice_to_checkpoint(deprecated: Any, policy: Any) -> Choice | None:
    if deprecated is None:
        return choice_of(policy, "activation_checkpointing_policy")
    if policy is not None:
        raise ValueError(
            "`activation_checkpointing` and `activation_checkpointing_policy` say the same. Keep the latter."
        )
    rank_zero_deprecation(
        "`FSDPStrategy(activation_checkpointing=...)` is deprecated. Please use `activation_checkpointing_policy=`."
    )
    return choice_of(deprecated, "activation_checkpointing")


def check_device(device_id: int | torch.device | None, device: torch.device) -> None:
    if device_id is None:
        return
    given = torch.device("cuda", device_id) if isinstance(device_id, int) else torch.device(device_id)
    if given.type != device.type or (given.index is not None and given.index != device.index):
        raise ValueError(
            f"device_id={device_id!r} is not the device of this process, which is {device}. Leave it out: it follows "
            "from the accelerator and `devices`."
        )
