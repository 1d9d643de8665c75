"""``import lightning.fabric`` costs next to nothing over ``import torch``. Counted in modules, which do not flicker."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

HEAVY = [
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch.distributed.tensor",
    "torch._dynamo",
    "torch.utils.tensorboard",
    "deepspeed",
]


def _modules_after(code: str) -> set[str]:
    code += "\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


@pytest.fixture(scope="module")
def with_torch() -> set[str]:
    return _modules_after("import torch, torch.utils.data, torch.distributed")


@pytest.mark.parametrize(
    "code",
    [
        "import lightning, lightning.fabric, lightning_fabric",
        "import lightning.fabric.strategies, lightning.fabric.plugins, lightning.fabric.accelerators",
        "import lightning.fabric.loggers, lightning.fabric.utilities",
        "import lightning.fabric._plan, lightning.fabric.cli",
    ],
)
def test_packages_import_without_torch(code: str) -> None:
    assert "torch" not in _modules_after(code)


@pytest.mark.parametrize(
    "code",
    [
        "import lightning.fabric; from lightning.fabric import Fabric",
        "from lightning.fabric import Fabric; Fabric(accelerator='cpu', devices=2, strategy='ddp')",
        "from lightning.fabric.loggers import CSVLogger, TensorBoardLogger",
    ],
)
def test_leaves_heavy_parts_alone(code: str) -> None:
    loaded = _modules_after(code)
    assert "torch" in loaded
    assert [name for name in HEAVY if name in loaded] == []


def test_loads_few_modules_that_torch_has_not(with_torch: set[str]) -> None:
    extra = _modules_after("from lightning.fabric import Fabric") - with_torch
    foreign = {name for name in extra if name.split(".")[0] not in ("lightning", "lightning_fabric")}
    assert len(extra) < 90
    assert len(foreign) < 10, sorted(foreign)
