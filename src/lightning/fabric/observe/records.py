"""What an explanation is made of: plain records, without a tensor, a module or a process group."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Decision:
    """A value of the plan, and where it comes from."""

    name: str
    value: str
    because: str


@dataclass(frozen=True)
class ProcessReport:
    """Who this process is. Before launch, its ranks are not known yet."""

    launched: bool
    rank: int
    world_size: int
    local_rank: int
    node_rank: int
    device: str


@dataclass(frozen=True)
class ParameterReport:
    """One parameter, as this rank has it. ``shape`` and ``numel`` are of the whole, ``shape_here`` of this rank's part.

    ``aliases`` are its other names, where modules share it. ``gradients`` says how its gradient meets those of other
    ranks; empty: not at all. ``has_gradient`` None: it cannot be seen.
    """

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    shape_here: tuple[int, ...]
    dtype: str
    device: str
    computes_in: str
    trainable: bool
    layout: str
    gradients: str
    has_gradient: bool | None
    numel: int
    numel_here: int
    bytes_here: int


@dataclass(frozen=True)
class BufferReport:
    """One buffer, as this rank has it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    bytes_here: int


@dataclass(frozen=True)
class PartReport:
    """A module inside of a set-up one (under the empty name: that one itself).

    ``is_unit``: its parameters are gathered and freed together. ``recomputes``: its activations are computed again in
    backward. ``is_compiled``: by ``torch.compile`` or ``module.compile()``, on its own.
    """

    name: str
    kind: str
    is_unit: bool = False
    recomputes: bool = False
    is_compiled: bool = False


@dataclass(frozen=True)
class ModuleReport:
    """A module that was set up; ``wrappers`` are the classes around it, from what the user holds inwards."""

    kind: str
    wrappers: tuple[str, ...]
    training: bool
    is_compiled: bool  # as a whole
    parameters: tuple[ParameterReport, ...]
    buffers: tuple[BufferReport, ...]
    parts: tuple[PartReport, ...]


@dataclass(frozen=True)
class Coverage:
    """How many of a module's trainable parameters an optimizer updates, and the names of the others."""

    module: int  # its number in `Explanation.modules`
    covered: int
    trainable: int
    missing: tuple[str, ...]


@dataclass(frozen=True)
class OptimizerReport:
    """An optimizer that was set up, and the names of its ``parameters``.

    ``tensors`` counts them, each once; ``frozen`` those that need no gradient. ``duplicates`` are names of parameters
    that it has more than once, ``foreign`` those that no set-up module has.
    """

    kind: str
    groups: int
    tensors: int
    numel: int
    frozen: int
    coverage: tuple[Coverage, ...]
    parameters: tuple[str, ...]
    duplicates: tuple[str, ...]
    foreign: tuple[str, ...]


@dataclass(frozen=True)
class SamplerReport:
    """Where a loader's indices come from. ``of``: "samples", or "batches" where whole batches are handed out.

    ``batch_sampler`` is the class of the user's own, if it has one.
    """

    kind: str
    length: int | None = None
    of: str = "samples"
    shuffle: bool | None = None
    num_replicas: int | None = None
    rank: int | None = None
    wraps: str | None = None
    batch_sampler: str | None = None


@dataclass(frozen=True)
class LoaderReport:
    """A loader that was set up. ``repeated`` and ``left_out`` count samples over all ranks, or batches, by sampling."""

    kind: str
    dataset: str
    dataset_length: int | None
    batch_size: int | None
    drop_last: bool
    before: SamplerReport
    after: SamplerReport
    samples_here: int | None
    batches_here: int | None
    repeated: int
    left_out: int
    sees_all: bool  # that every rank sees all the data, although there are several
    workers: int
    persistent_workers: bool
    pin_memory: bool
    device: str | None


@dataclass(frozen=True)
class MemoryReport:
    """In bytes; ``what`` says what is counted."""

    now: int | None
    peak: int | None
    what: str
