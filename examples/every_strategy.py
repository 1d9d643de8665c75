"""Train the transformer under every strategy, and compare each run with that of one process.

    python examples/every_strategy.py

The limit is on the largest difference of a loss, over all steps, and of a weight, at the end. Every run computes in 32
bits from the same batches; what is left are sums taken in another order. Exits with 1 if a row is over its limit.
"""

import argparse
import importlib.util
import io
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
import transformer
from torch import Tensor

from lightning.fabric import Fabric
from lightning.fabric.testing import on_ranks, preload

preload("lightning.fabric.strategies.fsdp", "lightning.fabric.strategies.model_parallel")

SHARDED = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD")
LIMIT, DEEPSPEED_LIMIT = 1e-5, 1e-4  # DeepSpeed has optimizers and norms of its own
TIMEOUT = 600.0  # the first time, DeepSpeed compiles parts of itself


@dataclass(frozen=True)
class Row:
    """One training run: a line of the table."""

    name: str
    ranks: int
    arguments: tuple[str, ...]
    limit: float = LIMIT
    package: str | None = None  # that has to be installed

    @property
    def can_run(self) -> bool:
        return self.package is None or importlib.util.find_spec(self.package) is not None

    def __str__(self) -> str:
        return f"{self.name}, {self.ranks} rank{'s' * (self.ranks > 1)}"


@dataclass(frozen=True)
class Run:
    """What came out of a row: the loss of every step and the trained weights."""

    losses: list[float]
    weights: dict[str, Tensor]
    seconds: float

    def differences(self, other: "Run") -> tuple[float, float]:
        """Return the largest difference of a loss, and of a weight."""
        losses = max(abs(a - b) for a, b in zip(self.losses, other.losses, strict=True))
        pairs = ((self.weights[name], weight) for name, weight in other.weights.items())
        return losses, max((a - b).abs().max().item() for a, b in pairs)


def _rows() -> Iterator[Row]:
    for ranks in (1, 2, 4):
        yield Row("ddp", ranks, ("--strategy=ddp",))
    for sharding in SHARDED:
        for ranks in (1, 2, 4):
            yield Row(f"fsdp {sharding}", ranks, ("--strategy=fsdp", f"--sharding={sharding}"))
    yield Row("fsdp HYBRID_SHARD 2x2", 4, ("--strategy=fsdp", "--sharding=HYBRID_SHARD", "--mesh", "2", "2"))
    yield Row("fsdp, made on meta", 2, ("--strategy=fsdp", "--meta"))
    split = ("--strategy=tensor_parallel", "--tensor-parallel=2")
    yield Row("tensor parallel", 2, split)
    yield Row("tensor parallel x data parallel", 4, (*split, "--data-parallel=2"))
    yield Row("the same, made on meta", 4, (*split, "--data-parallel=2", "--meta"))
    for stage in (1, 2, 3):
        for ranks in (1, 2, 4):
            arguments = (f"--strategy=deepspeed_stage_{stage}",)
            yield Row(f"deepspeed stage {stage}", ranks, arguments, DEEPSPEED_LIMIT, package="deepspeed")


SINGLE = Row("one process", 1, ("--strategy=single_device",), limit=0.0)
ROWS = tuple(_rows())


def run(row: Row, more: Sequence[str] = ()) -> Run:
    """Train on as many processes as the row says."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pt"
        start = time.perf_counter()
        arguments = [*row.arguments, *more, f"--out={path}"]
        losses, *others = on_ranks(row.ranks, _train, arguments, row.ranks, timeout=TIMEOUT)
        took = time.perf_counter() - start
        assert all(other == losses for other in others), "ranks disagree about the loss of the global batch"
        return Run(losses, weights_in(path), took)


def _train(arguments: list[str], devices: int) -> list[float]:
    """What each rank runs, quietly."""
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "DeepSpeedStrategy cannot leave out gradient synchronisation")
    args = transformer.parse_args(arguments)
    way = transformer.choose(args)
    fabric = Fabric(accelerator="cpu", devices=devices, strategy=way.strategy)
    with redirect_stdout(io.StringIO()):
        return fabric.launch(transformer.train, args, way)


def weights_in(path: Path) -> dict[str, Tensor]:
    """Return the weights that a run has saved, in plain form."""
    if path.is_dir():  # DeepSpeed's own form: a folder with a file for each rank
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            return get_fp32_state_dict_from_zero_checkpoint(str(path))
    return torch.load(path)["model"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows that have this in their names")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    more = [f"--steps={args.steps}"]

    print(f"{'strategy':<32} {'ranks':>5} {'loss':>9} {'weights':>9} {'limit':>7} {'seconds':>8}")
    single = run(SINGLE, more)
    _print(SINGLE, "-", "-", single.seconds)
    over = 0
    for row in (row for row in ROWS if args.only in row.name):
        if not row.can_run:
            print(f"{row.name:<32} {row.ranks:>5} not run: pip install {row.package}")
            continue
        result = run(row, more)
        loss, weight = result.differences(single)
        _print(row, f"{loss:.1e}", f"{weight:.1e}", result.seconds, is_over := not max(loss, weight) <= row.limit)
        over += is_over
    print(f"\n{over} over the limit" if over else "\nevery row is within its limit")
    return int(over > 0)


def _print(row: Row, loss: str, weight: str, seconds: float, is_over: bool = False) -> None:
    mark = "  OVER" if is_over else ""
    print(f"{row.name:<32} {row.ranks:>5} {loss:>9} {weight:>9} {row.limit:>7.0e} {seconds:>8.1f}{mark}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
