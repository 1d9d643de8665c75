import sys
from types import ModuleType

import pytest
import torch

from lightning.fabric.accelerators import TPUAccelerator, XLAAccelerator
from lightning.fabric.accelerators import xla as xla_module
from lightning.fabric.utilities import imports


class TestWithoutTorchXLA:
    @pytest.fixture(autouse=True)
    def _not_installed(self, monkeypatch):
        for module in (imports, xla_module):
            monkeypatch.setattr(module, "package_available", lambda name: False)

    def test_there_is_no_tpu(self):
        assert not XLAAccelerator.is_available()
        assert XLAAccelerator.auto_device_count() == 0

    def test_one_core_can_be_asked_for(self):
        assert XLAAccelerator.parse_devices(1) == 1

    def test_making_one_says_how_to_install_it(self):
        with pytest.raises(ModuleNotFoundError, match="pip install torch_xla"):
            XLAAccelerator()


class TestOnEightCores:
    @pytest.fixture(autouse=True)
    def _tpu(self, monkeypatch):
        """Put a torch_xla in place that reports eight cores."""
        internal = ModuleType("torch_xla._internal")
        internal.tpu = ModuleType("torch_xla._internal.tpu")
        internal.tpu.num_available_devices = lambda: 8
        monkeypatch.setitem(sys.modules, "torch_xla", ModuleType("torch_xla"))
        monkeypatch.setitem(sys.modules, "torch_xla._internal", internal)
        monkeypatch.setattr(xla_module, "package_available", lambda name: name == "torch_xla")

    def test_all_cores_are_there(self):
        assert XLAAccelerator.is_available()
        assert XLAAccelerator.auto_device_count() == 8

    @pytest.mark.parametrize(
        ("devices", "parsed", "indices"),
        [(1, 1, [0]), (8, 8, range(8)), ("8", 8, range(8)), ("auto", 8, range(8)), ([5], [5], [5]), ("5,", [5], [5])],
    )
    def test_one_core_all_cores_or_a_certain_core(self, devices, parsed, indices):
        assert XLAAccelerator.parse_devices(devices) == parsed
        assert XLAAccelerator.get_parallel_devices(parsed) == [torch.device("xla", index) for index in indices]

    @pytest.mark.parametrize("devices", [2, [0, 1], [8], 1.5, None])
    def test_anything_else_is_refused(self, devices):
        with pytest.raises(TypeError, match="on TPU"):
            XLAAccelerator.parse_devices(devices)


def test_tpu_is_another_name_of_xla():
    assert TPUAccelerator is XLAAccelerator
