"""Replicate the module on every rank; average gradients in backward.    torch: DistributedDataParallel"""

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning.fabric.accelerators.accelerator import Accelerator
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.plugins.precision.precision import Precision
from lightning.fabric.strategies._holding import WHOLE, Holding, averaged, copy_on_each, ranks
from lightning.fabric.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.fabric.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.fabric.strategies.parallel import ParallelStrategy
from lightning.fabric.strategies.strategy import _NO_CONTEXT, _BackwardSyncControl
from lightning.fabric.utilities.compilation import uncompiled
from lightning.fabric.utilities.text import did_you_mean

_StartMethod = Literal["popen", "spawn", "fork", "forkserver"]
_DECIDED_HERE = ("self", "module", "device_ids", "output_device")
_COMM_KEYWORDS = ("ddp_comm_state", "ddp_comm_hook", "ddp_comm_wrapper")


@dataclass(frozen=True)
class DDPOptions:
    """What the user wants of ``DistributedDataParallel``, with every keyword known to be one.

    ``comm_hook(state, bucket)`` takes the place of averaging a bucket of gradients; ``comm_wrapper(hook)`` returns the
    hook to use instead, as torch's ``fp16_compress_wrapper`` does.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    comm_state: Any = None
    comm_hook: Callable[..., Any] | None = None
    comm_wrapper: Callable[..., Any] | None = None

    @classmethod
    def from_keywords(cls, keywords: Mapping[str, Any]) -> "DDPOptions":
        """Sort ``keywords`` into the record; one that DDP does not have raises ``TypeError``."""
        known = inspect.signature(DistributedDataParallel.__init__).parameters.keys() - set(_DECIDED_HERE)
        for name in keywords:
            if name not in known and name not in _COMM_KEYWORDS:
                raise TypeError(_unknown_keyword(name, [*known, *_COMM_KEYWORDS]))
        options = {name: value for name, value in keywords.items() if name in known}
        comm = {name.removeprefix("ddp_"): keywords[name] for name in _COMM_KEYWORDS if name in keywords}
        if comm.get("comm_hook") is None and any(value is not None for value in comm.values()):
            raise TypeError(
                f"{sorted(keywords.keys() & set(_COMM_KEYWORDS))} do nothing without a hook. Pass `ddp_comm_hook=` too."
            )
        return cls(options, **comm)

    def register_hook(self, module: DistributedDataParallel) -> None:
        """Let the hook, if there is one, reduce the gradients of ``module``."""
        if self.comm_hook is None:
            return
        hook = self.comm_hook if self.comm_wrapper is None else self.comm_wrapper(self.comm_hook)
        module.register_comm_hook(state=self.comm_state, hook=_accepted_on_every_backend(hook))


def _unknown_keyword(name: str, known: list[str]) -> str:
    if name in _DECIDED_HERE:
        return f"`{name}` cannot be passed to DDPStrategy: it follows from `devices`. Leave it out."
    return (
        f"DistributedDataParallel has no option {name!r}.{did_you_mean(name, known)} Known: {', '.join(sorted(known))}."
    )


def _accepted_on_every_backend(hook: Callable[..., Any]) -> Callable[..., Any]:
    # DDP refuses torch's own bf16 hooks, by their names, unless there is NCCL; gloo averages bf16 as well
    if not getattr(hook, "__name__", "").startswith("bf16_compress"):
        return hook

    def compress_to_bf16(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        return hook(state, bucket)

    compress_to_bf16.__qualname__ = hook.__qualname__  # by which `Fabric.explain` calls it
    return compress_to_bf16


class DDPStrategy(ParallelStrategy):
    """A replica of the module per process; gradients are averaged over the processes in backward.

    Args:
        accelerator: kind of device; None: Fabric chooses.
        parallel_devices: the devices of this machine; None: Fabric chooses.
        cluster_environment: owner of ranks and addresses; None: detected.
        checkpoint_io: reads and writes checkpoint files.
        precision: dtypes and loss scaling.
        process_group_backend: None: nccl on CUDA, gloo on CPU.
        timeout: how long a collective waits for the other processes.
        start_method: how processes are started: ``popen`` runs the script again; ``spawn``, ``fork``
            and ``forkserver`` run the function given to ``fabric.launch``.
        kwargs: options of ``torch.nn.parallel.DistributedDataParallel``; and ``ddp_comm_hook``, ``ddp_comm_state``,
            ``ddp_comm_wrapper`` for a communication hook.

    """

    runs_on: ClassVar[frozenset[str] | None] = frozenset({"cpu", "cuda"})

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(minutes=30),
        start_method: _StartMethod = "popen",
        **kwargs: Any,
    ) -> None:
        super().__init__(accelerator, parallel_devices, cluster_environment, checkpoint_io, precision)
        if start_method not in get_args(_StartMethod):
            raise ValueError(f"start_method must be one of {get_args(_StartMethod)}, but got {start_method!r}.")
        self.start_method: _StartMethod = start_method
        self._process_group_backend = process_group_backend
        self._timeout = timeout
        self._ddp = DDPOptions.from_keywords(kwargs)
        self._backward_sync_control = _DDPBackwardSync()

    @property
    def process_group_backend(self) -> str | None:
        """Name of the backend that moves data between ranks; None: by the device."""
        return self._process_group_backend

    # -- processes

    def _configure_launcher(self) -> None:
        if self.cluster_environment is None:
            raise RuntimeError(f"{type(self).__name__} needs its cluster environment before a launcher can be chosen.")
        if self.start_method == "popen":
            self._launcher = _SubprocessScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes)
        else:
            self._launcher = _MultiProcessingLauncher(self.cluster_environment, self.num_processes, self.start_method)

    def setup_environment(self) -> None:
        self._join_world(self._process_group_backend, self._timeout)

    # -- objects

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Return ``module`` in ``DistributedDataParallel``, with rank 0's weights everywhere.

        A module in which nothing is trained only gets the weights: it has no gradients to average. Freezing
        and unfreezing of parameters comes before.
        """
        self._need_group("setup_module")
        if not any(parameter.requires_grad for parameter in module.parameters()):
            self._copy_from_rank_zero(module)
            return module
        on_root_device = all(parameter.device == self.root_device for parameter in module.parameters())
        device_ids = [self.root_device.index] if self.root_device.type != "cpu" and on_root_device else None
        wrapped = DistributedDataParallel(module, device_ids=device_ids, **self._ddp.options)
        self._ddp.register_hook(wrapped)
        return wrapped

    def _copy_from_rank_zero(self, module: nn.Module) -> None:
        if not self._ddp.options.get("init_sync", True):
            return
        group = self._ddp.options.get("process_group")
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), 0, group=group)

    def _module_with_state(self, module: nn.Module) -> nn.Module:
        return module.module if isinstance(module, DistributedDataParallel) else module

    # -- what was done

    def holdings(self, module: nn.Module, forward_module: nn.Module) -> list[Holding]:
        named = module.named_parameters(remove_duplicate=False)
        if not isinstance(forward_module, DistributedDataParallel):  # nothing is trained
            return [Holding.all_of(name, parameter, copy_on_each(self.world_size)) for name, parameter in named]
        return [holding_in(forward_module, name, parameter) for name, parameter in named]

    def remarks(self) -> list[str]:
        options = ", ".join(f"{name}={value!r}" for name, value in self._ddp.options.items())
        return super().remarks() + ([f"DistributedDataParallel has the options {options}."] if options else [])


