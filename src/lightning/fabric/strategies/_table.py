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
    ``precisions`` holds canonical names of what it can compute in; None: any. ``precision`` is the ``"module:Class"``
    that it computes them with, called with the name; None: the ordinary one.
    """

    target: str | Callable[..., Any]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    description: str = ""
    runs_on: frozenset[str] | None = None
    start_method: str | None = None
    multi_process: bool = False
    many_devices: bool = False
    precisions: frozenset[str] | None = None
    precision: str | None = None


_PRECISIONS = "lightning.fabric.plugins.precision"
_CPU_OR_CUDA = frozenset({"cpu", "cuda"})
_TPU = frozenset({"tpu"})
_HALF = frozenset({"32-true", "16-true", "bf16-true"})
_HALF_OR_MIXED = _HALF | {"16-mixed", "bf16-mixed"}

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
        runs_on=_CPU_OR_CUDA,
        start_method=start_method,
        multi_process=True,
        many_devices=True,
    )


def _fsdp(description: str, **kwargs: Any) -> StrategyEntry:
    return StrategyEntry(
        "lightning.fabric.strategies.fsdp:FSDPStrategy",
        kwargs=kwargs,
        description=f"Parameters, gradients and optimizer state shared out over the processes{description}",
        runs_on=_CPU_OR_CUDA,
        start_method="popen",
        multi_process=True,
        many_devices=True,
        precisions=_HALF_OR_MIXED | {"64-true", "float8"},
        precision=f"{_PRECISIONS}.fsdp:FSDPPrecision",
    )


def _deepspeed(description: str, **kwargs: Any) -> StrategyEntry:
    return StrategyEntry(
        "lightning.fabric.strategies.deepspeed:DeepSpeedStrategy",
        kwargs=kwargs,
        description=f"DeepSpeed, ZeRO stage {kwargs.get('stage', 2)}{description}",
        runs_on=_CPU_OR_CUDA,
        start_method="popen",
        multi_process=True,
        many_devices=True,
        precisions=_HALF_OR_MIXED,
        precision=f"{_PRECISIONS}.deepspeed:DeepSpeedPrecision",
    )


def _xla(target: str, description: str, multi_process: bool = True) -> StrategyEntry:
    return StrategyEntry(
        f"lightning.fabric.strategies.{target}",
        description=description,
        runs_on=_TPU,
        start_method="xla" if multi_process else None,
        multi_process=multi_process,
        many_devices=multi_process,
        precisions=_HALF,
        precision=f"{_PRECISIONS}.xla:XLAPrecision",
    )


_OFFLOAD = {"offload_optimizer": True}
_OFFLOAD_ALL = {**_OFFLOAD, "offload_parameters": True}
_NVME = {"remote_device": "nvme", "offload_params_device": "nvme", "offload_optimizer_device": "nvme"}

STRATEGIES: dict[str, StrategyEntry] = {
    "single_device": StrategyEntry(
        "lightning.fabric.strategies.single_device:SingleDeviceStrategy",
        description="One process on one device",
        runs_on=_CPU_OR_CUDA | {"mps"},
    ),
    "dp": StrategyEntry(
        "lightning.fabric.strategies.dp:DataParallelStrategy",
        description="One process that splits each batch over several GPUs",
        runs_on=_CPU_OR_CUDA,
        many_devices=True,
    ),
    **{name: _ddp(*how, find_unused=False) for name, how in _DDP.items()},
    **{f"{name}_find_unused_parameters_true": _ddp(*how, find_unused=True) for name, how in _DDP.items()},
    "fsdp": _fsdp(""),
    "fsdp_cpu_offload": _fsdp("; they wait in CPU memory", cpu_offload=True),
    "deepspeed": _deepspeed(""),
    "deepspeed_stage_1": _deepspeed(": optimizer state is shared out", stage=1),
    "deepspeed_stage_2": _deepspeed(": gradients too", stage=2),
    "deepspeed_stage_3": _deepspeed(": parameters too", stage=3),
    "deepspeed_stage_1_offload": _deepspeed("; optimizer state in CPU memory", stage=1, **_OFFLOAD),
    "deepspeed_stage_2_offload": _deepspeed("; optimizer state in CPU memory", stage=2, **_OFFLOAD),
    "deepspeed_stage_3_offload": _deepspeed("; all in CPU memory", stage=3, **_OFFLOAD_ALL),
    "deepspeed_stage_3_offload_nvme": _deepspeed("; all on NVMe", stage=3, **_OFFLOAD_ALL, **_NVME),
    "xla": _xla("xla:XLAStrategy", "One replica per TPU core, gradients averaged before each step"),
    "xla_fsdp": _xla("xla_fsdp:XLAFSDPStrategy", "Parameters, gradients and optimizer state shared out over TPU cores"),
    "single_xla": _xla("single_xla:SingleDeviceXLAStrategy", "One process on one TPU core", multi_process=False),
}

UNNAMED: tuple[StrategyEntry, ...] = (
    StrategyEntry(
        "lightning.fabric.strategies.model_parallel:ModelParallelStrategy",
        description="Layers split over processes as a function of the user's says (tensor parallel, FSDP, or both)",
        runs_on=_CPU_OR_CUDA,
        start_method="popen",
        multi_process=True,
        many_devices=True,
        precisions=_HALF_OR_MIXED | {"64-true", "float8"},
    ),
)
"""Facts of strategies that have no name, because they cannot be made without arguments."""
