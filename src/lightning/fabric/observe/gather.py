"""From torch's objects to an explanation: asks the strategy and the precision, looks at tensors, changes nothing."""

import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning.fabric._plan import Plan, Settled
from lightning.fabric.observe import sampling
from lightning.fabric.observe.attention import sentences
from lightning.fabric.observe.explanation import Explanation
from lightning.fabric.observe.inventory import Inventory
from lightning.fabric.observe.records import (
    BufferReport,
    Coverage,
    Decision,
    MemoryReport,
    ModuleReport,
    OptimizerReport,
    ParameterReport,
    PartReport,
    ProcessReport,
)
from lightning.fabric.plugins.precision.precision import Precision, dtype_name
from lightning.fabric.strategies._holding import Holding
from lightning.fabric.strategies.strategy import Strategy
from lightning.fabric.utilities.compilation import is_compiled, uncompiled


def explain(plan: Plan, strategy: Strategy, inventory: Inventory, launched: bool) -> Explanation:
    """Describe this rank. Local: no other rank is asked."""
    pairs = [(wrapped._original_module, wrapped._forward_module) for wrapped in inventory.modules]
    held = [strategy.holdings(own, uncompiled(forward)) for own, forward in pairs]
    modules = [_module(strategy, wrapped, holdings) for wrapped, holdings in zip(inventory.modules, held, strict=True)]
    optimizers = list(_optimizers(strategy, inventory.optimizers, held))
    loaders = [sampling.report(wrapped, loader, strategy.num_replicas) for wrapped, loader in inventory.loaders]
    return Explanation(
        versions={name: str(sys.modules[name].__version__) for name in ("lightning.fabric", "torch")},
        plan=tuple(_decisions(plan)),
        process=_process(strategy, launched),
        strategy=type(strategy).__name__,
        strategy_remarks=tuple(strategy.remarks()),
        precision=f"{type(strategy.precision).__name__} ({strategy.precision.precision})",
        precision_remarks=tuple(strategy.precision.remarks()),
        modules=tuple(modules),
        optimizers=tuple(optimizers),
        loaders=tuple(loaders),
        memory=_memory(strategy) if launched else None,
        attention=tuple(sentences(modules, optimizers, loaders, strategy.num_replicas if modules else 1)),
    )


def _decisions(plan: Plan) -> Iterator[Decision]:
    for each in fields(plan):
        settled = getattr(plan, each.name)
        if isinstance(settled, Settled):
            yield Decision(each.name, str(settled.value), settled.because)
    yield from (Decision("warning", text, "") for text in plan.warnings)


def _process(strategy: Strategy, launched: bool) -> ProcessReport:
    return ProcessReport(
        launched=launched,
        rank=strategy.global_rank,
        world_size=strategy.world_size,
        local_rank=strategy.local_rank,
        node_rank=strategy.node_rank,
        device=str(strategy.root_device),
    )


def _memory(strategy: Strategy) -> MemoryReport | None:
    found = None if strategy.accelerator is None else strategy.accelerator.memory(strategy.root_device)
    return None if found is None else MemoryReport(*found)


# ---- modules ---------------------------------------------------------------------------------------------------------


def _module(strategy: Strategy, wrapped: Any, holdings: Sequence[Holding]) -> ModuleReport:
    own, forward_module = wrapped._original_module, wrapped._forward_module
    return ModuleReport(
        kind=type(own).__name__,
        wrappers=(type(wrapped).__name__, *(type(part).__name__ for part in _around(own, forward_module))),
        training=own.training,
        is_compiled=any(is_compiled(part) for part in (wrapped, *_around(own, forward_module), own)),
        parameters=tuple(_parameters(strategy.precision, own, holdings)),
        buffers=tuple(_buffer(name, buffer) for name, buffer in own.named_buffers()),
        parts=tuple(
            PartReport(
                name,
                type(part).__name__,
                is_unit=strategy.is_unit(part),
                recomputes=strategy.recomputes(part),
                is_compiled=part is not own and is_compiled(part),
            )
            for name, part in own.named_modules()
        ),
    )


def _around(own: nn.Module, forward_module: nn.Module) -> list[nn.Module]:
    """The modules around ``own``, outermost first."""
    if forward_module is own:
        return []
    for child in forward_module.children():
        if any(part is own for part in child.modules()):
            return [forward_module, *_around(own, child)]
    return [forward_module]  # one that does not register what it has inside


def _parameters(precision: Precision, own: nn.Module, holdings: Sequence[Holding]) -> Iterator[ParameterReport]:
    names: dict[int, list[str]] = {}
    for holding in holdings:
        names.setdefault(id(holding.parameter), []).append(holding.name)
    for holding in holdings:
        first, *others = names[id(holding.parameter)]
        if holding.name == first:
            yield _parameter(precision, own, holding, tuple(others))


