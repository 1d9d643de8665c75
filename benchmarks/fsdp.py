"""What Fabric adds to a step on one and two ranks: its FSDP against `fully_shard`, its DDP against torch's own.

python benchmarks/fsdp.py [--rounds 60] [--calls 10]

All sides live in the same processes (gloo on the CPU, one thread each) and take turns in short blocks, changing order.
The ratio to "by hand" is the median over rounds. "by hand" is there a second time: how far its ratio is from 1 says how
far another one may be by chance. On one rank, without a wait for others, what Fabric adds shows best.
"""

import argparse
import operator
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from measure import blocks_in_turns, report
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning.fabric import Fabric
from lightning.fabric.testing import on_ranks, preload

preload("torch.distributed.fsdp", "torch.distributed.tensor")

WIDTH, LAYERS, BATCH = 512, 4, 16  # 1 M parameters
Step = Callable[[], None]


def make() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layers = [part for _ in range(LAYERS) for part in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(*layers), torch.randn(BATCH, WIDTH)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def step_of(model: Any, optimizer: Any, batch: torch.Tensor, backward: Callable[[torch.Tensor], None]) -> Step:
    def step() -> None:
        optimizer.zero_grad()
        backward(model(batch).square().mean())
        optimizer.step()

    return step


def by_hand(kind: str) -> Step:
    model, batch = make()
    if kind == "fsdp":
        from torch.distributed.fsdp import fully_shard

        mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
        for part in model:
            if isinstance(part, nn.Linear):
                fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        model = DistributedDataParallel(model)
    return step_of(model, sgd(model), batch, torch.Tensor.backward)


def by_fabric(fabric: Fabric) -> Step:
    model, batch = make()
    model, optimizer = fabric.setup(model, sgd(model))
    return step_of(model, optimizer, batch, fabric.backward)


def launched(kind: str, ranks: int) -> Fabric:
    strategy: Any = kind
    if kind == "fsdp":
        from lightning.fabric.strategies import FSDPStrategy

        strategy = FSDPStrategy(auto_wrap_policy={nn.Linear})
    fabric = Fabric(accelerator="cpu", devices=ranks, strategy=strategy)
    fabric.launch()
    return fabric


def measure(kind: str, ranks: int, rounds: int, calls: int) -> dict[str, list[float]]:
    """On each rank: the milliseconds of a step, the median of each block, for all sides."""
    fabric = launched(kind, ranks)
    steps = {"by hand": by_hand(kind), "fabric": by_fabric(fabric), "by hand again": by_hand(kind)}
    return blocks_in_turns(steps, rounds, calls, fabric.barrier)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--calls", type=int, default=10)
    args = parser.parse_args()

    rows, raw = [], {}
    for ranks in (1, 2):
        for kind in ("ddp", "fsdp"):
            title = f"{kind}, {ranks} rank{'s' * (ranks > 1)}"
            found = on_ranks(ranks, measure, kind, ranks, args.rounds, args.calls, timeout=1200)[0]
            reference = found["by hand"]
            for name, blocks in found.items():
                ratio = statistics.median(map(operator.truediv, blocks, reference))
                rows.append([title, name, statistics.median(blocks), f"{ratio:.3f}"])
            raw[title] = {name: [round(ms, 3) for ms in blocks] for name, blocks in found.items()}
    report("fsdp", ["ms per step", "", "median", "ratio"], rows, milliseconds_of_blocks=raw)


if __name__ == "__main__":
    main()
