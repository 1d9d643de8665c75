"""From the arguments of ``Fabric`` to its parts: collect what they claim, resolve, build."""

import os
from dataclasses import replace
from typing import Any, TypeAlias

import torch

from lightning.fabric._plan import Flags, Hardware, Machine, Part, Plan, StrategyObject, resolve
from lightning.fabric.accelerators.accelerator import Accelerator
from lightning.fabric.accelerators.registry import ACCELERATOR_REGISTRY
from lightning.fabric.plugins.environments._detection import build_environment
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.plugins.precision._table import PRECISIONS, build_precision
from lightning.fabric.plugins.precision.precision import _PRECISION_INPUT, Precision
from lightning.fabric.strategies.parallel import ParallelStrategy
from lightning.fabric.strategies.registry import STRATEGY_REGISTRY, entry_of
from lightning.fabric.strategies.single_device import SingleDeviceStrategy
from lightning.fabric.strategies.strategy import Strategy
from lightning.fabric.utilities.rank_zero import rank_zero_warn

__all__ = ["_PLUGIN_INPUT", "_PRECISION_INPUT", "_Connector", "_is_using_cli"]

_PLUGIN_INPUT: TypeAlias = Precision | ClusterEnvironment | CheckpointIO

_KINDS: dict[str, type] = {
    "precision": Precision,
    "cluster environment": ClusterEnvironment,
    "checkpoint IO": CheckpointIO,
}


class _Connector:
    """Chooses the parts that the arguments of ``Fabric`` ask for, and puts them together in :attr:`strategy`.

    No process or group is made and no device touched. ``print(connector.plan)`` says what was chosen, and why.
    """

    def __init__(
        self,
        accelerator: str | Accelerator = "auto",
        strategy: str | Strategy = "auto",
        devices: list[int] | str | int = "auto",
        num_nodes: int = 1,
        precision: _PRECISION_INPUT | None = None,
        plugins: _PLUGIN_INPUT | list[_PLUGIN_INPUT] | None = None,
    ) -> None:
        listed = _listed(plugins)
        flags = Flags(
            accelerator=_hardware(accelerator) if isinstance(accelerator, Accelerator) else accelerator,
            strategy=_strategy_object(strategy) if isinstance(strategy, Strategy) else strategy,
            devices=devices,
            num_nodes=num_nodes,
            precision=precision,
            plugins=tuple(map(_part, listed)),
        )
        self.plan = resolve(flags, Machine.here())
        for warning in self.plan.warnings:
            rank_zero_warn(warning)
        given = strategy if isinstance(strategy, Strategy) else None
        self.accelerator = _build_accelerator(self.plan, accelerator, given)
        self.strategy = _build(self.plan, self.accelerator, given, {_kind(plugin): plugin for plugin in listed})

    @property
    def precision(self) -> Precision:
        return self.strategy.precision

    @property
    def checkpoint_io(self) -> CheckpointIO:
        return self.strategy.checkpoint_io

    @property
    def cluster_environment(self) -> ClusterEnvironment | None:
        """Owner of ranks and addresses; None for a strategy that is always one process."""
        return getattr(self.strategy, "cluster_environment", None)


# ---- what objects claim ------------------------------------------------------------------------------------------


def _listed(plugins: Any) -> list[Any]:
    if plugins is None:
        return []
    return list(plugins) if isinstance(plugins, (list, tuple, set)) else [plugins]


def _kind(plugin: Any) -> str | None:
    return next((kind for kind, cls in _KINDS.items() if isinstance(plugin, cls)), None)


def _part(plugin: Any) -> Part:
    kind = _kind(plugin)
    return Part(repr(plugin) if kind is None else type(plugin).__name__, kind)


def _hardware(accelerator: Accelerator) -> Hardware:
    return Hardware.of(accelerator.name(), accelerator, label=f"{type(accelerator).__name__}()")


def _strategy_object(strategy: Strategy) -> StrategyObject:
    carried = [strategy._precision, strategy._checkpoint_io, getattr(strategy, "cluster_environment", None)]
    return StrategyObject(
        label=f"{type(strategy).__name__}(...)",
        entry=replace(entry_of(type(strategy)), start_method=strategy.start_method),
        accelerator=None if strategy.accelerator is None else _hardware(strategy.accelerator),
        devices=tuple(map(str, _own_devices(strategy))),
        parts=tuple(_part(part) for part in carried if part is not None),
    )


def _own_devices(strategy: Strategy) -> list[torch.device]:
    if isinstance(strategy, SingleDeviceStrategy):
        return [strategy.root_device]
    return strategy.parallel_devices or [] if isinstance(strategy, ParallelStrategy) else []


# ---- from the plan to objects ------------------------------------------------------------------------------------


def _build_accelerator(plan: Plan, accelerator: Any, given: Strategy | None) -> Accelerator:
    if isinstance(accelerator, Accelerator):
        return accelerator
    own = given.accelerator if given is not None else None
    return own or ACCELERATOR_REGISTRY.get(plan.accelerator.value)


def _build(plan: Plan, accelerator: Accelerator, given: Strategy | None, plugins: dict[str | None, Any]) -> Strategy:
    """Return the strategy with all its parts: those it brings along, then the user's, then new ones."""
    own_devices = _own_devices(given) if given is not None else []
    devices = own_devices or accelerator.get_parallel_devices(plan.devices.value)
    built = given if given is not None else _build_strategy(plan.strategy.value, devices)

    built.accelerator = accelerator
    if "precision" in plugins:
        built.precision = plugins["precision"]
    elif plan.precision.value in PRECISIONS and (built._precision is None or plan.precision.because != "default"):
        entry = entry_of(type(given)) if given is not None else STRATEGY_REGISTRY.entry(plan.strategy.value)
        built.precision = build_precision(plan.precision.value, devices[0].type, entry.precision)
    _check_engine(built)
    built.precision.computes_on(devices[0].type)
    if "checkpoint IO" in plugins:
        built.checkpoint_io = plugins["checkpoint IO"]
    if isinstance(built, ParallelStrategy):
        built.parallel_devices = devices
        built.num_nodes = plan.num_nodes.value
        environment = built.cluster_environment or plugins.get("cluster environment")
        built.cluster_environment = environment or build_environment(plan.environment.value)
        built.cluster_environment.validate_settings(plan.num_processes, plan.num_nodes.value)
    built._configure_launcher()
    return built


def _check_engine(strategy: Strategy) -> None:
    precision = strategy.precision
    if precision.engine not in (None, strategy.engine):
        raise ValueError(
            f"{type(precision).__name__} leaves the work to {precision.engine}, which {type(strategy).__name__} does "
            f"not use. Pass its name in place of the object: precision={precision.precision!r}."
        )


def _build_strategy(name: str, devices: list[torch.device]) -> Strategy:
    entry = STRATEGY_REGISTRY.entry(name)
    one_device = isinstance(entry.target, str) and not entry.many_devices
    strategy: Strategy = STRATEGY_REGISTRY.build(entry, **({"device": devices[0]} if one_device else {}))
    return strategy


def _is_using_cli() -> bool:
    """Tell whether `fabric run` started this process."""
    return Machine(env=os.environ).switched_on("LT_CLI_USED")
