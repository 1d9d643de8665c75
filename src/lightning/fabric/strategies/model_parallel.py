"""Split a module over processes, as a function of the user's says.    torch: DeviceMesh, DTensor, FSDP2"""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Literal, TypeAlias
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed._composable.replicate import DDP as ReplicatedModule
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.plugins.precision._kept import is_kept
from lightning.fabric.plugins.precision._table import PRECISIONS
from lightning.fabric.plugins.precision.precision import Precision
from lightning.fabric.strategies._dtensor import _summed, local_tensor, move_plain_tensors, sync_from_rank_zero
from lightning.fabric.strategies._fsdp_module import _groups
from lightning.fabric.strategies._holding import Holding
from lightning.fabric.strategies._materialize import MetaTensors
from lightning.fabric.strategies._mixed_groups import step_one_by_one_if_mixed
from lightning.fabric.strategies._sharded_strategy import ShardedStrategy
from lightning.fabric.strategies.ddp import holding_in
from lightning.fabric.strategies.strategy import _NO_CONTEXT, Strategy, _BackwardSyncControl
from lightning.fabric.utilities.compilation import uncompiled
from lightning.fabric.utilities.init_tape import recording_init

_Size: TypeAlias = int | Literal["auto"]
# whose weights are tensors that can be split
_PRECISIONS = frozenset(name for name in PRECISIONS if not name.startswith("transformer-engine"))


@dataclass(frozen=True)
class MeshSizes:
    """How many processes are along each mesh dimension; "auto": the machines, and the processes of each."""

    data_parallel: _Size = "auto"
    tensor_parallel: _Size = "auto"

    def __post_init__(self) -> None:
        for name, size in (("data_parallel_size", self.data_parallel), ("tensor_parallel_size", self.tensor_parallel)):
            if size != "auto" and (type(size) is not int or size < 1):
                raise ValueError(f"`{name}` must be 'auto' or a positive integer, but got {size!r}.")

    def resolve(self, num_nodes: int, num_processes: int) -> tuple[int, int]:
        """Return both numbers for ``num_nodes`` machines of ``num_processes``; they cover the world exactly."""
        data = num_nodes if self.data_parallel == "auto" else self.data_parallel
        tensor = num_processes if self.tensor_parallel == "auto" else self.tensor_parallel
        world = num_nodes * num_processes
        if data * tensor != world:
            raise RuntimeError(
                f"data_parallel_size={self.data_parallel!r} ({data}) times tensor_parallel_size="
                f"{self.tensor_parallel!r} ({tensor}) is {data * tensor}, but there are {world} processes ({num_nodes} "
                f"machine(s) with {num_processes} each). Choose sizes whose product is {world}."
            )
        return data, tensor


