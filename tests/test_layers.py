"""Imports inside the package point up this list, never down; rooms in the row ``apart`` do not know each other."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning.fabric

ROOT = Path(lightning.fabric.__file__).parent
PACKAGE = "lightning.fabric"
ROWS: list[set[str]] = [
    {"_lazy", "utilities"},
    {"checkpoint"},
    apart := {
        "accelerators",
        "loggers",
        "plugins.collectives",
        "plugins.environments",
        "plugins.io",
        "plugins.precision",
    },
    {"plugins", "strategies.launchers"},
    {"strategies"},
    {"_accumulation", "_checkpoints", "_checks", "_plan", "connector", "observe", "wrappers"},
    {"fabric"},
    {"", "cli", "testing"},  # "" is the package itself: `from lightning.fabric import Fabric`
]
ROW_OF = {room: number for number, row in enumerate(ROWS) for room in row}
# What runs only where something is sharded: imported on first use, and by each other
SHARDED = {
    "checkpoint.comparison",
    "checkpoint.contents",
    "checkpoint.conversion",
    "plugins.precision.fsdp",
    "strategies._dtensor",
    "strategies._fsdp_module",
    "strategies._fsdp_options",
    "strategies._materialize",
    "strategies._mixed_groups",
    "strategies._sharded_holding",
    "strategies._sharded_files",
    "strategies._sharded_strategy",
    "strategies._wrap_policy",
    "strategies.fsdp",
    "strategies.model_parallel",
    "strategies.xla_fsdp",
    "utilities.sharded_folder",
}
HEAVY = ("torch.distributed.fsdp", "torch.distributed.checkpoint", "torch.distributed.tensor", "torch._dynamo")


def _modules() -> dict[str, Path]:
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.rglob("*.py")}
    return {name.removesuffix("__init__").removesuffix("."): path for path, name in names.items()}


MODULES = _modules()


def _room(module: str) -> str:
    """The longest room that the module is in; the module itself if there is none."""
    parts = module.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in ROW_OF), module)


def _imported(tree: ast.AST) -> Iterator[str]:
    """Full names of the modules that the code imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports name the module in full"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner.removeprefix(f"{PACKAGE}.") in MODULES else str(node.module)


def _downward(module: str, source: str) -> list[str]:
    is_package = module in MODULES and MODULES[module].name == "__init__.py"
    here, found = _room(module), []
    for name in _imported(ast.parse(source)):
        if name != PACKAGE and not name.startswith(f"{PACKAGE}."):
            continue
        target = name.removeprefix(PACKAGE).removeprefix(".")
        if is_package and (not module or target.startswith(f"{module}.")):
            continue  # a package may show what is in it
        there = _room(target)
        if here != there and (ROW_OF[there] > ROW_OF[here] or (here in apart and there in apart)):
            found.append(f"{module} imports {target or PACKAGE}")
    return found


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_up(module: str) -> None:
    assert _downward(module, MODULES[module].read_text()) == []


@pytest.mark.parametrize("module", sorted(MODULES.keys() - SHARDED))
def test_no_module_imports_heavy_parts_of_torch_at_its_top(module: str) -> None:
    top = ast.Module(ast.parse(MODULES[module].read_text()).body, [])
    top.body = [node for node in top.body if isinstance(node, ast.Import | ast.ImportFrom)]
    sharded = tuple(f"{PACKAGE}.{name}" for name in SHARDED)
    assert [name for name in _imported(top) if name.startswith((*HEAVY, *sharded))] == []


@pytest.mark.parametrize(
    ("module", "source", "is_downward"),
    [
        ("utilities.seed", "import torch, lightning.fabric.utilities.rank_zero", False),
        ("utilities.seed", "from lightning.fabric.strategies.ddp import DDPStrategy", True),
        ("strategies.ddp", "def f():\n    from lightning.fabric import Fabric", True),
        ("strategies.launchers.launcher", "from lightning.fabric.strategies import parallel", True),
        ("plugins.precision.half", "from lightning.fabric.accelerators.cpu import CPUAccelerator", True),
        ("fabric", "from lightning.fabric import _checks", False),
        ("plugins", "from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO", False),
    ],
)
def test_the_check_sees_an_import_that_points_down(module: str, source: str, is_downward: bool) -> None:
    assert bool(_downward(module, source)) is is_downward


def test_every_module_has_a_room() -> None:
    assert [module for module in MODULES if _room(module) not in ROW_OF] == []
