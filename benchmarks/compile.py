"""What Fabric adds to a compiled model: graphs, for each strategy and precision; the time of a step.

python benchmarks/compile.py [--rounds 60] [--calls 20]

"before": `fabric.setup(torch.compile(model))`; "after": `torch.compile(fabric.setup(model))`; "blocks": each block by
itself. By hand, the same is done with torch alone: DDP or `fully_shard`, `torch.compile`, and around it (after: in it)
what the precision is. A graph more is a graph break more. Steps are timed as in `fsdp.py`: both sides in the same
processes, in turns, and one of them twice.
"""

import argparse
import itertools
import operator
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from measure import blocks_in_turns, report
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning.fabric import Fabric
from lightning.fabric.testing import on_ranks, preload

preload("torch.distributed.fsdp", "torch.distributed.tensor")

WIDTH, BLOCKS, BATCH = 256, 4, 32
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
Compile = Callable[[nn.Module], Any]
Step = Callable[[], None]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class InPrecision(nn.Module):
    """By hand: what a precision does around a module."""

    def __init__(self, module: nn.Module, precision: str) -> None:
        super().__init__()
        self.module, self.precision = module, precision

    def forward(self, x: Tensor) -> Tensor:
        if self.precision == "bf16-mixed":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.module(x).float()
        if self.precision == "bf16-true":
            return self.module(x.bfloat16()).float()
        return self.module(x)


def make() -> nn.Module:
    torch.manual_seed(0)
    return Net()


# ---- graphs ----------------------------------------------------------------------------------------------------------


def by_hand(strategy: str, precision: str, when: str, compile_: Compile) -> Any:
    model: Any = make().to(torch.bfloat16 if precision == "bf16-true" else torch.float32)
    if when == "blocks":
        for name, block in list(model.blocks.named_children()):
            model.blocks[int(name)] = compile_(block)
    if strategy == "ddp":
        model = DistributedDataParallel(model)
    elif strategy == "fsdp":
        share_out(model, precision)
    if when == "after":
        return compile_(InPrecision(model, precision))
    return InPrecision(compile_(model) if when == "before" else model, precision)


def share_out(model: Any, precision: str) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if precision == "bf16-mixed" else MixedPrecisionPolicy()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def by_fabric(strategy: str, precision: str, when: str, compile_: Compile) -> Any:
    fabric = launched(strategy, 1, precision)
    if when == "after":
        return compile_(fabric.setup(make()))
    return fabric.setup(compile_(make()), _reapply_compile="blocks" if when == "blocks" else True)


def launched(strategy: str, ranks: int, precision: Any = None) -> Fabric:
    chosen: Any = "auto" if strategy == "single" else strategy
    if strategy == "fsdp":
        from lightning.fabric.strategies import FSDPStrategy

        chosen = FSDPStrategy(auto_wrap_policy={Block})
    fabric = Fabric(accelerator="cpu", devices=ranks, strategy=chosen, precision=precision)
    fabric.launch()
    return fabric


def graphs(model_of: Callable[[Compile], Any]) -> int:
    """Return how many graphs there are after three steps."""
    torch._dynamo.reset()
    found: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        found.append(graph)
        return graph

    model = model_of(partial(torch.compile, backend=backend))
    for _ in range(3):
        model(torch.ones(2, WIDTH)).sum().backward()
    return len(found)


def count_graphs() -> list[list[Any]]:
    launched("ddp", 1)
    cases = itertools.product(("single", "ddp", "fsdp"), PRECISIONS, ("before", "after", "blocks"))
    return [[*case, graphs(partial(by_hand, *case)), graphs(partial(by_fabric, *case))] for case in cases]


# ---- time ------------------------------------------------------------------------------------------------------------


def step_of(model: Any, optimizer: Any, backward: Callable[[Tensor], None]) -> Step:
    batch = torch.linspace(-1, 1, BATCH * WIDTH).reshape(BATCH, WIDTH)

    def step() -> None:
        optimizer.zero_grad()
        backward(model(batch).square().mean())
        optimizer.step()

    return step


def step_by_hand(strategy: str) -> Step:
    model: Any = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model = torch.compile(DistributedDataParallel(model) if strategy == "ddp" else model)
    return step_of(model, optimizer, Tensor.backward)


def step_by_fabric(fabric: Fabric) -> Step:
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model, optimizer = fabric.setup(torch.compile(model), optimizer)
    return step_of(model, optimizer, fabric.backward)


def time_steps(strategy: str, ranks: int, rounds: int, calls: int) -> dict[str, list[float]]:
    """On each rank: the milliseconds of a step, the median of each block, for all sides."""
    fabric = launched(strategy, ranks)
    steps = {"by hand": step_by_hand(strategy), "fabric": step_by_fabric(fabric), "again": step_by_hand(strategy)}
    return blocks_in_turns(steps, rounds, calls, fabric.barrier)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--calls", type=int, default=20)
    args = parser.parse_args()

    [counts] = on_ranks(1, count_graphs, timeout=1200)
    rows = [[", ".join(case), "graphs", hand, ours, ours - hand] for *case, hand, ours in counts]
    raw = {}
    for strategy, ranks in (("single", 1), ("ddp", 2)):
        found = on_ranks(ranks, time_steps, strategy, ranks, args.rounds, args.calls, timeout=1800)[0]
        for name in ("fabric", "again"):
            ratio = statistics.median(map(operator.truediv, found[name], found["by hand"]))
            middle = statistics.median(found["by hand"]), statistics.median(found[name])
            title = f"{strategy}, {ranks} rank{'s' * (ranks > 1)}" + (", by hand again" if name == "again" else "")
            rows.append([title, "ms per step", *middle, f"{ratio:.3f}"])
        raw[strategy] = {name: [round(ms, 3) for ms in blocks] for name, blocks in found.items()}
    report("compile", ["", "", "by hand", "fabric", "more / ratio"], rows, milliseconds_of_blocks=raw)


if __name__ == "__main__":
    main()
