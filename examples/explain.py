"""What `fabric.explain()` says of the transformer under every strategy.

    python examples/explain.py                             # print it
    python examples/explain.py --only fsdp
    python examples/explain.py --write docs/explain.md     # put it at the end of that page

Versions and figures of memory are left out, so that the page only changes where the library does.
"""

import argparse
import importlib.util
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import transformer

from lightning.fabric import Fabric
from lightning.fabric.testing import on_ranks, preload

preload("lightning.fabric.strategies.fsdp", "lightning.fabric.strategies.model_parallel")

MARK = "<!-- What follows is written by `python examples/explain.py --write docs/explain.md`. -->"
TIMEOUT = 600.0  # the first time, DeepSpeed compiles parts of itself


@dataclass(frozen=True)
class Case:
    """The transformer under one strategy: a section of the page."""

    title: str
    ranks: int
    arguments: tuple[str, ...]
    precision: str | None = None
    package: str | None = None  # that has to be installed

    @property
    def can_run(self) -> bool:
        return self.package is None or importlib.util.find_spec(self.package) is not None


def _cases() -> Iterator[Case]:
    yield Case("One process", 1, ("--strategy=single_device",))
    yield Case("DDP", 2, ("--strategy=ddp",))
    yield Case("DDP in mixed precision", 2, ("--strategy=ddp",), precision="bf16-mixed")
    yield Case("FSDP", 2, ("--strategy=fsdp",))
    yield Case("FSDP in bfloat16", 2, ("--strategy=fsdp",), precision="bf16-true")
    yield Case("FSDP, hybrid", 4, ("--strategy=fsdp", "--sharding=HYBRID_SHARD", "--mesh", "2", "2"))
    yield Case("Tensor parallel", 2, ("--strategy=tensor_parallel",))
    yield Case("Tensor parallel with FSDP", 4, ("--strategy=tensor_parallel", "--data-parallel=2"))
    for stage in (1, 2, 3):
        arguments = (f"--strategy=deepspeed_stage_{stage}",)
        yield Case(f"DeepSpeed, stage {stage}", 2, arguments, "bf16-mixed" if stage == 2 else None, "deepspeed")


CASES = tuple(_cases())


def section(case: Case) -> str:
    """What rank 0 says."""
    return on_ranks(case.ranks, _explain, list(case.arguments), case.ranks, case.precision, timeout=TIMEOUT)[0]


def _explain(arguments: list[str], devices: int, precision: Any) -> str:
    """What each rank runs."""
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    args = transformer.parse_args(arguments)
    way = transformer.choose(args)
    fabric = Fabric(accelerator="cpu", devices=devices, strategy=way.strategy, precision=precision)
    fabric.launch()
    model = transformer.Transformer(args.width, args.blocks, args.heads, args.context)
    if way.joint:
        model, optimizer = fabric.setup(model, transformer.adamw(model, args.lr))
    else:
        model = fabric.setup_module(model)
        optimizer = fabric.setup_optimizers(transformer.adamw(model, args.lr))
    loader = fabric.setup_dataloaders(transformer.micro_batches(fabric, args))
    explanation = replace(fabric.explain(), memory=None, versions={})
    del model, optimizer, loader
    return str(explanation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="sections that have this in their titles")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="replace the end of this page, from the mark on")
    args = parser.parse_args()
    sections = []
    for case in (case for case in CASES if args.only.lower() in case.title.lower()):
        if not case.can_run:
            raise SystemExit(f"{case.title} needs the package {case.package}: pip install {case.package}")
        sections.append(f"## {case.title}, {case.ranks} rank{'s' * (case.ranks > 1)}\n\n```\n{section(case)}\n```\n")
        if args.write is None:
            print(sections[-1], flush=True)
    if args.write is not None:
        kept = args.write.read_text().partition(MARK)[0]
        args.write.write_text("\n".join([f"{kept}{MARK}\n", *sections]))


if __name__ == "__main__":
    main()
