"""Records as lines of text."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from lightning.fabric.observe import outline
from lightning.fabric.observe.attention import named, title
from lightning.fabric.observe.records import (
    Decision,
    LoaderReport,
    MemoryReport,
    ModuleReport,
    OptimizerReport,
    ProcessReport,
    SamplerReport,
)


def head(process: ProcessReport, versions: Mapping[str, str]) -> list[str]:
    who = f"rank {process.rank} of {process.world_size}, device {process.device}"
    if process.world_size > 1:
        who += f" (local rank {process.local_rank}, node {process.node_rank})"
    if not process.launched:
        who = f"not launched yet, {process.world_size} rank{'s' * (process.world_size != 1)} to come"
    return ["; ".join([who, *(f"{name} {version}" for name, version in versions.items())])]


def of_plan(plan: Sequence[Decision]) -> list[str]:
    return table([(each.name, each.value, each.because) for each in plan])


def of_way(what: str, kind: str, remarks: Iterable[str]) -> list[str]:
    return [f"{what}: {kind}", *(f"  {remark}" for remark in remarks)]


def of_module(number: int, module: ModuleReport) -> list[str]:
    common = outline.common_facts(module)
    facts = [
        ("wrapped as", " > ".join([*module.wrappers, module.kind])),
        ("mode", "training" if module.training else "evaluation"),
        ("parameters", _parameters(module)),
        ("buffers", _buffers(module)),
        ("as a rule", "; ".join(common.words())),
        ("compiled", _compiled(module)),
        ("activations", _activations(module)),
        *(("shared", f"{' = '.join([p.name, *p.aliases])}") for p in module.parameters if p.aliases),
    ]
    rows = [(f"{row.name}", row.kind, row.numel, row.size, row.note) for row in outline.rows(module, common)]
    lines = [f"  {line}" for line in table([(name, text) for name, text in facts if text])]
    return [f"model {number}: {module.kind}", *lines, *(f"    {line}" for line in table(rows, right=(2, 3)))]


def _parameters(module: ModuleReport) -> str:
    every = module.parameters
    if not every:
        return "none"
    numel, trainable = sum(p.numel for p in every), sum(p.numel for p in every if p.trainable)
    of_these = "all trainable" if trainable == numel else f"{trainable:,} trainable"
    here, size = sum(p.numel_here for p in every), sum(p.bytes_here for p in every)
    return f"{numel:,} in {len(every)} tensors, {of_these}; on this rank {here:,} ({outline.in_bytes(size)})"


def _buffers(module: ModuleReport) -> str:
    size = sum(buffer.bytes_here for buffer in module.buffers)
    return f"{len(module.buffers)} ({outline.in_bytes(size)})" if module.buffers else ""


def _compiled(module: ModuleReport) -> str:
    parts = [part.name for part in module.parts if part.is_compiled]
    found = ["as a whole"] if module.is_compiled else []
    found += [f"{len(parts)} module{'s' * (len(parts) != 1)} by themselves: {named(parts)}"] if parts else []
    return "; ".join(found) or "no"


def _activations(module: ModuleReport) -> str:
    parts = [part.name or "the whole" for part in module.parts if part.recomputes]
    if not parts:
        return "kept (of `torch.utils.checkpoint` inside of a forward nothing is known)"
    return f"computed again in backward: {named(parts)}"


def of_optimizer(number: int, optimizer: OptimizerReport, modules: Sequence[ModuleReport]) -> list[str]:
    tracks = f"{optimizer.tensors} tensors, {optimizer.numel:,} parameters"
    tracks += f", in {optimizer.groups} groups" if optimizer.groups != 1 else ""
    tracks += f"; {optimizer.frozen} of the tensors frozen" if optimizer.frozen else ""
    rows = [("tracks", tracks)]
    for coverage in optimizer.coverage:
        of = f"{coverage.trainable} trainable tensors of {title(coverage.module, modules)}"
        without = f", not {named(coverage.missing)}" if coverage.missing else ""
        rows.append(("covers", f"{coverage.covered} of {of}{without}"))
    rows += [("twice", named(optimizer.duplicates))] if optimizer.duplicates else []
    rows += [("foreign", named(optimizer.foreign))] if optimizer.foreign else []
    return [f"optimizer {number}: {optimizer.kind}", *(f"  {line}" for line in table(rows))]


def of_loader(number: int, loader: LoaderReport) -> list[str]:
    length = "" if loader.dataset_length is None else f" of {loader.dataset_length:,}"
    batch = "as the sampler makes them" if loader.batch_size is None else f"of {loader.batch_size}"
    rows = [
        ("dataset", f"{loader.dataset}{length}"),
        ("batches", batch + (", an incomplete last one is left out" if loader.drop_last else "")),
        ("sampler", _change(loader)),
        ("this rank", _share(loader)),
        ("workers", f"{loader.workers}" + (", kept over epochs" if loader.persistent_workers else "")),
        ("memory", "pinned" if loader.pin_memory else "not pinned"),
        ("batches go to", loader.device or "where the loader puts them"),
    ]
    return [f"loader {number}: {loader.kind}", *(f"  {line}" for line in table(rows))]


def _change(loader: LoaderReport) -> str:
    before, after = _sampler(loader.before), _sampler(loader.after)
    return f"{before}, unchanged" if loader.before == loader.after else f"{before} -> {after}"


def _sampler(sampler: SamplerReport) -> str:
    said = [] if sampler.wraps is None else [f"of {sampler.wraps}"]
    said += [] if sampler.shuffle is None else ["shuffled" if sampler.shuffle else "in order"]
    said += [] if sampler.num_replicas is None else [f"part {sampler.rank} of {sampler.num_replicas}"]
    inside = "" if sampler.batch_sampler is None else f" in {sampler.batch_sampler}"
    return f"{sampler.kind}{inside}" + (f" ({', '.join(said)})" if said else "")


def _share(loader: LoaderReport) -> str:
    samples = "" if loader.samples_here is None else f"{_number(loader.samples_here, 'samples')}, "
    batches = "no known number of batches" if loader.batches_here is None else _number(loader.batches_here, "batches")
    what = loader.after.of
    uneven = f"; {_number(loader.repeated, what)} twice, to give all ranks as many" if loader.repeated else ""
    uneven += f"; {_number(loader.left_out, what)} on no rank" if loader.left_out else ""
    return f"{samples}{batches} in an epoch{uneven}"


def _number(number: int, what: str) -> str:
    one = {"samples": "sample", "batches": "batch"}
    return f"{number:,} {what if number != 1 else one[what]}"


def of_what_is_missing(modules: Sequence[object], optimizers: Sequence[object], loaders: Sequence[object]) -> list[str]:
    kinds = {"model": modules, "optimizer": optimizers, "loader": loaders}
    missing = [kind for kind, there in kinds.items() if not there]
    return [f"not set up (or gone): {', '.join(missing)}"] if missing else []


def of_memory(memory: MemoryReport | None) -> list[str]:
    if memory is None:
        return []
    known = [("now", memory.now), ("at peak", memory.peak)]
    said = ", ".join(f"{outline.in_bytes(size)} {when}" for when, size in known if size is not None)
    return [f"memory: {said} ({memory.what})"]


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Rows with their columns one under the other; those numbered in ``right`` end together."""
    columns = [
        _column(cells, str.rjust if number in right else str.ljust)
        for number, cells in enumerate(zip(*rows, strict=True))
    ]
    return ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]


def _column(cells: Sequence[str], justify: Callable[[str, int], str]) -> list[str]:
    width = max(map(len, cells))
    return [justify(cell, width) for cell in cells]