class ModelParallelStrategy(ShardedStrategy):
    """Split modules as ``parallelize_fn`` says: tensor parallel, FSDP2 (``fully_shard``), or both.

    The processes form a mesh with the dimensions ``"data_parallel"`` and ``"tensor_parallel"``. Ranks along
    ``"data_parallel"`` see different batches, and the module must average gradients over them: by ``fully_shard``,
    ``replicate`` or ``DistributedDataParallel``. Ranks along ``"tensor_parallel"`` see the same batch and compute one
    result together.

    ``setup_module`` comes first, then the optimizer is made of the module's parameters, then ``setup_optimizer``.

    A parameter that the plan leaves out is a plain tensor with a copy on every tensor-parallel rank. Nothing
    synchronises the copies: they stay equal because each rank computes the same gradient, which is so where input and
    output of the layer are whole (between a ``RowwiseParallel`` and a ``ColwiseParallel``, for one). A layer that sees
    a part of the sequence, or of the features, belongs into the plan (``SequenceParallel``). Dropout on whole
    activations needs the same seed on the tensor-parallel ranks.

    Args:
        parallelize_fn: ``(module, device_mesh) -> module``; changes the module in place, or returns one that has it
            inside. Called on every rank, in ``setup_module``; parameters may be on the meta device.
        data_parallel_size: number of ranks along ``"data_parallel"``; "auto": the number of machines.
        tensor_parallel_size: number of ranks along ``"tensor_parallel"``; "auto": the processes of each machine.
        save_distributed_checkpoint: each rank writes its part, into a folder; False: rank 0 writes one file.
        process_group_backend: None: nccl on CUDA, gloo on CPU.
        timeout: how long a collective waits for the other processes.

    Raises:
        TypeError: if ``parallelize_fn`` cannot be called.
        ValueError: if a size is neither "auto" nor a positive integer.

    """

    def __init__(
        self,
        parallelize_fn: Callable[[Any, DeviceMesh], nn.Module],
        data_parallel_size: _Size = "auto",
        tensor_parallel_size: _Size = "auto",
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(minutes=30),
    ) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)
        if not callable(parallelize_fn):
            raise TypeError(
                f"`parallelize_fn` must be a function (module, device_mesh) -> module, but got {parallelize_fn!r}."
            )
        self._parallelize_fn = parallelize_fn
        self._sizes = MeshSizes(data_parallel_size, tensor_parallel_size)
        self._save_distributed_checkpoint = save_distributed_checkpoint
        self._parallelized: WeakKeyDictionary[nn.Module, _Parallelized] = WeakKeyDictionary()
        self._backward_sync_control = _SyncControl(self._parallelized)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Tensor-parallel ranks see the same data."""
        mesh = self.device_mesh["data_parallel"]
        return {"num_replicas": mesh.size(), "rank": mesh.get_local_rank()}

    @property
    def precision(self) -> Precision:
        """Dtypes and loss scaling; full precision unless set."""
        return Strategy.precision.fget(self)  # type: ignore[attr-defined]

    @precision.setter
    def precision(self, precision: Precision | None) -> None:
        if precision is not None and precision.precision not in _PRECISIONS:
            raise TypeError(
                f"ModelParallelStrategy cannot split the weights of {type(precision).__name__} "
                f"(precision={precision.precision!r}). Use one of: {', '.join(sorted(_PRECISIONS))}; or strategy='ddp'."
            )
        Strategy.precision.fset(self, precision)  # type: ignore[attr-defined]

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """Writes and reads checkpoints that are one file."""
        return Strategy.checkpoint_io.fget(self)  # type: ignore[attr-defined]

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        if self._save_distributed_checkpoint:
            raise NotImplementedError(
                f"ModelParallelStrategy writes its folders itself, so {type(io).__name__} would never be asked. Leave "
                "the checkpoint IO plugin out, or choose `save_distributed_checkpoint=False`."
            )
        Strategy.checkpoint_io.fset(self, io)  # type: ignore[attr-defined]

    # -- processes

    def setup_environment(self) -> None:
        sizes = self._sizes.resolve(self.num_nodes, self.num_processes)  # wrong ones fail before anybody waits
        self._join_world(self._process_group_backend, self._timeout)
        names = ("data_parallel", "tensor_parallel")
        self._device_mesh = init_device_mesh(self.root_device.type, sizes, mesh_dim_names=names)
        self._join_mesh(self._device_mesh)
        self._let_ranks_agree_on_overflow()

    def _let_ranks_agree_on_overflow(self) -> None:
        scaler = getattr(self.precision, "scaler", None)
        if type(scaler) is GradScaler:  # one with a class of its own is the user's business
            self.precision.scaler = _AgreedGradScaler.like(scaler, self.root_device.type)  # type: ignore[attr-defined]

    # -- objects

    @contextmanager
    def module_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """With ``empty_init=True`` parameters are on the meta device, and ``setup_module`` fills each rank's part."""
        if not empty_init:
            with super().module_init_context(empty_init=False):
                yield
            return
        with recording_init(self.root_device), self.precision.module_init_context():
            yield

    def module_to_device(self, module: nn.Module) -> None:
        """Do nothing: a module may be larger than the device until it is split, so ``setup_module`` moves it."""

    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Optimizer], scheduler: Any = None
    ) -> tuple[nn.Module, list[Optimizer], Any]:
        raise RuntimeError(
            "ModelParallelStrategy replaces the parameters of the module when it is set up, so an optimizer made "
            "before would update others. Set the module up first, then create the optimizer from its parameters, then "
            "set that up: `model = fabric.setup_module(model)`, `optimizer = Adam(model.parameters())`, "
            "`optimizer = fabric.setup_optimizers(optimizer)`."
        )

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Collective: call ``parallelize_fn``, then give every rank its part of one set of initial values.

        The values are rank 0's; of parameters on the meta device, those that one process would have made. Nowhere is
        the whole module allocated for these.

        Raises:
            TypeError: if what ``parallelize_fn`` returns is no module, has not got ``module`` inside, or uses
                ``FullyShardedDataParallel``; or if a submodule with meta parameters cannot be initialised.
            RuntimeError: if gradients of trainable parameters are not averaged over ``"data_parallel"``.

        """
        self._need_group("setup_module")
        meta = MetaTensors.of(module)
        sync_from_rank_zero(module, self.root_device)
        shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
        parallelized = self._parallelize_fn(module, self.device_mesh)
        _check_parallelized(parallelized, module)
        _check_nothing_gets_lost(parallelized, module, shapes)
        _check_dtypes_of_units(parallelized, module)
        if meta:
            meta.materialize(module, self.root_device, agree=self.broadcast)
        _check_gradients_are_averaged(parallelized, self.device_mesh["data_parallel"])  # by what is there now
        move_plain_tensors(parallelized, self.root_device)
        forward_module = _with_hooks_reachable(parallelized, module)
        self._parallelized[uncompiled(forward_module)] = _Parallelized.of(forward_module, uncompiled(module))
        return forward_module

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Check that the parameters are those that set-up modules have now, and that torch can step them together.

        Raises:
            ValueError: if a parameter is on the meta device or belongs to no module that was set up; or if the fast
                ways of stepping (``foreach``, ``fused``) were asked for parameters that they cannot take together.

        """
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if any(parameter.is_meta for parameter in parameters):
            raise ValueError(
                f"{type(optimizer).__name__} has parameters on the meta device, which set-up has replaced. "
                "Create it after `setup_module`, from the parameters of the module that it returned."
            )
        self._show_parts()
        records = {p: record for module, record in self._parallelized.items() for p in module.parameters()}
        unknown = [tuple(parameter.shape) for parameter in parameters if parameter not in records]
        if unknown:
            raise ValueError(
                f"{type(optimizer).__name__} has {len(unknown)} parameter(s) that no set-up module has, of shape "
                f"{', '.join(map(str, unknown[:5]))}. Create it after `setup_module` and before the first forward, "
                "from the parameters of the module that `setup_module` returned."
            )
        if isinstance(optimizer, Optimizer):
            step_one_by_one_if_mixed(optimizer)
            optimizer.register_step_post_hook(_ShowPartsAfterStep(records[parameter] for parameter in parameters))
        return optimizer

    def _show_parts(self) -> None:
        for record in self._parallelized.values():
            record.show_parts()

    # -- what was done

    def holdings(self, module: nn.Module, forward_module: nn.Module) -> list[Holding]:
        by_ddp = dict(_held_by_ddp(forward_module))
        return [
            replace(by_ddp[found.parameter], name=found.name) if found.parameter in by_ddp else found
            for found in super().holdings(module, forward_module)
        ]

    # -- files

    @property
    def _writes_folders(self) -> bool:
        return self._save_distributed_checkpoint

    def _module_with_state(self, module: nn.Module) -> nn.Module:
        record = self._parallelized.get(uncompiled(module))
        return module if record is None else record.own


