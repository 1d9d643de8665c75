"""DeepSpeed's configuration: from arguments or a file, completed by what DeepSpeed needs. Pure, without the package."""

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.fabric.utilities.types import _PATH
from lightning.fabric.utilities.warnings import PossibleUserWarning

_CONFIG_VARIABLE = "PL_DEEPSPEED_CONFIG_PATH"


@dataclass(frozen=True)
class ZeroOptions:
    """What the user asks for by arguments of the strategy, in place of a configuration."""

    zero_optimization: bool = True
    stage: int = 2
    offload_optimizer: bool = False
    offload_parameters: bool = False
    offload_params_device: str = "cpu"
    nvme_path: str = "/local_nvme"
    params_buffer_count: int = 5
    params_buffer_size: float = 100_000_000
    max_in_cpu: float = 1_000_000_000
    offload_optimizer_device: str = "cpu"
    optimizer_buffer_count: int = 4
    block_size: int = 1048576
    queue_depth: int = 8
    single_submit: bool = False
    overlap_events: bool = True
    thread_count: int = 1
    pin_memory: bool = False
    sub_group_size: float = 1_000_000_000_000
    contiguous_gradients: bool = True
    overlap_comm: bool = True
    allgather_partitions: bool = True
    reduce_scatter: bool = True
    allgather_bucket_size: float = 200_000_000
    reduce_bucket_size: float = 200_000_000
    zero_allow_untested_optimizer: bool = True
    logging_batch_size_per_gpu: int | None = None
    partition_activations: bool = False
    cpu_checkpointing: bool = False
    contiguous_memory_optimization: bool = False
    synchronize_checkpoint_boundary: bool = False

    def check(self) -> "ZeroOptions":
        """Return the record itself; ``ValueError`` if it asks for what DeepSpeed does not have, or would ignore."""
        if self.stage not in (0, 1, 2, 3):
            raise ValueError(f"stage must be 0, 1, 2 or 3, but got {self.stage!r}.")
        stage = self.stage if self.zero_optimization else 0
        if self.offload_parameters and stage != 3:
            raise ValueError(
                f"offload_parameters=True moves the parameters that stage 3 shares out, but this is stage {stage}. "
                "Set `stage=3`, or leave `offload_parameters` out."
            )
        if self.offload_optimizer and stage == 0:
            raise ValueError("offload_optimizer=True needs ZeRO, which is off. Set `stage` to 1, 2 or 3.")
        for name in ("offload_params_device", "offload_optimizer_device"):
            if getattr(self, name) not in ("cpu", "nvme"):
                raise ValueError(f"{name} must be 'cpu' or 'nvme', but got {getattr(self, name)!r}.")
        return self

    def as_config(self) -> dict[str, Any]:
        """Return the same as a configuration of DeepSpeed; parts that were not asked for are left out of it."""
        config: dict[str, Any] = {"activation_checkpointing": self._pick(*_ACTIVATION_CHECKPOINTING)}
        if self.logging_batch_size_per_gpu is not None:
            config["train_micro_batch_size_per_gpu"] = self.logging_batch_size_per_gpu
        if not self.zero_optimization or self.stage == 0:
            return config
        config["zero_optimization"] = self._zero()
        config["zero_allow_untested_optimizer"] = self.zero_allow_untested_optimizer
        if self.offload_optimizer:
            config["zero_force_ds_cpu_optimizer"] = False  # any optimizer can be offloaded, if more slowly
        if "nvme" in (
            self.offload_optimizer and self.offload_optimizer_device,
            self.offload_parameters and self.offload_params_device,
        ):
            config["aio"] = self._pick("block_size", "queue_depth", "single_submit", "overlap_events", "thread_count")
        return config

    def _zero(self) -> dict[str, Any]:
        zero = self._pick("stage", "contiguous_gradients", "allgather_partitions", "reduce_scatter")
        # at stage 1 gradients are averaged in the step, so that they can accumulate: no backward to overlap with
        zero["overlap_comm"] = self.overlap_comm and self.stage > 1
        for name in ("allgather_bucket_size", "reduce_bucket_size", "sub_group_size"):
            zero[name] = int(getattr(self, name))
        if self.offload_parameters:
            zero["offload_param"] = {
                "device": self.offload_params_device,
                "nvme_path": self.nvme_path,
                "buffer_count": self.params_buffer_count,
                "buffer_size": int(self.params_buffer_size),
                "max_in_cpu": int(self.max_in_cpu),
                "pin_memory": self.pin_memory,
            }
        if self.offload_optimizer:
            zero["offload_optimizer"] = {
                "device": self.offload_optimizer_device,
                "nvme_path": self.nvme_path,
                "buffer_count": self.optimizer_buffer_count,
                "pin_memory": self.pin_memory,
            }
        return zero

    def _pick(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}

    def given(self) -> list[str]:
        """Return what differs from the defaults, as the user would write it."""
        return [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)
            if getattr(self, field.name) != field.default
        ]


