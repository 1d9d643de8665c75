import platform

import pytest
import torch

from lightning.fabric.accelerators import MPSAccelerator
from lightning.fabric.utilities.exceptions import MisconfigurationException


@pytest.fixture
def apple(monkeypatch):
    """Have torch and the platform report an Apple silicon machine."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(platform, "machine", lambda: "arm64")


@pytest.mark.usefixtures("apple")
class TestOnAppleSilicon:
    @pytest.mark.parametrize("devices", [1, "1", [0], "0,", "auto", -1])
    def test_the_one_device(self, devices):
        parsed = MPSAccelerator.parse_devices(devices)
        assert MPSAccelerator.get_parallel_devices(parsed) == [torch.device("mps", 0)]

    @pytest.mark.parametrize("devices", [2, [1], "1,", [0, 1]])
    def test_more_than_one_device_is_refused(self, devices):
        with pytest.raises(MisconfigurationException, match="devices="):
            MPSAccelerator.parse_devices(devices)

    def test_is_available_with_one_device(self):
        assert MPSAccelerator.is_available()
        assert MPSAccelerator.auto_device_count() == 1

    def test_not_on_an_intel_processor(self, monkeypatch):
        monkeypatch.setattr(platform, "machine", lambda: "x86_64")
        assert not MPSAccelerator.is_available()


def test_another_type_of_device_is_refused():
    with pytest.raises(ValueError, match="sets up the device 'mps', but got 'cpu'"):
        MPSAccelerator().setup_device(torch.device("cpu"))