# ---- what a set-up module is -----------------------------------------------------------------------------------------


class _ThroughHooks(nn.Module):
    """Calls ``module``, so that the hooks of its ``forward`` also run around other methods that are routed here."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def _with_hooks_reachable(parallelized: nn.Module, module: nn.Module) -> nn.Module:
    # `fully_shard` and `replicate` work in place; without their hooks, methods would find parts of parameters
    in_place = parallelized is module and isinstance(module, (FSDPModule, ReplicatedModule))
    return _ThroughHooks(module) if in_place else parallelized


@dataclass
class _Parallelized:
    """What is remembered of a module that was set up; it keeps no module alive."""

    _own: "ref[nn.Module]"
    _synchronised: Sequence["ref[nn.Module]"]
    synchronises: bool = True

    @classmethod
    def of(cls, forward_module: nn.Module, own: nn.Module) -> "_Parallelized":
        kinds = (FSDPModule, ReplicatedModule, DistributedDataParallel)
        return cls(ref(own), tuple(ref(part) for part in forward_module.modules() if isinstance(part, kinds)))

    @property
    def own(self) -> nn.Module:
        module = self._own()
        if module is None:
            raise RuntimeError("The module was deleted while its forward module is still in use. Keep a reference.")
        return module

    def show_parts(self) -> None:
        """Put split parameters in place of the whole ones that FSDP2 may leave there after a forward, and free these.

        Not during forward or backward.
        """
        for part in self._parts():
            if isinstance(part, FSDPModule):
                part.reshard()

    def synchronise(self, on: bool) -> None:
        """Let backward synchronise gradients, or leave it out."""
        self.synchronises = on
        for part in self._parts():
            if isinstance(part, FSDPModule):
                part.set_requires_gradient_sync(on, recurse=False)
            elif isinstance(part, DistributedDataParallel):
                part.require_backward_grad_sync = on
            else:
                part.set_requires_gradient_sync(on)  # type: ignore[operator]

    def _parts(self) -> Iterator[nn.Module]:
        return (part for reference in self._synchronised if (part := reference()) is not None)


class _ShowPartsAfterStep:
    """Lets no forward use whole parameters from before the step, which a forward without a backward leaves there."""

    def __init__(self, records: Iterable[_Parallelized]) -> None:
        self._records = {id(record): record for record in records}

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for record in self._records.values():
            record.show_parts()


class _SyncControl(_BackwardSyncControl):
    def __init__(self, parallelized: MutableMapping[nn.Module, _Parallelized]) -> None:
        self._parallelized = parallelized

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        if not enabled:
            return _NO_CONTEXT
        record = self._parallelized.get(uncompiled(module))
        if record is None:
            raise TypeError(
                f"`no_backward_sync` needs the module that `setup_module` returned, but got {type(module).__name__}. "
                "Pass the result of `fabric.setup_module(...)`."
            )
        return _NoSync(record)


class _NoSync(AbstractContextManager[None]):
    """Leaves parameters split between micro-batches, as they are between steps: memory comes first."""

    def __init__(self, record: _Parallelized) -> None:
        self._record = record

    def __enter__(self) -> None:
        self._before = self._record.synchronises
        self._record.synchronise(False)

    def __exit__(self, *error: object) -> None:
        self._record.synchronise(self._before)


# ---- what `parallelize_fn` returns -----------------------------------------------------------------------------------


def _check_parallelized(parallelized: Any, module: nn.Module) -> None:
    if not isinstance(parallelized, nn.Module):
        raise TypeError(
            f"`parallelize_fn` must return the module, but it returned {parallelized!r}. End it with `return module`."
        )
    if any(isinstance(part, FullyShardedDataParallel) for part in parallelized.modules()):
        raise TypeError(
            "`parallelize_fn` wraps with `FullyShardedDataParallel`, which does not go together with a device mesh of "
            "this strategy. Use `torch.distributed.fsdp.fully_shard` in it, or FSDPStrategy without a function."
        )
    if not any(part is module for part in parallelized.modules()):
        raise TypeError(
            f"`parallelize_fn` returned another {type(parallelized).__name__}, so {type(module).__name__}, which was "
            "set up, would not be trained. Change the module in place, or return one that has it inside."
        )


def _check_nothing_gets_lost(parallelized: nn.Module, module: nn.Module, shapes: Mapping[str, torch.Size]) -> None:
    by_ddp = {
        parameter
        for part in parallelized.modules()
        if isinstance(part, (DistributedDataParallel, ReplicatedModule))
        for parameter in part.parameters()
    }
    lost = [
        name
        for name, parameter in module.named_parameters()
        if parameter in by_ddp and (isinstance(parameter, DTensor) or parameter.shape != shapes.get(name))
    ]
    if lost:
        raise TypeError(
            f"`parallelize_fn` splits parameters ({', '.join(map(repr, lost[:10]))}) and then replicates the module "
            "with `DistributedDataParallel`, in the first forward of which torch takes them out of the module: they "
            'would be in no checkpoint. Use `fully_shard(module, mesh=device_mesh["data_parallel"])` in its place.'
        )


def _check_dtypes_of_units(parallelized: nn.Module, module: nn.Module) -> None:
    """What one `fully_shard` gathers has one dtype, and what is kept in 32 bit is not cast."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    for group in (group for part in parallelized.modules() if isinstance(part, FSDPModule) for group in _groups(part)):
        named = [(names.get(held.sharded_param, "a parameter"), held) for held in group.fsdp_params]
        own = {held.sharded_param.dtype: name for name, held in named if held.sharded_param.requires_grad}
        if len(own) > 1:
            found = ", ".join(f"{name!r} is {dtype}" for dtype, name in own.items())
            raise ValueError(
                f"What one `fully_shard` gathers needs one dtype, but {found}. In `parallelize_fn`, call "
                "`fully_shard` on the modules of `keep_fp32` first, each on its own."
            )
        casts_to = group.mp_policy.param_dtype
        kept = [name for name, held in named if is_kept(held._module_info.module)]
        if kept and casts_to not in (None, torch.float32):
            raise ValueError(
                f"{kept[0]!r} is kept in 32 bit, but its `fully_shard` has param_dtype={casts_to}. Leave `mp_policy` "
                "out there."
            )