_ACTIVATION_CHECKPOINTING = (
    "partition_activations",
    "cpu_checkpointing",
    "contiguous_memory_optimization",
    "synchronize_checkpoint_boundary",
)


@dataclass(frozen=True)
class LossScaling:
    """How the loss is scaled in float16; ``loss_scale=0``: dynamically."""

    loss_scale: float = 0
    initial_scale_power: int = 16
    loss_scale_window: int = 1000
    hysteresis: int = 2
    min_loss_scale: int = 1


def read_config(config: _PATH | Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration given as a dict (a copy) or as the path of a JSON file."""
    if isinstance(config, Mapping):
        return copy.deepcopy(dict(config))
    if not isinstance(config, (str, os.PathLike)):
        raise TypeError(f"`config` must be a dict or the path of a JSON file, but got {config!r}.")
    path = Path(config)
    if not path.is_file():
        raise FileNotFoundError(f"There is no DeepSpeed configuration at {str(path)!r}. Check the path.")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"The DeepSpeed configuration {str(path)!r} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"The DeepSpeed configuration {str(path)!r} must hold an object, but it is {content!r}.")
    return content


def zero_stage(config: Mapping[str, Any]) -> int:
    """Return the ZeRO stage of a configuration; 0: off."""
    return int(block(config, "zero_optimization").get("stage", 0))


def block(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = config.get(name)
    return value if isinstance(value, Mapping) else {}


_LOW_PRECISIONS = {"fp16": "16", "bf16": "bf16"}  # block of the configuration -> what names of precisions begin with


def check_precision(config: Mapping[str, Any], precision: str) -> None:
    """Raise ``ValueError`` if the configuration switches a dtype on or off in contradiction to ``precision``."""
    for name, kind in _LOW_PRECISIONS.items():
        enabled = block(config, name).get("enabled")
        wanted = precision.split("-")[0] == kind
        if isinstance(enabled, bool) and enabled is not wanted:
            suggestion = f"precision='{kind}-mixed'" if enabled else "precision='32-true'"
            raise ValueError(
                f"precision is set twice: the DeepSpeed configuration says {name}.enabled={enabled!r}, but the "
                f"precision is {precision!r}. Pass {suggestion}, or take {name!r} out of the configuration."
            )


def complete(
    config: Mapping[str, Any], precision: str, scaling: LossScaling, can_accumulate: bool = True
) -> dict[str, Any]:
    """Return a copy of ``config`` with what DeepSpeed needs and the user did not say.

    ``can_accumulate``: DeepSpeed can leave it to the caller when gradients have accumulated.
    """
    check_precision(config, precision)
    complete = copy.deepcopy(dict(config))
    if complete.get("train_batch_size") is None:
        # DeepSpeed insists on a number, which it divides its throughput log by and nothing else
        complete.setdefault("train_micro_batch_size_per_gpu", 1)
    complete.setdefault("gradient_clipping", 0.0)  # DeepSpeed's own default is to clip
    if precision.startswith("16"):
        complete["fp16"] = {**vars(scaling), **block(config, "fp16"), "enabled": True}
    elif precision.startswith("bf16"):
        complete["bf16"] = {**block(config, "bf16"), "enabled": True}
    if can_accumulate and accumulation_steps(config) == 1 and not overlaps_at_first_stage(config):
        complete.setdefault("managed_gradient_accumulation", False)
    return complete


def accumulation_steps(config: Mapping[str, Any]) -> int:
    """Return how many steps make one update, where the user leaves the counting to DeepSpeed."""
    return int(config.get("gradient_accumulation_steps") or 1)


def overlaps_at_first_stage(config: Mapping[str, Any]) -> bool:
    return zero_stage(config) < 2 and bool(block(config, "zero_optimization").get("overlap_comm"))


def choose_config(config: _PATH | Mapping[str, Any] | None, options: ZeroOptions) -> dict[str, Any]:
    """The user's configuration, else the one that the environment names, else what the arguments say."""
    if config is None and not (config := os.environ.get(_CONFIG_VARIABLE)):
        return options.check().as_config()
    if given := options.given():
        rank_zero_warn(
            f"The DeepSpeed configuration {config!r} is used as it is, without {', '.join(given)}. "
            "Say all of it in the configuration, or by arguments.",
            category=PossibleUserWarning,
        )
    return read_config(config)
