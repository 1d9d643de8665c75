"""One process that splits each batch over several GPUs.    torch: DataParallel"""

import types
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn
from torch.nn.parallel import DataParallel

from lightning.fabric.accelerators.accelerator import Accelerator
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.plugins.precision.precision import Precision
from lightning.fabric.strategies.parallel import ParallelStrategy, World
from lightning.fabric.strategies.strategy import Strategy, _OneProcess
from lightning.fabric.utilities.compilation import is_compiled, uncompiled

_TModule = TypeVar("_TModule", bound=nn.Module)


class DataParallelStrategy(_OneProcess, ParallelStrategy):
    """Each forward copies the module to every GPU and gives each a part of the batch (its first dimension).

    There is one process, so every rank is 0, and collectives have nothing to combine. Outputs are joined along their
    first dimension on the first GPU; outputs without dimensions become a vector with one entry per GPU.
    """

    runs_on: ClassVar[frozenset[str] | None] = frozenset({"cpu", "cuda"})

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
    ) -> None:
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            checkpoint_io=checkpoint_io,
            precision=precision,
        )
        self._world = World()

    @property
    def distributed_sampler_kwargs(self) -> None:
        return None

    def setup_environment(self) -> None:
        Strategy.setup_environment(self)

    def setup_module(self, module: nn.Module) -> nn.Module:
        devices = self.parallel_devices or []
        if self.root_device.type != "cpu":
            _refuse_compiled_parts(module)
            return _DataParallel(module, device_ids=devices)
        if len(devices) > 1:
            raise ValueError(
                f"'dp' splits batches over GPUs, but has {len(devices)} CPU devices. Use strategy='ddp', or devices=1."
            )
        return module  # nothing to split over

    def check_one_graph(self, module: nn.Module) -> None:
        if self.root_device.type != "cpu":
            raise ValueError(
                f"{type(module).__name__} was compiled with fullgraph=True, but under 'dp' it is copied in every "
                "forward, which is never in a graph. Use strategy='ddp', or compile without `fullgraph=True`."
            )

    def _module_with_state(self, module: nn.Module) -> nn.Module:
        return module.module if isinstance(module, DataParallel) else module

    def remarks(self) -> list[str]:
        devices = self.parallel_devices or []
        if len(devices) < 2:
            return []
        return [f"Each forward copies the module to {len(devices)} devices, and adds the gradients up on the first."]

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return decision

    def raise_on_all(self, error: BaseException | None, doing: str) -> None:
        Strategy.raise_on_all(self, error, doing)

    def teardown(self) -> None:
        Strategy.teardown(self)


class _DataParallel(DataParallel):
    """Lets a method that was put on an instance (``module.forward = ...``) compute with each replica's own weights.

    Copying a module copies such a method as it is, still bound to the original on the first GPU.
    """

    def replicate(self, module: _TModule, device_ids: Sequence[int | torch.device]) -> list[_TModule]:
        replicas = super().replicate(module, device_ids)
        for replica in replicas:
            _rebind_methods(module, replica)
        return replicas


def _refuse_compiled_parts(module: nn.Module) -> None:
    compiled = sorted({type(uncompiled(part)).__name__ for part in module.modules() if is_compiled(part)})
    if compiled:
        raise ValueError(
            f"{', '.join(compiled)} inside the module is compiled, but 'dp' copies the module for each GPU in every "
            "forward, and compiled copies would compute with the weights of the first GPU. Use strategy='ddp', or "
            "do not compile them."
        )


def _rebind_methods(original: nn.Module, replica: nn.Module) -> None:
    replica_of: dict[int, Any] = {id(a): b for a, b in zip(original.modules(), replica.modules(), strict=True)}
    for part in replica_of.values():
        for name, value in list(vars(part).items()):
            if isinstance(value, types.MethodType) and id(value.__self__) in replica_of:
                vars(part)[name] = types.MethodType(value.__func__, replica_of[id(value.__self__)])
