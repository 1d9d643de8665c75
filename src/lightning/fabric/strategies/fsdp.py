"""Share parameters, gradients and optimizer state out over the ranks.    torch: fully_shard (FSDP2), DeviceMesh"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from itertools import pairwise
from typing import Any, Literal, TypeAlias, get_args
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.distributed._composable.checkpoint_activation import checkpoint
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    BackwardPrefetch,
    CPUOffload,
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    OffloadPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import CustomPolicy, ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from lightning.fabric.accelerators.accelerator import Accelerator
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.plugins.precision._dtypes import default_dtype
from lightning.fabric.plugins.precision._kept import is_kept, outermost_kept
from lightning.fabric.plugins.precision.fsdp import FSDPPrecision
from lightning.fabric.plugins.precision.precision import Precision
from lightning.fabric.strategies._dtensor import (
    move_plain_tensors,
    plain_tensors,
    shard_optimizer_state,
    sync_from_rank_zero,
)
from lightning.fabric.strategies._fsdp_module import FSDPBackwardSync, FSDPRoot, ReshardAfterStep, ZeroGrad
from lightning.fabric.strategies._fsdp_options import (
    Casting,
    FSDPOptions,
    Layout,
    check_device,
    choice_to_checkpoint,
    mixed_precision_of,
    offload_of,
    sharding_strategy_of,
    when_to_reshard,
)
from lightning.fabric.strategies._materialize import MetaTensors
from lightning.fabric.strategies._mixed_groups import step_one_by_one_if_mixed
from lightning.fabric.strategies._sharded_strategy import ShardedStrategy
from lightning.fabric.strategies._wrap_policy import Choice, Tie, choice_of, modules_to_checkpoint, units_to_shard
from lightning.fabric.strategies.strategy import Strategy, _Sharded
from lightning.fabric.utilities.compilation import uncompiled
from lightning.fabric.utilities.init import _has_meta_device_parameters_or_buffers
from lightning.fabric.utilities.init_tape import recording_init
from lightning.fabric.utilities.optimizer import parameter_names, repoint_optimizers
from lightning.fabric.utilities.rank_zero import rank_zero_warn

_Policy: TypeAlias = (
    set[type[nn.Module]] | list[type[nn.Module]] | Callable[..., bool] | ModuleWrapPolicy | CustomPolicy
)
_StateDictType = Literal["sharded", "full"]
_PRECISIONS = frozenset({"32-true", "64-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed", "float8"})


class FSDPStrategy(ShardedStrategy, _Sharded):
    """Each rank holds a part of every parameter, its gradient and its optimizer state; a unit is whole while it runs.

    The module is set up in place: parameters become ``DTensor``, under their own names. Copies of it cannot be made
    with ``copy.deepcopy``; go through state dicts.

    Args:
        accelerator: kind of device; None: Fabric chooses.
        parallel_devices: the devices of this machine; None: Fabric chooses.
        cluster_environment: owner of ranks and addresses; None: detected.
        precision: dtypes and loss scaling.
        process_group_backend: None: nccl on CUDA, gloo on CPU.
        timeout: how long a collective waits for the other processes.
        cpu_offload: parameters, gradients and optimizer state wait in CPU memory: True, or a record of torch's.
        mixed_precision: dtypes in place of the precision's: ``MixedPrecision`` or ``MixedPrecisionPolicy`` of torch.
        auto_wrap_policy: which submodules are units: a set of layer classes, a policy of torch, or a function
            ``(module, recurse, nonwrapped_numel) -> bool``. None: the whole module is one unit.
        activation_checkpointing: deprecated, a class or a list of classes.
        activation_checkpointing_policy: which submodules compute their activations again in backward, instead of
            keeping them; said as ``auto_wrap_policy`` is.
        sharding_strategy: ``"FULL_SHARD"``; ``"SHARD_GRAD_OP"``: parameters stay whole from forward to backward;
            ``"NO_SHARD"``: everything is repeated, gradients are averaged; ``"HYBRID_SHARD"`` and
            ``"_HYBRID_SHARD_ZERO2"``: shared out in groups (of a machine, unless said) and repeated over groups.
        state_dict_type: what ``fabric.save`` writes: ``"sharded"``: a folder, each rank its part; ``"full"``: a file.
        device_mesh: the ranks' arrangement: ``(ranks,)`` or, for a hybrid strategy, ``(groups, ranks per group)``.
        kwargs: options of ``torch.distributed.fsdp.fully_shard``, and of ``FullyShardedDataParallel``, see
            :class:`FSDPOptions`.

    Raises:
        TypeError: for an option that is unknown or of a wrong type.
        ValueError: for options that contradict each other, or ask for what is not possible.
        RuntimeError: if a hybrid strategy knows neither groups nor units.

    """

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        precision: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(minutes=30),
        cpu_offload: bool | CPUOffload | CPUOffloadPolicy | None = None,
        mixed_precision: MixedPrecision | MixedPrecisionPolicy | None = None,
        auto_wrap_policy: _Policy | None = None,
        activation_checkpointing: type[nn.Module] | list[type[nn.Module]] | None = None,
        activation_checkpointing_policy: _Policy | None = None,
        sharding_strategy: str | ShardingStrategy = "FULL_SHARD",
        state_dict_type: _StateDictType = "sharded",
        device_mesh: tuple[int, ...] | DeviceMesh | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            accelerator, parallel_devices, cluster_environment, _can_shard(precision), process_group_backend, timeout
        )
        if state_dict_type not in get_args(_StateDictType):
            raise ValueError(f"state_dict_type must be one of {get_args(_StateDictType)}, but got {state_dict_type!r}.")
        self._state_dict_type: _StateDictType = state_dict_type
        self._options = options = FSDPOptions.from_keywords(kwargs)
        self._sharding_strategy = sharding_strategy_of(sharding_strategy)
        self._layout = Layout.of(self._sharding_strategy, device_mesh, options.process_group, bool(auto_wrap_policy))
        self._reshard_after_forward = when_to_reshard(self._sharding_strategy, options)
        self._offload = offload_of(cpu_offload, options.offload_policy)
        self._mixed_precision = mixed_precision_of(mixed_precision, options.mp_policy)
        self._units = choice_of(auto_wrap_policy, "auto_wrap_policy")
        self._to_checkpoint = choice_to_checkpoint(activation_checkpointing, activation_checkpointing_policy)
        self._roots: WeakSet[FSDPRoot] = WeakSet()
        self._replaced: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameters as they were before
        self._known_optimizers: WeakKeyDictionary[Optimizer, None] = WeakKeyDictionary()
        self._backward_sync_control = FSDPBackwardSync()

    # -- parts

    @property
    def precision(self) -> Precision:
        """Dtypes and loss scaling; full precision unless set."""
        return Strategy.precision.fget(self)  # type: ignore[attr-defined]

    @precision.setter
    def precision(self, precision: Precision | None) -> None:
        Strategy.precision.fset(self, _can_shard(precision))  # type: ignore[attr-defined]

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """Not used: the strategy writes and reads its files itself."""
        return Strategy.checkpoint_io.fget(self)  # type: ignore[attr-defined]

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        raise NotImplementedError(
            f"FSDPStrategy writes and reads its files itself, so {type(io).__name__} would never be asked. "
            "Leave the checkpoint IO plugin out."
        )

    @property
    def sharding_strategy(self) -> ShardingStrategy:
        """What is shared out over the ranks."""
        return self._sharding_strategy

    @property
    def state_dict_type(self) -> str:
        """What is written: ``"sharded"`` or ``"full"``."""
        return self._state_dict_type

    # -- processes

    def setup_environment(self) -> None:
        device = self.root_device
        check_device(self._options.device_id, device)
        backend = self._process_group_backend
        if backend is None and self._offload is not None and device.type == "cuda":
            backend = "cpu:gloo,cuda:nccl"  # what waits in CPU memory is talked about from there
        self._join_world(backend, self._timeout)
        self._device_mesh = self._layout.build(device.type, self.num_nodes, self.num_processes)
        if self._options.process_group is None:
            self._join_mesh(self._device_mesh)
        if isinstance(self.precision, FSDPPrecision):
            self.precision.computes_on(device.type)

    # -- objects

    @contextmanager
    def module_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Modules made inside have the dtype of the precision.

        ``empty_init=True``: parameters take no memory; ``setup_module`` gives every rank its part of the values that
        they would have had. Otherwise they are on the CPU, as they may be too large for the device before they are
        shared out.
        """
        device = nullcontext() if empty_init else torch.device("cpu")
        with recording_init() if empty_init else nullcontext(), device, self.precision.module_init_context():
            yield

    def module_sharded_context(self) -> AbstractContextManager[None]:
        return self.module_init_context(empty_init=True)

    def module_to_device(self, module: nn.Module) -> None:
        """Do nothing: ``setup_module`` moves unit by unit, so that no device ever holds the whole."""

    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Optimizer], scheduler: Any = None
    ) -> tuple[nn.Module, list[Optimizer], Any]:
        """Set both up together; what the optimizers have of groups, options and state stays.

        Raises:
            RuntimeError: if an optimizer has parameters on the meta device.

        """
        for optimizer in optimizers:
            if _has_meta_device_parameters_or_buffers(optimizer):
                raise RuntimeError(
                    f"{type(optimizer).__name__} has parameters on the meta device, which get their values when the "
                    "module is set up. Set the module up first, then create the optimizer, then set that up: "
                    "`model = fabric.setup_module(model)`, `optimizer = Adam(model.parameters())`, "
                    "`optimizer = fabric.setup_optimizers(optimizer)`."
                )
        before = parameter_names(module)
        root = self.setup_module(module)
        repoint_optimizers(optimizers, before, module)
        for optimizer in optimizers:
            shard_optimizer_state(optimizer)
        return root, [self.setup_optimizer(optimizer) for optimizer in optimizers], scheduler

    def units_to_be(self, module: nn.Module) -> list[nn.Module]:
        ignored = self._options.parameters_to_ignore()
        return units_to_shard(module, self._units, self._options.ignored_modules, ignored).modules

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Collective: share ``module`` out, in place, and return what to call in training.

        The values are rank 0's (unless ``sync_module_states=False``); those of parameters on the meta device are what
        one process would have made.

        Raises:
            ValueError: if it is set up already, or has parameters that cannot be shared out.
            TypeError: if a submodule with parameters on the meta device says nothing of how to fill them.

        """
        self._need_group("setup_module")
        ignored = self._options.parameters_to_ignore()
        _check_can_be_sharded(module, ignored)
        meta = MetaTensors.of(module)
        # weakly: what was whole goes as soon as its unit has been shared out
        self._replaced.update((parameter, None) for parameter in module.parameters() if parameter not in ignored)
        casting = Casting.of(self._mixed_precision, self.precision)
        policies = self._policies_of_units(module, casting, ignored)
        _check_dtypes(module, [*policies, module], ignored)

        for part in modules_to_checkpoint(uncompiled(module), self._to_checkpoint):
            checkpoint(part, context_fn=_same_default_dtype)  # keeps names and objects, unlike torch's wrapper
        for unit, policy in policies.items():
            self._shard_unit(unit, policy, ignored)
        root = FSDPRoot(module)
        self._shard_unit(root, casting.whole, ignored)
        if meta:
            device = torch.device("cpu") if self._offload is not None else self.root_device
            meta.materialize(root, device, agree=self.broadcast, param_init_fn=self._options.param_init_fn)
        move_plain_tensors(module, self.root_device)
        _cast_buffers(module, casting)
        self._prefetch(root)

        self._roots.add(root)
        return root

    def _policies_of_units(
        self, module: nn.Module, casting: Casting, ignored: set[nn.Parameter]
    ) -> dict[nn.Module, MixedPrecisionPolicy]:
        """Return the dtypes of each unit but ``module`` itself, inner ones first."""
        module = uncompiled(module)  # it may be compiled on the inside
        kept = set(outermost_kept(module))
        units = units_to_shard(module, _with(kept, self._units), self._options.ignored_modules, ignored)
        _check_kept_are_units(units.ties, kept, module)
        _warn_of_ties(units.ties)
        policies = {unit: casting.of_kept(unit in kept) if is_kept(unit) else casting.unit for unit in units.modules}
        return {**_uncast_parts(module, casting), **policies}

    def _shard_unit(self, unit: nn.Module, policy: MixedPrecisionPolicy, ignored: set[nn.Parameter]) -> None:
        """Bring what is whole in ``unit`` to the device, make it rank 0's, and keep this rank's part."""
        for tensor in plain_tensors(unit):
            tensor.data = tensor.data.to(self.root_device).contiguous()
        if self._options.sync_module_states:
            sync_from_rank_zero(unit, self.root_device)
        fully_shard(
            unit,
            mesh=self.device_mesh,
            reshard_after_forward=self._reshard_after_forward,
            shard_placement_fn=self._options.shard_placement_fn,
            mp_policy=policy,
            offload_policy=self._offload_policy(),
            ignored_params=ignored,
        )

    def _offload_policy(self) -> OffloadPolicy:
        if self._offload is None:
            return OffloadPolicy()
        # memory can be pinned only for an accelerator
        return CPUOffloadPolicy(pin_memory=self._offload.pin_memory and self.root_device.type != "cpu")

    def _prefetch(self, root: "FSDPRoot") -> None:
        units = root.units()
        if self._options.forward_prefetch:
            for unit, following in pairwise(units):
                unit.set_modules_to_forward_prefetch([following])
        if self._options.backward_prefetch is not BackwardPrefetch.BACKWARD_PRE:
            for unit in units:
                unit.set_modules_to_backward_prefetch([unit])  # itself, which is there already

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Check that ``optimizer`` updates parameters as they are after set-up.

        Raises:
            ValueError: if it has parameters from before, or none of a module that was set up.

        """
        known: set[Tensor] = set()
        for root in self._roots:
            seen = parameter_names(root.module)
            root.reshard_all()  # the optimizer may be made while a unit is whole
            repoint_optimizers([optimizer], seen, root.module)
            known.update(root.module.parameters())
        parameters = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        if known.isdisjoint(parameters) or any(p.is_meta or p in self._replaced for p in parameters - known):
            raise ValueError(
                f"{type(optimizer).__name__} has parameters that are not those of a module that was set up: "
                "FSDPStrategy replaces them. Create it after `fabric.setup_module(model)`, or set both up together: "
                "`model, optimizer = fabric.setup(model, optimizer)`."
            )
        if optimizer not in self._known_optimizers:
            step_one_by_one_if_mixed(optimizer)
            self._known_optimizers[optimizer] = None
            roots = self._roots_of(parameters)
            optimizer.register_step_post_hook(ReshardAfterStep(roots))
            optimizer.zero_grad = ZeroGrad(optimizer.zero_grad, roots)  # type: ignore[method-assign]
        return optimizer

    def _roots_of(self, parameters: set[Tensor]) -> "WeakSet[FSDPRoot]":
        return WeakSet(root for root in self._roots if not parameters.isdisjoint(root.module.parameters()))

    # -- the step

    def backward(self, tensor: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        try:
            super().backward(tensor, module, *args, **kwargs)
        except BaseException:
            for root in self._roots:
                root.abandon_step()
                root.drop_unsynced_gradients()
            raise

    # -- files

    @property
    def _writes_folders(self) -> bool:
        return self._state_dict_type == "sharded"

    def _show_parts(self) -> None:
        for root in self._roots:
            root.reshard_all()

    def _module_with_state(self, module: nn.Module) -> nn.Module:
        return uncompiled(module.module if isinstance(module, FSDPRoot) else module)

    # -- what was done

    def remarks(self) -> list[str]:
        return [*super().remarks(), _WHOLE_WHEN[self._reshard_after_forward is not False], *self._remarks_on_memory()]

    def _remarks_on_memory(self) -> list[str]:
        if self._offload is None:
            return []
        return ["Parts of parameters, gradients and optimizer state wait in CPU memory."]


_WHOLE_WHEN = {
    True: "A unit is whole while it runs; what is in no unit, from its forward to its backward.",
    False: "Parameters stay whole from forward to backward.",
}


def _can_shard(precision: Precision | None) -> Precision | None:
    if precision is None or precision.precision in _PRECISIONS:
        return precision
    raise TypeError(
        f"FSDPStrategy cannot compute with {type(precision).__name__} (precision={precision.precision!r}). "
        f"Use `FSDPPrecision`, for one of: {', '.join(sorted(_PRECISIONS))}."
    )


# ---- parts of set-up -------------------------------------------------------------------------------------------------


def _check_can_be_sharded(module: nn.Module, ignored: set[nn.Parameter]) -> None:
    parts = list(module.modules())
    if any(isinstance(part, FullyShardedDataParallel) for part in parts):
        raise TypeError(
            f"{type(module).__name__} has `FullyShardedDataParallel` inside, which shares parameters out differently. "
            "Pass the module without it, and say what the units are: `FSDPStrategy(auto_wrap_policy=...)`."
        )
    sharded = any(isinstance(parameter, DTensor) for parameter in module.parameters())
    if sharded or any(isinstance(part, FSDPModule) for part in parts):
        raise ValueError(
            f"{type(module).__name__}, or a part of it, is shared out already. Set each module up once; to combine "
            "`fully_shard` with tensor parallelism yourself, use `ModelParallelStrategy`."
        )
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter not in ignored]
    scalars = [name for name, parameter in named if parameter.ndim == 0]
    if scalars:
        raise ValueError(
            f"Parameters without dimensions cannot be shared out: {', '.join(map(repr, scalars))}. Give each one "
            "dimension, `nn.Parameter(torch.ones(1))`, or name it in `ignored_params`."
        )


