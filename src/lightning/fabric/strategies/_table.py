"""The strategies by name: what each needs from the machine, known without importing it (or torch)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class StrategyEntry:
    """What a strategy's name stands for, and the facts that decide where it may be used.

    ``target`` is ``"module:Class"``, imported on first use, or the class itself (third parties).
    ``runs_on`` holds names of accelerators; None: any.
    ``start_method`` is how other processes come to be: popen, spawn, fork, forkserver; None: none is started.
    ``multi_process`` False: one process per run; ``many_devices`` False: one device, passed as ``device=``.
    """

    target: str | Callable[..., Any]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    description: str = ""
    runs_on: frozenset[str] | None = None
    start_method: str | None = None
    multi_process: bool = False
    many_devices: bool = False


_DDP = {
    "ddp": ("popen", "started by running the script again"),
    "ddp_spawn": ("spawn", "started as fresh interpreters by multiprocessing"),
    "ddp_fork": ("fork", "forked from this process"),
    "ddp_forkserver": ("forkserver", "forked from a clean server process"),
    "ddp_notebook": ("fork", "forked from this process; the name to use in a notebook"),
}


def _ddp(start_method: str, how: str, find_unused: bool) -> StrategyEntry:
    unused = {"find_unused_parameters": True} if find_unused else {}
    return StrategyEntry(
        "lightning.fabric.strategies.ddp:DDPStrategy",
        kwargs={"start_method": start_method, **unused},
        description=f"One replica per process, gradients averaged in backward; processes {how}"
        + ("; parameters may go unused in a step" if find_unused else ""),
        runs_on=frozenset({"cpu", "cuda"}),
        start_method=start_method,
        multi_process=True,
        many_devices=True,
    )


STRATEGIES: dict[str, StrategyEntry] = {
    "single_device": StrategyEntry(
        "lightning.fabric.strategies.single_device:SingleDeviceStrategy",
        description="One process on one device",
    ),
    "dp": StrategyEntry(
        "lightning.fabric.strategies.dp:DataParallelStrategy",
        description="One process that splits each batch over several GPUs",
        runs_on=frozenset({"cpu", "cuda"}),
        many_devices=True,
    ),
    **{name: _ddp(*how, find_unused=False) for name, how in _DDP.items()},
    **{f"{name}_find_unused_parameters_true": _ddp(*how, find_unused=True) for name, how in _DDP.items()},
}