def _check_gradients_are_averaged(module: nn.Module, data_parallel: DeviceMesh) -> None:
    if data_parallel.size() == 1:
        return
    replicas = set(data_parallel.mesh.flatten().tolist())
    averaged = set(_averaged_by_ddp(module, replicas))
    alone = [
        name
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and parameter not in averaged and not _is_averaged(parameter, replicas)
    ]
    if alone:
        shown = ", ".join(map(repr, alone[:10])) + (f" and {len(alone) - 10} more" if alone[10:] else "")
        raise RuntimeError(
            f"data_parallel_size is {data_parallel.size()}, but nothing averages the gradients of these parameters "
            f"over the data-parallel ranks, so each would train a model of its own: {shown}. In `parallelize_fn`, "
            'apply `fully_shard(module, mesh=device_mesh["data_parallel"])` last, freeze them, or register a hook on '
            "each (`register_post_accumulate_grad_hook`) that averages its gradient."
        )


def _is_averaged(parameter: nn.Parameter, replicas: set[int]) -> bool:
    if parameter._post_accumulate_grad_hooks or parameter._backward_hooks:
        return True  # by the user
    return isinstance(parameter, DTensor) and replicas <= set(parameter.device_mesh.mesh.flatten().tolist())


def _held_by_ddp(module: nn.Module) -> Iterator[tuple[Tensor, Holding]]:
    """What is held of parameters that ``DistributedDataParallel`` or ``replicate`` averages the gradients of."""
    for part in module.modules():
        if isinstance(part, DistributedDataParallel):
            for name, parameter in part.module.named_parameters():
                yield parameter, holding_in(part, name, parameter)
        elif isinstance(part, ReplicatedModule):
            for name, parameter in part.named_parameters():
                yield parameter, Holding.all_of(name, parameter, "replicated", "averaged over the replicas")


