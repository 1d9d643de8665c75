"""What Fabric adds to one training step: a tiny MLP on one process, bare PyTorch and Fabric taking turns.

python benchmarks/step.py [--rounds 200] [--calls 50]
"""

import argparse
import operator
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from measure import per_call, report, take_turns
from torch import nn

from lightning.fabric import Fabric

Step = Callable[[], None]
AUTOCAST: dict[str, Callable[[], AbstractContextManager]] = {
    "32-true": nullcontext,
    "bf16-mixed": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


def tiny() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    return model, torch.optim.SGD(model.parameters(), lr=0.01)


BATCH, TARGET = torch.randn(8, 32), torch.randn(8, 2)


def bare(precision: Any) -> Step:
    model, optimizer = tiny()
    autocast = AUTOCAST[precision]

    def step() -> None:
        optimizer.zero_grad()
        with autocast():
            output = model(BATCH)
        loss = nn.functional.mse_loss(output.float(), TARGET)
        loss.backward()
        optimizer.step()

    return step


def with_fabric(precision: Any) -> Step:
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    model, optimizer = fabric.setup(*tiny())

    def step() -> None:
        optimizer.zero_grad()
        output = model(BATCH)
        loss = nn.functional.mse_loss(output, TARGET)
        fabric.backward(loss)
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--calls", type=int, default=50)
    args = parser.parse_args()
    torch.set_num_threads(1)

    rows, raw = [], {}
    for precision in AUTOCAST:
        steps = {"bare": bare(precision), "fabric": with_fabric(precision)}
        for step in steps.values():
            per_call(step, args.calls)  # warm up
        turns = {name: partial(per_call, step, args.calls) for name, step in steps.items()}
        found = take_turns(turns, args.rounds)
        micro = {name: [value * 1e6 for value in values] for name, values in found.items()}
        figures = {name: (statistics.median(values), min(values)) for name, values in micro.items()}
        extra = statistics.median(map(operator.sub, micro["fabric"], micro["bare"]))
        figures["fabric - bare"] = (extra, figures["fabric"][1] - figures["bare"][1])
        rows += [[precision, name, *pair] for name, pair in figures.items()]
        raw[precision] = micro
    report("step", ["precision", "us per step", "median", "min"], rows, microseconds=raw)


if __name__ == "__main__":
    main()