def holding_in(replicated: DistributedDataParallel, name: str, parameter: Tensor) -> Holding:
    """What a rank holds of a parameter of the module inside ``replicated``, under its ``name`` there."""
    number = dist.get_world_size(replicated.process_group)
    if name in replicated.parameters_to_ignore:
        return Holding.all_of(name, parameter, WHOLE if number == 1 else f"this rank's own, unlike on {ranks(number)}")
    return Holding.all_of(name, parameter, copy_on_each(number), _way_of_gradients(replicated, number, parameter))


def _way_of_gradients(replicated: DistributedDataParallel, number: int, parameter: Tensor) -> str:
    hooks = [getattr(hook, "__qualname__", type(hook).__name__) for hook, _ in replicated._comm_hooks]
    if hooks:
        return f"combined over {ranks(number)} by {hooks[-1]}"
    mixed = replicated.mixed_precision
    dtype = None if mixed is None else mixed.reduce_dtype or mixed.param_dtype
    return averaged(number, dtype or parameter.dtype)


class _DDPBackwardSync(_BackwardSyncControl):
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        if not enabled:
            return _NO_CONTEXT
        if not isinstance(module, DistributedDataParallel):
            module = uncompiled(module)  # compiled on the outside
        if isinstance(module, DistributedDataParallel):
            return _NoSync(module)
        if any(parameter.requires_grad for parameter in module.parameters()):
            raise TypeError(
                f"`no_backward_sync` needs the module that `setup_module` returned, but got {type(module).__name__}. "
                "Pass the result of `fabric.setup(...)`."
            )
        return _NO_CONTEXT  # nothing is trained, see DDPStrategy.setup_module


class _NoSync(AbstractContextManager[None]):
    """``DistributedDataParallel.no_sync`` at a tenth of its cost, for it is entered in every step."""

    def __init__(self, module: DistributedDataParallel) -> None:
        self._attributes = vars(module)  # setting an attribute of a module takes microseconds

    def __enter__(self) -> None:
        self._before = self._attributes["require_backward_grad_sync"]
        self._attributes["require_backward_grad_sync"] = False

    def __exit__(self, *error: object) -> None:
        self._attributes["require_backward_grad_sync"] = self._before
