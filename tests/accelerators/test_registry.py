import subprocess
import sys

import pytest

from lightning.fabric.accelerators import ACCELERATOR_REGISTRY, CPUAccelerator, CUDAAccelerator
from lightning.fabric.accelerators.registry import _AcceleratorRegistry
from lightning.fabric.utilities.exceptions import MisconfigurationException


class FridgeAccelerator(CPUAccelerator):
    def __init__(self, shelf=0):
        self.shelf = shelf


@pytest.fixture
def registry():
    return _AcceleratorRegistry({})


def test_the_library_knows_these():
    assert ACCELERATOR_REGISTRY.available_accelerators() == ["cpu", "cuda", "mps", "tpu"]
    assert type(ACCELERATOR_REGISTRY.get("cuda")) is CUDAAccelerator
    assert ACCELERATOR_REGISTRY.get("cpu") is not ACCELERATOR_REGISTRY.get("cpu")


def test_what_is_registered_is_made_with_its_arguments(registry):
    registry.register("fridge", FridgeAccelerator, description="cold", shelf=3)
    assert "fridge" in registry
    assert len(registry) == 1
    assert registry.get("fridge").shelf == 3
    assert registry.get_class("fridge") is FridgeAccelerator


def test_as_a_decorator_it_returns_the_class(registry):
    assert registry.register("fridge", shelf=2)(FridgeAccelerator) is FridgeAccelerator
    assert registry.get("fridge").shelf == 2


def test_a_class_can_register_itself(registry):
    CUDAAccelerator.register_accelerators(registry)
    assert registry.available_accelerators() == ["cuda"]


def test_a_taken_name_needs_override(registry):
    registry.register("fridge", FridgeAccelerator)
    with pytest.raises(MisconfigurationException, match="'fridge' is already registered"):
        registry.register("fridge", CPUAccelerator)
    registry.register("fridge", CPUAccelerator, override=True)
    assert type(registry.get("fridge")) is CPUAccelerator


def test_a_name_is_a_string(registry):
    with pytest.raises(TypeError, match="must be a string, but got 5"):
        registry.register(5, FridgeAccelerator)


def test_what_is_removed_is_gone(registry):
    registry.register("fridge", FridgeAccelerator)
    registry.remove("fridge")
    assert "fridge" not in registry
    for forget in (registry.remove, registry.get):
        with pytest.raises(KeyError, match="Unknown accelerator 'fridge'"):
            forget("fridge")


@pytest.mark.slow
def test_reading_the_names_imports_no_torch():
    code = (
        "import sys\n"
        "from lightning.fabric.accelerators import ACCELERATOR_REGISTRY\n"
        "ACCELERATOR_REGISTRY.available_accelerators()\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
