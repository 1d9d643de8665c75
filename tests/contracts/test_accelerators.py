"""What every accelerator promises, checked over all that are registered and a foreign one."""

import pytest
import torch

from lightning.fabric.accelerators import ACCELERATOR_REGISTRY, Accelerator


class FridgeAccelerator(Accelerator):
    """An accelerator that somebody else could write, with two devices."""

    def setup_device(self, device):
        if device.type != "meta":
            raise ValueError(f"not a fridge: {device}")

    def teardown(self):
        pass

    @staticmethod
    def parse_devices(devices):
        return int(devices)

    @staticmethod
    def get_parallel_devices(devices):
        return [torch.device("meta", index) for index in range(devices)]

    @staticmethod
    def auto_device_count():
        return 2

    @staticmethod
    def is_available():
        return True


REGISTERED = ACCELERATOR_REGISTRY.available_accelerators()


@pytest.fixture(params=[*REGISTERED, "fridge"])
def cls(request):
    return FridgeAccelerator if request.param == "fridge" else ACCELERATOR_REGISTRY.get_class(request.param)


@pytest.fixture(params=[name for name in REGISTERED if ACCELERATOR_REGISTRY.get_class(name).is_available()])
def available(request):
    """A class whose hardware this machine has."""
    return ACCELERATOR_REGISTRY.get_class(request.param)


def test_is_an_accelerator(cls):
    assert issubclass(cls, Accelerator)


@pytest.mark.parametrize("name", REGISTERED)
def test_is_registered_under_its_own_name(name):
    assert ACCELERATOR_REGISTRY.get_class(name).name() == name


def test_a_class_without_a_name_is_named_after_itself():
    assert FridgeAccelerator.name() == "fridge"


def test_the_machine_is_asked_on_the_class(cls):
    assert cls.is_available() in (True, False)
    assert cls.auto_device_count() >= 0


def test_asking_initialises_no_hardware(cls):
    before = torch.cuda.is_initialized()
    cls.is_available()
    cls.auto_device_count()
    assert torch.cuda.is_initialized() is before


def test_an_available_one_has_devices_of_its_own(available):
    count = available.auto_device_count()
    devices = available.get_parallel_devices(available.parse_devices(count))
    assert len(devices) == count > 0
    assert len({device.type for device in devices}) == 1


def test_a_device_of_another_type_is_refused(available):
    other = torch.device("xpu", 0)
    with pytest.raises(ValueError, match="xpu"):
        available().setup_device(other)


def test_its_own_device_is_made_ready_and_given_back_twice(available):
    accelerator = available()
    accelerator.setup_device(available.get_parallel_devices(available.parse_devices(1))[0])
    accelerator.teardown()
    accelerator.teardown()


def test_can_be_registered_by_itself(cls):
    registry = type(ACCELERATOR_REGISTRY)()
    cls.register_accelerators(registry)
    assert registry.get_class(cls.name()) is cls