def _averaged_by_ddp(module: nn.Module, replicas: set[int]) -> Iterator[nn.Parameter]:
    for part in module.modules():
        if isinstance(part, ReplicatedModule):
            yield from part.parameters()
        elif isinstance(part, DistributedDataParallel) and replicas <= _ranks_of(part):
            named = part.module.named_parameters()
            yield from (parameter for name, parameter in named if name not in part.parameters_to_ignore)


def _ranks_of(module: DistributedDataParallel) -> set[int]:
    return set(dist.get_process_group_ranks(module.process_group))


# ---- loss scaling ----------------------------------------------------------------------------------------------------


class _AgreedGradScaler(GradScaler):
    """Looks at plain and split gradients alike; if any rank finds one that is not finite, every rank skips the step.

    Torch's own refuses a mix of both, and asks the other ranks only if the first gradient is split.
    """

    @classmethod
    def like(cls, scaler: GradScaler, device: str) -> "_AgreedGradScaler":
        own = cls(device, enabled=scaler.is_enabled())
        if scaler.is_enabled():
            own.load_state_dict(scaler.state_dict())
        return own

    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        """Collective: divide the gradients in place; return per device whether a step is to be skipped, as 0 or 1."""
        found = {found_inf.device: found_inf}
        for (device, dtype), grads in _local_gradients(optimizer).items():
            if dtype is torch.float16 and not allow_fp16:
                raise ValueError("Attempting to unscale FP16 gradients.")
            on_device = found.setdefault(device, torch.zeros_like(found_inf, device=device))
            torch._amp_foreach_non_finite_check_and_unscale_(grads, on_device, inv_scale.to(device))
        for other in found.values():
            found_inf.copy_(torch.maximum(found_inf, other.to(found_inf.device)))
        dist.all_reduce(found_inf, dist.ReduceOp.MAX)
        for other in found.values():
            other.copy_(found_inf)
        return found


def _local_gradients(optimizer: Optimizer) -> dict[tuple[torch.device, torch.dtype], list[Tensor]]:
    gradients: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            summed = _summed(parameter.grad)
            if summed is not parameter.grad:
                parameter.grad = summed
            part = local_tensor(summed)
            part = part._values() if part.is_sparse else part
            gradients.setdefault((part.device, part.dtype), []).append(part)
    return gradients
