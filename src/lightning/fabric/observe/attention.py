"""What in a set-up looks like a mistake: from records, a sentence each."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from lightning.fabric.observe.records import LoaderReport, ModuleReport, OptimizerReport

_SHOWN = 10  # names in a sentence


def sentences(
    modules: Sequence[ModuleReport],
    optimizers: Sequence[OptimizerReport],
    loaders: Sequence[LoaderReport],
    replicas: int,
) -> Iterator[str]:
    """Yield what the user should look at; ``replicas``: how many batches a gradient should be averaged over."""
    for number, module in enumerate(modules):
        called = title(number, modules)
        if optimizers:
            yield from _uncovered(number, called, module, optimizers)
        yield from _values_and_gradients(called, module, replicas)
    yield from _optimizers(optimizers)
    for number, loader in enumerate(loaders, start=1):
        if loader.sees_all:
            yield (
                f"Every rank reads all of loader {number} ({loader.dataset}), which has no sampler that shares it out: "
                f"the {replicas} parts of a batch are the same, unless the data differs by rank."
            )


def title(number: int, modules: Sequence[ModuleReport]) -> str:
    """What a module is called in sentences; ``number`` from 0."""
    kind = modules[number].kind
    return kind if len(modules) == 1 else f"model {number + 1} ({kind})"


def named(names: Iterable[str]) -> str:
    names = list(names)
    shown = ", ".join(names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if names[_SHOWN:] else shown


def _tensors(names: Sequence[str], kind: str = "parameter") -> str:
    return f"{len(names)} {kind}{'s' * (len(names) != 1)}"


def _uncovered(number: int, called: str, module: ModuleReport, optimizers: Sequence[OptimizerReport]) -> Iterator[str]:
    missing = {parameter.name: None for parameter in module.parameters if parameter.trainable}
    for optimizer in optimizers:
        for coverage in optimizer.coverage:
            if coverage.module == number:
                missing = {name: None for name in missing if name in coverage.missing}
    if missing:
        names = list(missing)
        yield f"No optimizer updates {_tensors(names, 'trainable parameter')} of {called}: {named(names)}."


def _values_and_gradients(called: str, module: ModuleReport, replicas: int) -> Iterator[str]:
    empty = [parameter.name for parameter in module.parameters if parameter.device == "meta"]
    if empty:
        yield f"{_tensors(empty)} of {called} have no values yet: {named(empty)}."
    trainable = [parameter for parameter in module.parameters if parameter.trainable]
    alone = [parameter.name for parameter in trainable if not parameter.gradients]
    if alone and replicas > 1:
        yield f"Nothing averages the gradients of {_tensors(alone)} of {called} over the ranks: {named(alone)}."
    without = [parameter.name for parameter in trainable if parameter.has_gradient is False]
    if without and any(parameter.has_gradient for parameter in trainable):
        yield f"{_tensors(without, 'trainable parameter')} of {called} got no gradient, others did: {named(without)}."


def _optimizers(optimizers: Sequence[OptimizerReport]) -> Iterator[str]:
    for number, optimizer in enumerate(optimizers, start=1):
        called = f"optimizer {number} ({optimizer.kind})"
        if optimizer.duplicates:
            yield f"{called} has {_tensors(optimizer.duplicates)} more than once: {named(optimizer.duplicates)}."
        if optimizer.foreign:
            yield f"{called} has {_tensors(optimizer.foreign)} that no set-up model has: {named(optimizer.foreign)}."
    everywhere = Counter(name for optimizer in optimizers for name in set(optimizer.parameters) - {*optimizer.foreign})
    twice = [name for name, count in everywhere.items() if count > 1]
    if twice:
        yield f"Several optimizers update {_tensors(twice)}: {named(twice)}."
