import pytest
import torch

from lightning.fabric.accelerators import CPUAccelerator
from lightning.fabric.utilities.exceptions import MisconfigurationException


@pytest.mark.parametrize(("devices", "count"), [(1, 1), (3, 3), ("2", 2), (" 4 ", 4)])
def test_devices_is_a_number_of_processes(devices, count):
    assert CPUAccelerator.parse_devices(devices) == count
    assert CPUAccelerator.get_parallel_devices(devices) == [torch.device("cpu")] * count


@pytest.mark.parametrize("devices", [[0], [1, 2], (1,), 1.0, True, None, "0,", "two"])
def test_other_types_are_refused(devices):
    with pytest.raises(TypeError, match="devices="):
        CPUAccelerator.parse_devices(devices)


@pytest.mark.parametrize("devices", [0, -1, "0", "-3"])
def test_fewer_than_one_process_is_refused(devices):
    with pytest.raises(MisconfigurationException, match="1 or more"):
        CPUAccelerator.parse_devices(devices)


def test_auto_is_one_process():
    assert CPUAccelerator.auto_device_count() == 1


def test_is_always_there():
    assert CPUAccelerator.is_available()
