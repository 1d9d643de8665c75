"""What goes together: strategy x precision x accelerator x feature, each cell run or refused; and the page of it.

A cell is one strategy with one precision and one feature. It is run on this machine, by as many processes as the
strategy has, and looked at: dtypes, wrappers, which parameters moved, and whether the result is that of plain PyTorch
in one process. What is expected stands in this file as small tables, so that no cell is different without somebody
having written it down.

    python -m tests.support_table --write      # runs all cells, about a minute, and writes docs/support.md
"""

import argparse
import contextlib
import dataclasses
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning.fabric import Fabric
from lightning.fabric._plan import Flags, Machine, Part, StrategyObject, resolve
from lightning.fabric.plugins.precision._table import PRECISIONS, build_precision
from lightning.fabric.plugins.precision.precision import Precision, dtype_name
from lightning.fabric.strategies import STRATEGY_REGISTRY, Strategy
from lightning.fabric.strategies._table import STRATEGIES, UNNAMED, StrategyEntry
from lightning.fabric.testing import on_ranks, preload
from lightning.fabric.utilities.imports import package_available

if package_available("deepspeed"):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # for the process that ranks are forked from
    preload("deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer")
preload("torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.distributed.checkpoint")

PAGE = Path(__file__).parent.parent / "docs" / "support.md"
WIDTH, BATCH, STEPS, RATE = 16, 32, 2, 2.0
MAX_NORM, CLIP_VAL = 0.1, 0.01  # both change the result by far more than any tolerance


# ---- what is trained -------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Two linear layers, a floating-point buffer that the result depends on, and one that no precision may touch."""

    scale: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, WIDTH))
        self.register_buffer("count", torch.arange(3))
        self.received: torch.dtype | None = None
        self.computed: torch.dtype | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.received = x.dtype
        hidden = self.up(x)
        self.computed = hidden.dtype
        return self.down(hidden.tanh()) * self.scale


def _net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net()


def _batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(BATCH, WIDTH, generator=generator) for _ in range(STEPS)]


def _loss(output: Tensor) -> Tensor:
    return (output - 1).square().mean()