def _parameter(precision: Precision, own: nn.Module, holding: Holding, aliases: tuple[str, ...]) -> ParameterReport:
    parameter, here = holding.parameter, holding.here
    numel_here = 0 if is_lazy(here) else here.numel()
    return ParameterReport(
        name=holding.name,
        aliases=aliases,
        shape=tuple(holding.shape),
        shape_here=() if is_lazy(here) else tuple(here.shape),
        dtype=dtype_name(here.dtype),
        device=str(here.device),
        computes_in=_computes_in(precision, own, holding),
        trainable=parameter.requires_grad,
        layout="not initialised yet" if is_lazy(here) else holding.layout,
        gradients=_way_of_gradient(holding) if parameter.requires_grad else "",
        has_gradient=holding.has_gradient if parameter.requires_grad else None,
        numel=_numel(holding),
        numel_here=numel_here,
        bytes_here=numel_here * here.dtype.itemsize,
    )


def _numel(holding: Holding) -> int:
    return 0 if is_lazy(holding.parameter) else math.prod(holding.shape)


def _computes_in(precision: Precision, own: nn.Module, holding: Holding) -> str:
    """What the precision does of its own (autocast, kernels of its own), else what the strategy casts to."""
    stored = dtype_name(holding.here.dtype)
    owner = own.get_submodule(holding.name.rpartition(".")[0])
    if next(owner.parameters(recurse=False), None) is None:  # the strategy has taken its parameters out of it
        return holding.computes_in or stored
    said = precision.computes_in(holding.name.rpartition(".")[0], owner)
    return holding.computes_in if said == stored and holding.computes_in is not None else said


def _way_of_gradient(holding: Holding) -> str:
    hooks: Any = holding.parameter
    if holding.gradients or not (hooks._post_accumulate_grad_hooks or hooks._backward_hooks):
        return holding.gradients
    return "left to the hook on it"


def _buffer(name: str, buffer: Tensor) -> BufferReport:
    if is_lazy(buffer):
        return BufferReport(name, (), dtype_name(buffer.dtype), str(buffer.device), 0)
    here = getattr(buffer, "_local_tensor", buffer)  # of a DTensor
    size = here.numel() * here.element_size()
    return BufferReport(name, tuple(buffer.shape), dtype_name(buffer.dtype), str(here.device), size)


# ---- optimizers ------------------------------------------------------------------------------------------------------


def _optimizers(
    strategy: Strategy, wrapped: Iterable[Any], held: Sequence[Sequence[Holding]]
) -> Iterator[OptimizerReport]:
    names = _names(held)
    for each in wrapped:
        groups = strategy.tracked(each._optimizer)
        yield _optimizer(each._optimizer, groups, held, names)


def _names(held: Sequence[Sequence[Holding]]) -> dict[int, str]:
    """The first name of each parameter of set-up modules, by identity."""
    found: dict[int, str] = {}
    for number, holdings in enumerate(held, start=1):
        prefix = f"model {number}: " if len(held) > 1 else ""
        for holding in holdings:
            found.setdefault(id(holding.parameter), f"{prefix}{holding.name}")
    return found


def _optimizer(
    optimizer: Any,
    groups: Sequence[Sequence[Tensor]],
    held: Sequence[Sequence[Holding]],
    names: Mapping[int, str],
) -> OptimizerReport:
    tracked = {id(parameter): parameter for group in groups for parameter in group}
    said = {
        id(parameter): names.get(id(parameter), own)
        for group, own_names in zip(groups, _own_names(optimizer, groups), strict=True)
        for parameter, own in zip(group, own_names, strict=True)
    }
    counts = Counter(id(parameter) for group in groups for parameter in group)
    whole = {id(holding.parameter): _numel(holding) for holdings in held for holding in holdings}
    return OptimizerReport(
        kind=type(optimizer).__name__,
        groups=len(groups),
        tensors=len(tracked),
        numel=sum(whole[key] if key in whole else parameter.numel() for key, parameter in tracked.items()),
        frozen=sum(not parameter.requires_grad for parameter in tracked.values()),
        coverage=tuple(
            coverage
            for number, holdings in enumerate(held)
            if (coverage := _coverage(number, holdings, tracked)) is not None
        ),
        parameters=tuple(said.values()),
        duplicates=tuple(said[key] for key, count in counts.items() if count > 1),
        foreign=tuple(said[key] for key in tracked if key not in names),
    )


def _own_names(optimizer: Any, groups: Sequence[Sequence[Tensor]]) -> Iterator[list[str]]:
    """What the optimizer itself calls its parameters."""
    for number, parameters in enumerate(groups):
        given = optimizer.param_groups[number].get("param_names") if number < len(optimizer.param_groups) else None
        if given is not None and len(given) == len(parameters):
            yield list(given)
        else:
            yield [f"param_groups[{number}]['params'][{i}], {_shape(p)}" for i, p in enumerate(parameters)]


def _shape(parameter: Tensor) -> str:
    return "not initialised yet" if is_lazy(parameter) else f"of shape {tuple(parameter.shape)}"


def _coverage(number: int, holdings: Sequence[Holding], tracked: Mapping[int, Tensor]) -> Coverage | None:
    """None, if the optimizer has nothing of the module."""
    if not any(id(holding.parameter) in tracked for holding in holdings):
        return None
    trainable = {id(h.parameter): h.name for h in reversed(holdings) if h.parameter.requires_grad}
    missing = tuple(name for key, name in reversed(trainable.items()) if key not in tracked)
    return Coverage(number, len(trainable) - len(missing), len(trainable), missing)
