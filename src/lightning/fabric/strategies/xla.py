"""Replicate the module on every XLA device; average gradients before each step.    torch_xla: xm.reduce_gradients"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning.fabric.accelerators.accelerator import Accelerator
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.plugins.precision.precision import Precision
from lightning.fabric.strategies._holding import Holding, averaged, copy_on_each
from lightning.fabric.strategies._xla import XLARanks


class XLAStrategy(XLARanks):
    """A replica of the module per TPU core; gradients are averaged over the cores when they are clipped or stepped.

    Module and optimizers are set up together: on the way to the device the parameters are made anew.

    Args:
        accelerator: kind of device; None: Fabric chooses.
        parallel_devices: the devices of this machine; None: Fabric chooses.
        checkpoint_io: reads and writes checkpoint files.
        precision: dtype of weights and computation.
        sync_module_states: give every rank the weights of rank 0 at set-up.

    """

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
        sync_module_states: bool = True,
    ) -> None:
        super().__init__(accelerator, parallel_devices, checkpoint_io, precision)
        self._sync_module_states = sync_module_states
        self._averaged: dict[Optimizer, list[tuple[Tensor, int]]] = {}  # gradients, with their versions

    # -- objects

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Return ``module`` itself, with rank 0's weights everywhere."""
        self._need_group("setup_module")
        if self._sync_module_states and self.world_size > 1:
            self._copy_from_rank_zero([*module.parameters(), *module.buffers()])
        return module

    @torch.no_grad()
    def _copy_from_rank_zero(self, tensors: list[Tensor]) -> None:
        # not `xm.broadcast_master_param`: it multiplies by zero elsewhere, where there may be infinities
        import torch_xla
        import torch_xla.core.xla_model as xm

        is_here = torch.tensor([self.global_rank == 0]).to(self.root_device)
        for tensor in tensors:
            summable = tensor.to(self.root_device, torch.uint8 if tensor.dtype is torch.bool else tensor.dtype)
            summed = self._reduced(torch.where(is_here, summable, torch.zeros_like(summable)), xm.REDUCE_SUM)
            tensor.copy_(summed.reshape(tensor.shape))
        torch_xla.sync()

    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Optimizer], scheduler: Any = None
    ) -> tuple[nn.Module, list[Optimizer], Any]:
        return self.setup_module(module), optimizers, scheduler

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        raise RuntimeError(
            f"{type(self).__name__} sets up a model together with its optimizers, because moving the model makes new "
            "parameters. Call `fabric.setup(model, optimizer)`."
        )

    # -- what was done

    def holdings(self, module: nn.Module, forward_module: nn.Module) -> list[Holding]:
        number = self.world_size
        when = "" if number == 1 else f"{averaged(number)} when they are clipped or stepped"
        named = module.named_parameters(remove_duplicate=False)
        return [Holding.all_of(name, parameter, copy_on_each(number), when) for name, parameter in named]

    # -- the step

    def clip_gradients_norm(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        """Collective. Gradients are averaged first: it is their mean that is clipped."""
        self._average(optimizer)
        norm = super().clip_gradients_norm(module, optimizer, max_norm, norm_type, error_if_nonfinite)
        self._remember_averaged(optimizer)
        return norm

    def clip_gradients_value(self, module: nn.Module, optimizer: Optimizer, clip_val: float) -> None:
        """Collective. Gradients are averaged first: it is their mean that is clipped."""
        self._average(optimizer)
        super().clip_gradients_value(module, optimizer, clip_val)
        self._remember_averaged(optimizer)

    def optimizer_step(self, optimizer: Optimizer, **kwargs: Any) -> Any:
        """Collective: average the gradients, unless clipping has done it, and step; then run what was recorded."""
        closure = kwargs.get("closure")
        if closure is None:
            self._average(optimizer)
        else:
            kwargs["closure"] = self._averaging_after(closure, optimizer)
        return super().optimizer_step(optimizer, **kwargs)

    def _averaging_after(self, closure: Callable[[], Any], optimizer: Optimizer) -> Callable[[], Any]:
        def compute() -> Any:
            loss = closure()
            self._average(optimizer)
            return loss

        return compute

    def _average(self, optimizer: Optimizer) -> None:
        import torch_xla.core.xla_model as xm

        if not _are_same(self._averaged.pop(optimizer, None), self._gradients(optimizer)):
            xm.reduce_gradients(optimizer)

    def _remember_averaged(self, optimizer: Optimizer) -> None:
        self._averaged[optimizer] = self._gradients(optimizer)

    def _gradients(self, optimizer: Optimizer) -> list[tuple[Tensor, int]]:
        gradients = (parameter.grad for parameter in self.precision.main_params(optimizer))
        return [(gradient, gradient._version) for gradient in gradients if gradient is not None]


def _are_same(before: list[tuple[Tensor, int]] | None, now: list[tuple[Tensor, int]]) -> bool:
    """Whether the same gradients are there, and nothing has changed them."""
    if before is None or len(before) != len(now):
        return False
    return all(
        old is new and old_version == version for (old, old_version), (new, version) in zip(before, now, strict=True)
    )
