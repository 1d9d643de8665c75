"""CUDA on machines with and without it: where there is none, torch's answers are written by hand."""

import logging
import os

import pytest
import torch

from lightning.fabric.accelerators import CUDAAccelerator, find_usable_cuda_devices
from lightning.fabric.accelerators import cuda as cuda_module
from lightning.fabric.utilities.exceptions import MisconfigurationException


@pytest.fixture
def gpus(monkeypatch):
    """Have torch report the number of GPUs that the test asks for."""

    def report(count):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return report


class TestParseDevices:
    @pytest.mark.parametrize(
        ("devices", "indices"),
        [
            (3, [0, 1, 2]),
            (-1, [0, 1, 2, 3]),
            ([0], [0]),
            ([1, 3], [1, 3]),
            ("3", [0, 1, 2]),
            ("1, 3", [1, 3]),
            ("0,1", [0, 1]),
            ("3,", [3]),
            ("-1", [0, 1, 2, 3]),
            ("auto", [0, 1, 2, 3]),
            ([-1], [0, 1, 2, 3]),
        ],
    )
    def test_counts_and_indices(self, gpus, devices, indices):
        gpus(4)
        assert CUDAAccelerator.parse_devices(devices) == indices

    @pytest.mark.parametrize("devices", [5, [4], [0, 0], "7,", 0])
    def test_what_is_not_there_is_refused(self, gpus, devices):
        gpus(4)
        with pytest.raises(MisconfigurationException, match="devices="):
            CUDAAccelerator.parse_devices(devices)

    @pytest.mark.parametrize("devices", [True, 1.0, [0, "1"], None])
    def test_other_types_are_refused(self, gpus, devices):
        gpus(4)
        with pytest.raises((TypeError, MisconfigurationException), match="devices="):
            CUDAAccelerator.parse_devices(devices)

    def test_any_request_is_refused_where_there_is_no_gpu(self, gpus):
        gpus(0)
        with pytest.raises(MisconfigurationException, match="this machine has none"):
            CUDAAccelerator.parse_devices(1)


def test_parallel_devices_carry_the_indices():
    assert CUDAAccelerator.get_parallel_devices([1, 3]) == [torch.device("cuda", 1), torch.device("cuda", 3)]


class TestCounting:
    def test_auto_is_all(self, gpus):
        gpus(3)
        assert CUDAAccelerator.auto_device_count() == 3

    @pytest.mark.parametrize("before", [None, "0"])
    def test_availability_is_asked_without_initialising_cuda(self, monkeypatch, before):
        name, seen = "PYTORCH_NVML_BASED_CUDA_CHECK", []
        monkeypatch.delenv(name, raising=False)
        if before is not None:
            monkeypatch.setenv(name, before)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: seen.append(os.environ[name]) or True)
        assert CUDAAccelerator.is_available()
        assert seen == ["1"]
        assert os.environ.get(name) == before

    @pytest.mark.gpu
    def test_counting_leaves_cuda_alone(self):
        assert CUDAAccelerator.is_available()
        assert CUDAAccelerator.auto_device_count() > 0


class TestSetupDevice:
    @pytest.mark.parametrize("device", ["cpu", "mps"])
    def test_another_type_of_device_is_refused(self, device):
        with pytest.raises(ValueError, match=f"sets up CUDA devices like 'cuda:0', but got '{device}'"):
            CUDAAccelerator().setup_device(torch.device(device))

    def test_makes_the_device_current_and_hints_at_tensor_cores_once(self, monkeypatch, caplog):
        current = []
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU of this test")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        device = torch.device("cuda", 1)
        with caplog.at_level(logging.INFO, logger="lightning.fabric"):
            CUDAAccelerator().setup_device(device)
            CUDAAccelerator().setup_device(device)
        assert current == [device, device]
        assert [record.message for record in caplog.records if "set_float32_matmul_precision" in record.message] == [
            caplog.records[0].message
        ]

    @pytest.mark.parametrize(("capability", "chosen"), [((7, 5), "none"), ((8, 0), "ieee"), ((8, 0), "tf32")])
    def test_no_hint_without_tensor_cores_or_after_a_choice(self, monkeypatch, caplog, capability, chosen):
        class Matmul:
            fp32_precision = chosen

        monkeypatch.setattr(torch.backends.cuda, "matmul", Matmul())
        with caplog.at_level(logging.INFO, logger="lightning.fabric"):
            cuda_module._hint_at_tensor_cores(f"GPU that has {chosen}", capability)
        assert not caplog.records

    @pytest.mark.gpu
    def test_on_a_real_gpu(self):
        CUDAAccelerator().setup_device(torch.device("cuda", 0))
        assert torch.cuda.current_device() == 0
        CUDAAccelerator().teardown()


class TestFindUsable:
    @pytest.fixture
    def busy(self, monkeypatch, gpus):
        """Four GPUs, of which those that the test adds to the set cannot allocate."""
        gpus(4)
        indices = set()

        def tensor(_, device):
            if device.index in indices:
                raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable")

        monkeypatch.setattr(torch, "tensor", tensor)
        return indices

    def test_the_first_usable_ones(self, busy):
        busy.update({0, 2})
        assert find_usable_cuda_devices(1) == [1]
        assert find_usable_cuda_devices(2) == [1, 3]
        assert find_usable_cuda_devices(0) == []

    def test_all_that_can_be_used(self, busy):
        busy.add(2)
        assert find_usable_cuda_devices() == [0, 1, 3]

    def test_fewer_than_asked_names_the_busy_ones(self, busy):
        busy.update({1, 2})
        with pytest.raises(RuntimeError, match=r"only 2 of 4 can be used now.* \[1, 2\]"):
            find_usable_cuda_devices(3)

    def test_more_than_visible(self, busy):
        with pytest.raises(ValueError, match=r"find 5 device\(s\), but this machine has 4 visible"):
            find_usable_cuda_devices(5)

    @pytest.mark.parametrize("num_devices", [-1, 1])
    def test_none_visible(self, gpus, num_devices):
        gpus(0)
        with pytest.raises(ValueError, match="0 visible CUDA"):
            find_usable_cuda_devices(num_devices)

    @pytest.mark.parametrize("num_devices", [-2, True, 1.0, "1"])
    def test_other_numbers_are_refused(self, num_devices):
        with pytest.raises(ValueError, match="`num_devices` must be"):
            find_usable_cuda_devices(num_devices)