def _sgd(parameters: Iterable[Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=RATE)


def _look(model: Callable[[Tensor], Tensor], rows: int = BATCH) -> Tensor:
    """What a trained model computes: that tells its weights, however they lie on the ranks.

    Of as many rows as there are in training, and with gradients, so that nothing is compiled once more.
    """
    return model(torch.linspace(-1, 1, BATCH * WIDTH).reshape(BATCH, WIDTH)[:rows]).float().detach()


def _trained(model: Any, precision: str) -> list[Any]:
    """The parameters that are trained: without weights that are quantised for good."""
    named = list(model.named_parameters())
    return [p for name, p in named if precision != "bitsandbytes nf4" or not name.endswith("weight")]


# ---- what is expected of a precision ---------------------------------------------------------------------------------

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Dtypes:
    """Of parameters, floating-point buffers, what the model's ``forward`` receives, and what a linear layer returns.

    What the user gets is 32-bit always.
    """

    stored: torch.dtype
    buffers: torch.dtype
    received: torch.dtype
    computed: torch.dtype
    codes: torch.dtype | None = None  # of quantised weights


def _all(dtype: torch.dtype) -> Dtypes:
    return Dtypes(dtype, dtype, dtype, dtype)


def _mixed(dtype: torch.dtype) -> Dtypes:
    return Dtypes(F32, F32, F32, dtype)


# names of precisions, and what stands for one that is passed as an object: see `_flags`
SCALED = "16-mixed plug-in"
AS_ANOTHER = {"16-mixed": "bf16-mixed"}  # on the CPU, with a warning
QUANTISED = ("bitsandbytes nf4", "bitsandbytes int8-training")  # whose kernels break graphs of the compiler
ROWS = (*PRECISIONS, SCALED, *QUANTISED)
COLUMNS = ("joint", "separate", "compile", "empty_init", "clip norm", "clip value", "accumulation")

_ORDINARY = {
    "64-true": _all(F64),
    "32-true": _all(F32),
    "16-true": _all(F16),
    "bf16-true": _all(BF16),
    "bf16-mixed": _mixed(BF16),
    SCALED: _mixed(F16),
    "float8": _mixed(BF16),
    "bitsandbytes nf4": Dtypes(BF16, BF16, BF16, BF16, codes=torch.uint8),
    "bitsandbytes int8-training": _all(BF16),
}
DTYPES: dict[str, dict[str, Dtypes]] = {
    "ordinary": _ORDINARY,
    "fsdp": {
        **_ORDINARY,
        "bf16-mixed": Dtypes(F32, BF16, F32, BF16),
        "float8": Dtypes(F32, BF16, F32, BF16),
        SCALED: Dtypes(F32, F16, F32, F16),
    },
    "deepspeed": {
        **_ORDINARY,
        "bf16-mixed": Dtypes(BF16, F32, BF16, BF16),  # its engine keeps a 32-bit copy of the parameters
    },
    "xla": _ORDINARY,
    "xla_fsdp": {
        "32-true": _all(F32),
        "16-true": Dtypes(F32, F16, F16, F16),  # parts of parameters are 32-bit
        "bf16-true": Dtypes(F32, BF16, BF16, BF16),
    },
}
LAYERS = {  # the class of linear layers, where it is not torch's
    "float8": "AutocastFloat8Linear",
    "bitsandbytes nf4": "Linear4bit",
    "bitsandbytes int8-training": "Linear8bitTraining",
}

TOLERANCES = {"64-true": 1e-6, "32-true": 5e-6, "16-true": 0.01, SCALED: 0.01, "float8": 0.15}
TOLERANCE_OF_BF16 = 0.06


# ---- what is expected of a strategy ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """A strategy, and what set-up makes of a module: the classes from outside to the user's, that of parameters."""

    make: Callable[[], Any]
    ranks: int
    wrapper: tuple[str, ...] = ("Net",)
    parameter: str = "Parameter"
    family: str = "ordinary"
    separate: bool = False  # the order of set-up where the feature does not say it
    accelerator: str = "cpu"
    graphs: int = 1  # of the compiler: those of the model, for wrappers are in none


MORE_GRAPHS = {(("_ThroughHooks", "FSDPNet"), "float8"): 2}  # a layer that is a unit has hooks


def _model_parallel(parallelize: Callable[..., Any], data: int, tensor: int) -> Any:
    from lightning.fabric.strategies import ModelParallelStrategy

    return ModelParallelStrategy(parallelize, data_parallel_size=data, tensor_parallel_size=tensor)


def _split_layers(model: nn.Module, mesh: Any) -> nn.Module:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    return parallelize_module(model, mesh["tensor_parallel"], {"up": ColwiseParallel(), "down": RowwiseParallel()})


def _shard(model: nn.Module, mesh: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.up, mesh=mesh["data_parallel"])
    return fully_shard(model, mesh=mesh["data_parallel"])


_DEEPSPEED = {"ranks": 2, "wrapper": ("DeepSpeedEngine", "Net"), "family": "deepspeed"}
WAYS: dict[str, Way] = {
    "single_device": Way(lambda: "single_device", 1),
    "dp": Way(lambda: "dp", 1),
    "ddp": Way(lambda: "ddp", 2, ("DistributedDataParallel", "Net")),
    "fsdp": Way(lambda: "fsdp", 2, ("FSDPFSDPRoot", "Net"), "DTensor", "fsdp"),
    "fsdp_cpu_offload": Way(lambda: "fsdp_cpu_offload", 2, ("FSDPFSDPRoot", "Net"), "DTensor", "fsdp"),
    "tensor parallel": Way(lambda: _model_parallel(_split_layers, 1, 2), 2, ("Net",), "DTensor", separate=True),
    "fully_shard": Way(
        lambda: _model_parallel(_shard, 2, 1), 2, ("_ThroughHooks", "FSDPNet"), "DTensor", separate=True
    ),
    "deepspeed_stage_1": Way(lambda: "deepspeed_stage_1", **_DEEPSPEED),
    "deepspeed_stage_2": Way(lambda: "deepspeed_stage_2", **_DEEPSPEED),
    "deepspeed_stage_3": Way(lambda: "deepspeed_stage_3", **_DEEPSPEED, graphs=2),  # layers have hooks
    "xla": Way(lambda: "xla", 2, family="xla", accelerator="tpu"),
    "xla_fsdp": Way(
        lambda: "xla_fsdp", 2, ("XlaFullyShardedDataParallel", "Net"), family="xla_fsdp", accelerator="tpu"
    ),
    "single_xla": Way(lambda: "single_xla", 1, family="xla", accelerator="tpu"),
}


def _flags(precision: str, family: str, device_type: str = "cpu") -> dict[str, Any]:
    """The arguments of ``Fabric`` that ask for a row."""
    if precision == SCALED:
        from lightning.fabric.plugins import DeepSpeedPrecision, FSDPPrecision, MixedPrecision

        own: Any = {"fsdp": FSDPPrecision, "deepspeed": DeepSpeedPrecision}.get(family)
        return {"plugins": own("16-mixed") if own else MixedPrecision("16-mixed", device_type)}
    if precision in QUANTISED:
        from lightning.fabric.plugins import BitsandbytesPrecision

        return {"plugins": BitsandbytesPrecision(precision.removeprefix("bitsandbytes "))}
    return {"precision": precision}


# ---- plain PyTorch ---------------------------------------------------------------------------------------------------


@cache
def plain(precision: str, family: str, clip: str = "", batches: str = "whole") -> Tensor:
    """What one process without this library computes after the same steps."""
    dtypes = DTYPES[family].get(precision) or _all(F32)
    model = _net()
    if dtypes.codes is not None:
        _round_to_nf4(model)
    model = model.to(dtypes.stored)
    model.scale = model.scale.to(dtypes.buffers)
    autocasts = dtypes.received is not dtypes.computed
    scaler = torch.amp.GradScaler("cpu", enabled=dtypes.computed is F16 and autocasts)
    has_masters = family in ("deepspeed", "xla_fsdp")
    masters = _net() if has_masters else model
    for parameter in set(masters.parameters()) - set(_trained(masters, precision)):
        parameter.requires_grad_(False)
    optimizer = _sgd(_trained(masters, precision))
    model = model.to(dtypes.computed) if has_masters else model

    def compute(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtypes.computed if autocasts else BF16, enabled=autocasts):
            return model(x.to(dtypes.received)).float()

    for x in _batches():
        optimizer.zero_grad()
        model.zero_grad()
        x = x if batches == "whole" else x[: BATCH // 2]
        scaler.scale(_loss(compute(x))).backward()
        if has_masters:
            for master, parameter in zip(masters.parameters(), model.parameters(), strict=True):
                master.grad = parameter.grad.float()
        scaler.unscale_(optimizer)
        if clip == "clip norm":
            nn.utils.clip_grad_norm_(masters.parameters(), MAX_NORM)
        elif clip == "clip value":
            nn.utils.clip_grad_value_(masters.parameters(), CLIP_VAL)
        scaler.step(optimizer)
        scaler.update()
        if has_masters:
            with torch.no_grad():
                for master, parameter in zip(masters.parameters(), model.parameters(), strict=True):
                    parameter.copy_(master)
    return _look(compute)


@torch.no_grad()
def _round_to_nf4(model: nn.Module) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for part in model.modules():
        if isinstance(part, nn.Linear):
            codes, state = quantize_4bit(part.weight.data.to(BF16), quant_type="nf4", blocksize=64)
            part.weight.copy_(dequantize_4bit(codes, state))


# ---- a cell ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What came of a cell on one rank: it ran, with what is ``wrong`` with it; or it was refused, and when."""

    precision: str
    feature: str
    when: str | None = None  # "construction", "launch", "set-up", "the call"; None: it ran
    error: str = ""
    message: str = ""
    wrong: tuple[str, ...] = ()
    warned: tuple[str, ...] = ()
    same_as: str = ""  # the row that it stands for, as the string means that precision here


class _Cell:
    """One strategy, precision and feature, run on one rank."""

    def __init__(self, way: Way, precision: str, feature: str) -> None:
        self.way, self.precision, self.feature = way, precision, feature
        self.when = "construction"
        self.wrong: list[str] = []
        self.graphs = 0

    def run(self, make_fabric: Callable[["_Cell"], Fabric]) -> Outcome:
        """Run it; an error in the middle of training is reported with ``when="the step"``, which is never expected."""
        error: BaseException | None = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                self._train(make_fabric(self))
            except Exception as raised:
                error = raised
        warned = tuple(dict.fromkeys(_steady(str(warning.message)) for warning in caught))
        if error is not None:
            where = (self.when, type(error).__name__, _steady(str(error)))
            return Outcome(self.precision, self.feature, *where, tuple(self.wrong), warned)
        return Outcome(self.precision, self.feature, wrong=tuple(self.wrong), warned=warned)

    def expect(self, holds: bool, sentence: str) -> None:
        if not holds:
            self.wrong.append(sentence)

    # -- the run

    def _train(self, fabric: Fabric) -> None:
        self.when = "set-up"
        module, model, optimizer = self._set_up(fabric)
        self.when = "the step"
        self._check_dtypes(module, model)
        self._check_wrapper(module, model)
        before = _whole_parameters(model)
        for batch in _batches():
            optimizer.zero_grad()
            share = self._share(fabric, batch)
            self._compute_gradients(fabric, module, model, share)
            self._clip(fabric, model, optimizer)
            optimizer.step()
        unmoved = _unmoved(before, _whole_parameters(model))
        self.expect(not unmoved, f"the steps leave {unmoved} as before")
        self._check_dtypes(module, model)
        self._check_result(_look(model, len(share)))
        if self.precision == SCALED:
            self.expect("scale" in fabric.strategy.precision.state_dict(), "there is no gradient scaler")
        if self.feature == "compile":
            expected = MORE_GRAPHS.get((self.way.wrapper, self.precision), self.way.graphs)
            as_expected = self.graphs > 0 if self.precision in QUANTISED else self.graphs == expected
            self.expect(as_expected, f"{self.graphs} graphs were compiled, not {expected}")

    def _set_up(self, fabric: Fabric) -> tuple[Net, Any, Any]:
        separate = {"joint": False, "separate": True}.get(self.feature, self.way.separate)
        empty = self.feature == "empty_init"
        if empty:
            with fabric.init_module(empty_init=True):
                module = Net()
        else:
            module = _net()
        given: Any = module
        if self.feature == "compile":
            _compile_anew()
            given = torch.compile(module, backend=self._count_graphs)
        if separate or (empty and any(parameter.is_meta for parameter in module.parameters())):
            model = fabric.setup_module(given)
            optimizer = fabric.setup_optimizers(_sgd(_trained(model, self.precision)))
        else:
            model, optimizer = fabric.setup(given, _sgd(_trained(module, self.precision)))
        if empty:
            model.load_state_dict(_net().state_dict())
        return module, model, optimizer

    def _count_graphs(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward

    def _share(self, fabric: Fabric, batch: Tensor) -> Tensor:
        sampler = fabric.strategy.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        return batch[sampler["rank"] :: sampler["num_replicas"]].contiguous()

    def _compute_gradients(self, fabric: Fabric, module: Net, model: Any, batch: Tensor) -> None:
        parts = batch.chunk(2) if self.feature == "accumulation" else [batch]
        for index, part in enumerate(parts, start=1):
            with fabric.no_backward_sync(model, enabled=index < len(parts)):
                output = model(part)
                fabric.backward(_loss(output) / len(parts), model=model)
        self.expect(output.dtype is F32, f"the output is {output.dtype}")
        dtypes = self._dtypes()
        if dtypes is not None:
            found = (module.received, module.computed)
            self.expect(found == (dtypes.received, dtypes.computed), f"forward received and computed {found}")

    def _clip(self, fabric: Fabric, model: Any, optimizer: Any) -> None:
        if not self.feature.startswith("clip"):
            return
        limit = {"max_norm": MAX_NORM} if self.feature == "clip norm" else {"clip_val": CLIP_VAL}
        self.when = "the call"
        fabric.clip_gradients(model, optimizer, **limit)
        self.when = "the step"

    # -- what is looked at

    def _dtypes(self) -> Dtypes | None:
        return DTYPES[self.way.family].get(self.precision)

    def _check_dtypes(self, module: Net, model: Any) -> None:
        dtypes = self._dtypes()
        if dtypes is None:
            return
        stored = {parameter.dtype for parameter in model.parameters()}
        self.expect(stored == {dtypes.stored, dtypes.codes} - {None}, f"parameters are {stored}")
        self.expect(module.scale.dtype is dtypes.buffers, f"the buffer is {module.scale.dtype}")
        self.expect(module.count.dtype is torch.int64, f"the buffer of integers is {module.count.dtype}")
        gradients = {parameter.grad.dtype for parameter in model.parameters() if parameter.grad is not None}
        self.expect(gradients <= {dtypes.stored}, f"gradients are {gradients}")

    def _check_wrapper(self, module: Net, model: Any) -> None:
        expected = (*(("OptimizedModule",) if self.feature == "compile" else ()), *self.way.wrapper)
        found = _classes(model._forward_module)
        self.expect(found == expected, f"the module is wrapped as {found}, not {expected}")
        self.expect(model.module is module, "the user's module is not inside")
        kinds = {type(parameter).__name__ for parameter in model.parameters() if parameter.requires_grad}
        self.expect(kinds == {self.way.parameter}, f"parameters are of the classes {kinds}")
        layer = LAYERS.get(self.precision, "Linear")
        self.expect(type(module.up).__name__.removeprefix("FSDP") == layer, f"layers are {type(module.up).__name__}")

    def _check_result(self, found: Tensor) -> None:
        clip = self.feature if self.feature.startswith("clip") else ""
        difference = (found - plain(self.precision, self.way.family, clip)[: len(found)]).abs().max().item()
        allowed = TOLERANCES.get(self.precision, TOLERANCE_OF_BF16)
        self.expect(difference <= allowed, f"the result is off by {difference:.1e}, allowed is {allowed:.0e}")


def _compile_anew() -> None:
    torch._dynamo.reset()
    # the compiler empties the processor's caches for each graph, to measure something: tenths of a second
    torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0  # type: ignore[attr-defined]


def _classes(module: Any) -> tuple[str, ...]:
    """The classes from what is called in training to the user's module."""
    names = [type(module).__name__]
    while not isinstance(module, Net):
        module = module._modules.get("_orig_mod") or module._modules.get("_fsdp_wrapped_module") or module.module
        names.append(type(module).__name__)
    return tuple(names)


def _whole_parameters(model: Any) -> dict[str, Tensor]:
    """What is trained, as copies; of parts that only this rank knows how to put together, the parts."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with _gathered(list(named.values())):
        return {
            name: (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()
            for name, parameter in named.items()
        }


def _unmoved(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """Names of what no rank has seen change: the part of a rank may be padding."""
    unmoved = {name for name in before if not bool((before[name] != after[name]).any())}
    if dist.is_initialized():
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, unmoved)
        unmoved = set.intersection(*everywhere)
    return sorted(unmoved)


def _gathered(parameters: list[Any]) -> contextlib.AbstractContextManager[Any]:
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def _steady(message: str) -> str:
    """The message without what differs from run to run."""
    return re.sub(r" object at 0x[0-9a-f]+", " object", message)


# ---- all cells of a strategy -----------------------------------------------------------------------------------------


def _run_on_rank(strategy: str, rows: Sequence[str], columns: Sequence[str]) -> list[Outcome]:
    way = WAYS[strategy]
    if way.accelerator == "tpu":
        _stand_in_for_xla()
    found: list[Outcome] = []
    for precision in rows:
        if way.accelerator == "cpu" and precision in AS_ANOTHER:
            found += _construct_row(way, precision, columns)
        else:
            found += _run_row(way, precision, columns)
    return found


def _stand_in_for_xla() -> None:
    from tests import xla_stand_in

    from lightning.fabric.accelerators import XLAAccelerator

    xla_stand_in.install()
    XLAAccelerator.get_parallel_devices = staticmethod(  # type: ignore[method-assign]
        lambda devices: [xla_stand_in.device()] * (devices if isinstance(devices, int) else len(devices))
    )


def _run_row(way: Way, precision: str, columns: Sequence[str]) -> Iterator[Outcome]:
    fabric: Fabric | None = None

    def make(cell: _Cell) -> Fabric:
        nonlocal fabric
        if fabric is None:
            flags = _flags(precision, way.family)
            made = Fabric(accelerator=way.accelerator, devices=way.ranks, strategy=way.make(), **flags)
            cell.when = "launch"
            made._join()  # the processes are there already, however the strategy would have started them
            fabric = made
        return fabric

    for feature in columns:
        yield _Cell(way, precision, feature).run(make)


def _construct_row(way: Way, precision: str, columns: Sequence[str]) -> Iterator[Outcome]:
    """A row that is another one, cell by cell, which construction says with a warning."""
    other = AS_ANOTHER[precision]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fabric = Fabric(accelerator=way.accelerator, devices=way.ranks, strategy=way.make(), precision=precision)
    found = fabric.strategy.precision.precision
    wrong = () if found == other else (f"the precision is {found!r}, not {other!r}",)
    warned = tuple(str(warning.message) for warning in caught)
    if fabric.global_rank == 0 and not any("is not possible on the CPU" in text for text in warned):
        wrong += (f"no warning says that the precision becomes {other!r}",)
    for feature in columns:
        yield Outcome(precision, feature, wrong=wrong, same_as=other)


@cache
def by_ranks(strategy: str) -> list[list[Outcome]]:
    """Run all cells of a strategy, in processes of their own; what each rank says of them."""
    return on_ranks(WAYS[strategy].ranks, _run_on_rank, strategy, ROWS, COLUMNS, timeout=300.0)


# ---- what is refused -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refusal:
    """What cells are refused, by patterns; with which error, when, and what its message says of what would work."""

    strategies: str
    precisions: str
    features: str
    when: str
    error: str
    words: str

    def fits(self, strategy: str, precision: str, feature: str) -> bool:
        pairs = ((strategy, self.strategies), (precision, self.precisions), (feature, self.features))
        return all(any(fnmatchcase(value, pattern) for pattern in patterns.split("|")) for value, patterns in pairs)


REFUSED = (
    # precisions
    Refusal("*", "transformer-engine*", "*", "construction", "ValueError", "Use accelerator='cuda'"),
    Refusal("deepspeed*|*xla*", "64-true|float8", "*", "construction", "ValueError", "It can in: "),
    Refusal("*xla*", "16-mixed|bf16-mixed", "*", "construction", "ValueError", "It can in: "),
    Refusal("*xla*", f"{SCALED}|bitsandbytes*", "*", "construction", "ValueError", "must be one of '32-true', "),
    Refusal("deepspeed*", f"16-true|{SCALED}", "*", "launch", "ValueError", "Use precision='bf16-"),
    Refusal("deepspeed*", "bitsandbytes*", "*", "construction", "ValueError", "Pass `precision='bf16-mixed'`"),
    Refusal("fsdp*", "bitsandbytes*", "*", "construction", "TypeError", "Use `FSDPPrecision`"),
    Refusal("tensor parallel|fully_shard", "bitsandbytes*", "*", "construction", "TypeError", "or strategy='ddp'"),
    # the order of set-up
    Refusal("tensor parallel|fully_shard", "*", "joint", "set-up", "RuntimeError", "`model = fabric.setup_module("),
    Refusal("deepspeed*", "*", "separate", "set-up", "NotImplementedError", "Call `fabric.setup(model, optimizer)`"),
    Refusal("xla", "*", "separate", "set-up", "RuntimeError", "Call `fabric.setup(model, optimizer)`"),
    # clipping
    Refusal("deepspeed*", "*", "clip *", "the call", "NotImplementedError", "gradient_clipping"),
    Refusal("xla_fsdp", "*", "clip value", "the call", "NotImplementedError", "Clip by norm: "),
)


def refusal_of(strategy: str, precision: str, feature: str) -> Refusal | None:
    return next((refusal for refusal in REFUSED if refusal.fits(strategy, precision, feature)), None)


def complaints(strategy: str) -> list[str]:
    """Run all cells of a strategy; a sentence for each in which something is other than it is written down here."""
    first, *others = by_ranks(strategy)
    found = [f"{_name(outcome)} {sentence}" for outcome in first for sentence in _complaints(strategy, outcome)]
    for rank, outcomes in enumerate(others, start=1):
        differ = [its for mine, its in zip(first, outcomes, strict=True) if _facts(mine) != _facts(its)]
        found += [f"{_name(its)} is other on rank {rank} than on rank 0: {_facts(its)}" for its in differ]
    return found


def _complaints(strategy: str, outcome: Outcome) -> Iterator[str]:
    expected = refusal_of(strategy, outcome.precision, outcome.feature)
    if outcome.when is not None:
        raised = f"raises {outcome.error} at {outcome.when}: {outcome.message}"
        if expected is None:
            yield raised
        elif (outcome.when, outcome.error) != (expected.when, expected.error) or expected.words not in outcome.message:
            yield f"{raised}, and not {expected.error} at {expected.when} with {expected.words!r}"
    elif expected is not None and not outcome.same_as:
        yield f"runs, but is to raise {expected.error} at {expected.when}"
    yield from outcome.wrong


def _name(outcome: Outcome) -> str:
    return f"{outcome.precision}, {outcome.feature}:"


def _facts(outcome: Outcome) -> Outcome:
    return dataclasses.replace(outcome, warned=())  # rank 0 warns


# ---- accelerators that are not here ----------------------------------------------------------------------------------

MACHINES = {"cuda": (Machine(cuda=2), 2), "mps": (Machine(mps=True), 1), "tpu": (Machine(tpu=2), 2)}
MODEL_PARALLEL = "ModelParallelStrategy"
ENTRIES = {**STRATEGIES, MODEL_PARALLEL: UNNAMED[0]}


def planned(accelerator: str, strategy: str, precision: str) -> str:
    """What ``Fabric(...)`` says on a machine with the accelerator: "" if it accepts, else the error and its message."""
    machine, devices = MACHINES[accelerator]
    entry = ENTRIES[strategy]
    own = precision not in PRECISIONS
    flags = Flags(
        accelerator=accelerator,
        strategy=strategy if strategy in STRATEGIES else StrategyObject(f"{strategy}(...)", entry),
        devices=devices if entry.many_devices else 1,
        precision=None if own else precision,
        plugins=(Part(precision, "precision"),) if own else (),
    )
    try:
        resolve(flags, machine)
        device_type = "xla" if accelerator == "tpu" else accelerator
        made = _make(strategy)
        made.precision = _precision_of(precision, device_type, entry)
        made.precision.computes_on(device_type)
    except Exception as refusal:
        return f"{type(refusal).__name__}: {_steady(str(refusal))}"
    return ""


def _make(strategy: str) -> Strategy:
    return _model_parallel(_shard, 1, 1) if strategy == MODEL_PARALLEL else STRATEGY_REGISTRY.get(strategy)


def _precision_of(precision: str, device_type: str, entry: StrategyEntry) -> Precision:
    """The plug-in that a strategy would get; in place of one whose package is not here, an object with its name."""
    family = entry.precision.rpartition(":")[2].removesuffix("Precision").lower() if entry.precision else "ordinary"
    if precision not in PRECISIONS:
        plugin: Precision = _flags(precision, family, device_type)["plugins"]
        return plugin
    if precision.startswith("transformer-engine"):
        return type("TransformerEnginePrecision", (Precision,), {"precision": precision})()
    made: Precision = build_precision(precision, device_type, entry.precision)
    return made


# ---- the page --------------------------------------------------------------------------------------------------------

_HEAD = """\
# What goes together

Every strategy with every precision, and each of them with
{columns}.
Each cell of these tables was either run, or refused with an error that says what would work. The page is written by
`python -m tests.support_table --write` from what came of that, and a test fails where it is out of date.

**{run} cells run, {refused} are refused, {same} mean another precision. {different} differ from what is expected.**

A cell that runs trains a small model for {steps} steps, on the CPU. It is looked at for the dtypes of parameters,
gradients and buffers, of what `forward` receives, what a layer returns and what the user gets; for the classes that
wrap the module, and those of layers and parameters; for each trained parameter having changed; and for the result,
which is that of plain PyTorch in one process: within {tight:.0e} in 32 bit, and within rounding in fewer.

| | |
| --- | --- |
| ✓ | runs |
| ✗ 1 | refused: note 1 says when, and with which error |
| = | the precision means another one here, as a warning says: {same_as} |
| joint | `fabric.setup(model, optimizer)` |
| separate | `fabric.setup_module(model)`, then `fabric.setup_optimizers(optimizer)` |
| compile | `torch.compile(model)` before set-up: compiled again outside of wrappers, the model in one graph |
| empty_init | made under `fabric.init_module(empty_init=True)`, then filled from a state dict |
| clip norm, clip value | `fabric.clip_gradients(..., max_norm=...)`, `fabric.clip_gradients(..., clip_val=...)` |
| accumulation | two micro-batches, the first under `fabric.no_backward_sync(model)` |
| 16-mixed plug-in | `plugins=MixedPrecision("16-mixed", "cpu")`, or the strategy's own class: with a gradient scaler |
| bitsandbytes *mode* | `plugins=BitsandbytesPrecision(mode)` |
"""

_STRATEGIES = """\
## Strategies

`ddp` stands for all `ddp_*`: one class, whose processes are started in other ways, or which looks for unused
parameters. `deepspeed` and `deepspeed_*_offload*` differ from `deepspeed_stage_*` by their configuration alone.
`tensor parallel` and `fully_shard` are `ModelParallelStrategy`, with a function that splits layers or shares them out.
Strategies for XLA devices run on a stand-in for torch_xla.
"""

_ACCELERATORS = """\
## Other accelerators

Not run here: what `Fabric(...)` says on a machine with two GPUs (`cuda`), an Apple GPU (`mps`), or two TPU cores
(`tpu`). ✓ is: accepted. What only the device tells, such as a GPU too old for float8, is refused at set-up there.
"""


class _Notes:
    """Refusals by number."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, when: str, error: str, message: str, strategy: str, precision: str) -> str:
        """Return what stands in the cell; what differs by strategy and precision alone is one note."""
        for name in (
            strategy,
            precision,
            precision.rpartition(" ")[2],
            "16-mixed" if precision == SCALED else precision,
        ):
            message = message.replace(f"={name!r}", "=…").replace(f"is for {name!r}", "is for another")
        message = re.sub(r"\w*XLA\w*Strategy", "The strategy", message)
        text = f"At {when}, `{error}`: {message}"
        if text not in self.texts:
            self.texts.append(text)
        return f"✗ {self.texts.index(text) + 1}"


def page(outcomes: Mapping[str, Sequence[Outcome]]) -> str:
    """Return the page, from the outcomes of all strategies."""
    notes = _Notes()
    every = [outcome for of_strategy in outcomes.values() for outcome in of_strategy]
    head = _HEAD.format(
        columns=", ".join(COLUMNS),
        run=sum(not outcome.when and not outcome.same_as for outcome in every),
        refused=sum(outcome.when is not None for outcome in every),
        same=sum(bool(outcome.same_as) for outcome in every),
        different=sum(bool(outcome.wrong) for outcome in every),
        same_as=", ".join(f"`{name}` is `{other}`" for name, other in AS_ANOTHER.items()),
        steps=STEPS,
        tight=TOLERANCES["32-true"],
    )
    parts = [head, _STRATEGIES, *_sections(outcomes, notes), _dtypes_section()]
    parts += [_ACCELERATORS, *(_accelerator_section(accelerator, notes) for accelerator in MACHINES)]
    parts += ["## Notes\n", *(f"{number}. {text}" for number, text in enumerate(notes.texts, start=1))]
    return "\n".join(parts) + "\n"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(header), ["---"] * len(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    lines[1] = ["-" * width for width in widths]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def _sections(outcomes: Mapping[str, Sequence[Outcome]], notes: _Notes) -> Iterator[str]:
    """A table for each group of strategies that are alike in every cell."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for strategy, of_strategy in outcomes.items():
        marks = tuple(_mark(strategy, outcome, notes) for outcome in of_strategy)
        groups.setdefault(marks, []).append(strategy)
    for marks, strategies in groups.items():
        yield f"### {', '.join(strategies)}\n"
        yield "".join(f"* `{strategy}`: {_made_of(WAYS[strategy])}\n" for strategy in strategies)
        rows = ([row, *marks[i * len(COLUMNS) : (i + 1) * len(COLUMNS)]] for i, row in enumerate(ROWS))
        yield _table(("precision", *COLUMNS), rows) + "\n"


def _made_of(way: Way) -> str:
    module = " around ".join(f"`{name}`" for name in way.wrapper) if way.wrapper != ("Net",) else "the model itself"
    processes = "one process" if way.ranks == 1 else f"{way.ranks} processes"
    module = module.replace("`Net`", "the model")
    graphs = "" if way.graphs == 1 else f"; it is compiled in {way.graphs} graphs"
    return f"{processes}; what is called is {module}; parameters are `{way.parameter}`{graphs}."


def _mark(strategy: str, outcome: Outcome, notes: _Notes) -> str:
    if outcome.when is not None:
        return notes.mark(outcome.when, outcome.error, outcome.message, strategy, outcome.precision)
    return "=" if outcome.same_as else "✓"


def _dtypes_section() -> str:
    header = ("strategies", "precision", "parameters, gradients", "buffers", "`forward` gets", "layers return")
    rows = []
    for family, by_precision in DTYPES.items():
        names = [name for name, way in WAYS.items() if way.family == family]
        shown = ", ".join(names)
        for precision, dtypes in by_precision.items():
            if any(refusal_of(name, precision, "accumulation") is None for name in names):
                rows.append([shown, precision, *_dtype_names(dtypes)])
                shown = ""
    return "### Dtypes\n\nOf cells that run. What the user gets is 32-bit.\n\n" + _table(header, rows) + "\n"


def _dtype_names(dtypes: Dtypes) -> list[str]:
    names = [dtype_name(dtype) for dtype in (dtypes.stored, dtypes.buffers, dtypes.received, dtypes.computed)]
    if dtypes.codes is not None:
        names[0] += f", {dtype_name(dtypes.codes)} (quantised)"
    return names


def _accelerator_section(accelerator: str, notes: _Notes) -> str:
    accepting: dict[tuple[str, ...], list[str]] = {}
    refusing: dict[str, list[str]] = {}
    for strategy in ENTRIES:
        said = [planned(accelerator, strategy, precision).partition(": ") for precision in ROWS]
        marks = tuple(
            notes.mark("construction", error, message, strategy, precision) if error else "✓"
            for precision, (error, _, message) in zip(ROWS, said, strict=True)
        )
        if len(set(marks)) == 1 and marks[0] != "✓":
            refusing.setdefault(marks[0], []).append(strategy)
        else:
            accepting.setdefault(marks, []).append(strategy)
    header = ("precision", *(_families(strategies) for strategies in accepting.values()))
    rows = ([precision, *(marks[i] for marks in accepting)] for i, precision in enumerate(ROWS))
    refused = "".join(f"\nIn any precision {mark}: {_families(names)}.\n" for mark, names in refusing.items())
    return f"### {accelerator}\n\n{_table(header, rows)}\n{refused}"


def _families(strategies: list[str]) -> str:
    """The names, with those of a whole family as one."""
    shown = list(strategies)
    for family in ("ddp", "fsdp", "deepspeed"):
        members = [name for name in ENTRIES if name.startswith(family)]
        if set(members) <= set(shown):
            shown = [f"{family}_*" if name == members[0] else name for name in shown if name not in members[1:]]
    return ", ".join(shown)


def everything() -> dict[str, list[Outcome]]:
    """Run all cells of all strategies."""
    return {strategy: by_ranks(strategy)[0] for strategy in WAYS}


def main() -> None:
    parser = argparse.ArgumentParser(description="Run every cell of the table of what goes together.")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name} from it")
    write = parser.parse_args().write
    found = [f"{strategy}: {sentence}" for strategy in WAYS for sentence in complaints(strategy)]
    if write:
        PAGE.write_text(page(everything()), encoding="utf-8")
    sys.exit("\n".join(found) or None)


if __name__ == "__main__":
    main()
