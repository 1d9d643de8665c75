"""What a DeepSpeed engine has done since its last step, and how it is undone."""

import weakref
from collections.abc import Sequence
from typing import Any


class Window:
    """What has happened in an engine since its last step."""

    def __init__(self, scheduler: Any = None, groups: Sequence[Sequence[Any]] = ()) -> None:
        self.backwards = 0
        self.groups = [list(group) for group in groups]  # the parameters that the optimizer was given
        self._scheduler = scheduler
        self._schedulers_step = getattr(scheduler, "last_epoch", None)

    def may_accumulate(self, engine: Any) -> bool:
        """Whether gradients of another backward add to those that are there."""
        managed = getattr(engine, "managed_gradient_accumulation", None)
        return managed is not None and not managed()

    def check_scheduler(self) -> None:
        """Raise ``RuntimeError`` if somebody else has stepped the scheduler too."""
        if self._schedulers_step is not None and self._scheduler.last_epoch == self._schedulers_step + 1:
            raise RuntimeError(
                f"{type(self._scheduler).__name__} was stepped twice: DeepSpeed's engine steps the scheduler that "
                "`setup` got, after each step of the optimizer. Leave `scheduler.step()` out, or do not pass it to "
                "`setup`."
            )

    def close(self) -> None:
        """The engine has stepped."""
        self.backwards = 0
        self._schedulers_step = getattr(self._scheduler, "last_epoch", None)


def zero_grad(of: "weakref.ref[Any]", window: Window, set_to_none: bool = True) -> None:
    """Let go of all gradients since the engine's last step, wherever it has put them."""
    engine = of()
    if engine is None:
        return
    window.backwards = 0
    engine.zero_grad()
    if not engine.zero_optimization():
        return
    zero = engine.optimizer
    zero.zero_grad(set_to_none=True)
    zero_gradient_buffers(engine)
    if engine.zero_optimization_stage() == 3:
        zero._offload_boundary_param_ids = set()
        zero.averaged_gradients = {}
        return
    zero.micro_step_id = -1  # the next backward starts anew
    if zero.cpu_offload:
        zero._offload_accumulated_param_ids = set()
        zero.reset_cpu_buffers()
    else:
        zero._release_preflattened_grad_buffers()
        for gradients in (zero.averaged_gradients, zero.all_grad_tensors):
            gradients.update(dict.fromkeys(gradients))


def zero_gradient_buffers(engine: Any) -> None:
    """Fill with zeros what only a new gradient overwrites.

    A parameter that no backward reaches would be updated with its gradient of an earlier step otherwise.
    """
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage == 3:
        masters = zero.fp32_partitioned_groups_flat if zero.offload_optimizer else ()
        if zero.grad_partitions_flat_buffer is not None:
            zero.grad_partitions_flat_buffer.zero_()
    else:
        masters = zero.single_partition_of_fp32_groups if stage and zero.cpu_offload else ()
    for master in masters:
        if master.grad is not None:
            master.grad.zero_()