def _check_kept_are_units(ties: list[Tie], kept: set[nn.Module], module: nn.Module) -> None:
    for tie in ties:
        if any(module.get_submodule(unit) in kept for unit in tie.units):
            raise ValueError(
                f"{' and '.join(map(repr, tie.parameters))} are one parameter, used in several modules of `keep_fp32`, "
                "each of which FSDP would gather and reduce on its own. Keep one module around all of them, or none."
            )


def _warn_of_ties(ties: list[Tie]) -> None:
    for tie in ties:
        rank_zero_warn(
            f"{' and '.join(map(repr, tie.parameters))} are one parameter, used in several units. So "
            f"{' and '.join(map(repr, tie.units))} cannot be units of their own; they are with what surrounds them."
        )


def _check_dtypes(module: nn.Module, units: list[nn.Module], ignored: set[nn.Parameter]) -> None:
    """What is reduced together has one dtype."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    left = {parameter for parameter in names if parameter.requires_grad and parameter not in ignored}
    for unit in units:
        own = {parameter.dtype: names[parameter] for parameter in unit.parameters() if parameter in left}
        left.difference_update(unit.parameters())
        if len(own) > 1:
            found = ", ".join(f"{name!r} is {dtype}" for dtype, name in own.items())
            raise ValueError(
                "The gradients of a unit are added up over the ranks together, so its parameters need one dtype: "
                f"{found}. Convert the model to one, or make the parts units of their own with `auto_wrap_policy`."
            )


def _with(parts: set[nn.Module], choice: Choice | None) -> Choice | None:
    """Return what chooses ``parts``, too."""
    if not parts:
        return choice
    return lambda module, ignored: {*(choice(module, ignored) if choice else ()), *(parts - set(ignored))}


def _uncast_parts(module: nn.Module, casting: Casting) -> dict[nn.Module, MixedPrecisionPolicy]:
    """What computes in the dtype it is stored in, where everything around it is cast to another."""
    dtype = casting.unit.param_dtype
    found = {part: next(part.parameters(), None) for part in module.modules() if isinstance(part, casting.uncast)}
    return {
        part: casting.of_uncast(stored.dtype)
        for part, stored in found.items()
        if stored is not None and dtype is not None and stored.dtype != dtype and not is_kept(part)
    }


def _cast_buffers(module: nn.Module, casting: Casting) -> None:
    if casting.buffers is None:
        return
    for part in module.modules():
        if not isinstance(part, casting.uncast) and not is_kept(part):
            for buffer in part.buffers(recurse=False):
                if buffer.is_floating_point():
                    buffer.data = buffer.data.to(casting.buffers)


def _same_default_dtype() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For forward, and for the second forward in backward: what makes new tensors of the same dtype."""
    return nullcontext(), default_dtype(torch.get_default_dtype())
