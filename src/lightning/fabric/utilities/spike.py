"""A callback that stops training when the loss jumps, and writes down which batches to skip next time."""

import json
import math
from collections import deque
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from lightning.fabric.utilities.types import _PATH


class _Fabric(Protocol):
    """What :class:`SpikeDetection` needs of a Fabric object."""

    @property
    def strategy(self) -> Any: ...

    @property
    def is_global_zero(self) -> bool: ...


class TrainingSpikeException(Exception):
    """The loss has jumped at batch ``batch_idx``; raised on all ranks."""

    def __init__(self, batch_idx: int, *args: Any) -> None:
        super().__init__(f"The loss jumped at batch {batch_idx}.", *args)
        self.batch_idx = batch_idx


class SpikeDetection:
    """Compares each loss with the mean of the last ones, on every rank; a spike on any rank stops all of them.

    Call ``fabric.call("on_train_batch_end", fabric, loss, batch, batch_idx)`` after each batch, on all ranks. At a
    spike, rank 0 adds this batch and the one before it to the file of batches to skip, and all ranks raise
    :class:`TrainingSpikeException`: go back to a checkpoint and leave those batches out.

    Args:
        mode: ``"min"``: a value above the mean is bad; ``"max"``: one below it.
        window: number of values in the mean.
        warmup: number of first batches that are never a spike.
        atol: a spike differs from the mean by at least this; ``None``: any difference.
        rtol: a spike differs from the mean by at least this times the mean; ``None``: any difference.
        exclude_batches_path: a JSON file, or a folder for ``skip_batches.json``; ``None``: the working directory.
        finite_only: a value that is not finite is a spike; ``False``: it is passed over.
    """

    def __init__(
        self,
        mode: Literal["min", "max"] = "min",
        window: int = 10,
        warmup: int = 1,
        atol: float | None = None,
        rtol: float | None = 2.0,
        exclude_batches_path: _PATH | None = None,
        finite_only: bool = True,
    ) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"`mode` must be 'min' or 'max', but got {mode!r}.")
        self.mode = mode
        self.warmup = warmup
        self.atol = atol
        self.rtol = rtol
        self.finite_only = finite_only
        path = Path(exclude_batches_path or ".")
        self.exclude_batches_path = path if path.suffix == ".json" else path / "skip_batches.json"
        self.bad_batches: list[int] = []
        self.last_batch_idx: int | None = None
        self.values: deque[float] = deque(maxlen=window)

    @torch.no_grad()
    def on_train_batch_end(self, fabric: _Fabric, loss: Any, batch: Any, batch_idx: int) -> None:
        """Collective: look at the loss (a number or a tensor of one element) of the batch ``batch_idx``."""
        value = float(loss)
        spike = batch_idx >= self.warmup and self._is_spike(value)
        if fabric.strategy.reduce_boolean_decision(spike, all=False):
            self._stop(fabric, batch_idx)
        self.last_batch_idx = batch_idx
        if math.isfinite(value):
            self.values.append(value)

    def _is_spike(self, value: float) -> bool:
        if not math.isfinite(value):
            return self.finite_only
        if not self.values:
            return False
        mean = sum(self.values) / len(self.values)
        worse = value > mean if self.mode == "min" else value < mean
        distance = abs(value - mean)
        return (
            worse
            and (self.atol is None or distance >= abs(self.atol))
            and (self.rtol is None or distance >= abs(self.rtol * mean))
        )

    def _stop(self, fabric: _Fabric, batch_idx: int) -> None:
        found = [batch_idx] if self.last_batch_idx is None else [self.last_batch_idx, batch_idx]
        self.bad_batches.extend(index for index in found if index not in self.bad_batches)
        if fabric.is_global_zero:
            self.exclude_batches_path.parent.mkdir(parents=True, exist_ok=True)
            self.exclude_batches_path.write_text(json.dumps(self.bad_batches, indent=4))
        fabric.strategy.barrier()
        raise TrainingSpikeException(batch_idx)

    def state_dict(self) -> dict[str, Any]:
        """Return the recent values and the batches to skip."""
        return {
            "values": list(self.values),
            "bad_batches": list(self.bad_batches),
            "last_batch_idx": self.last_batch_idx,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self.values.clear()
        self.values.extend(state_dict["values"])
        self.bad_batches[:] = state_dict["bad_batches"]
        self.last_batch_idx = state_dict["last_batch_idx"]
