"""Everything on one device: each verb is the plain one."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning.fabric.accelerators.cpu import CPUAccelerator
from lightning.fabric.strategies.single_device import SingleDeviceStrategy
from lightning.fabric.strategies.strategy import _BackwardSyncControl


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "cuda:3"])
def test_the_device_is_the_one_given(device: Any) -> None:
    assert SingleDeviceStrategy(device).root_device == torch.device(device)


def test_objects_come_back_as_they_are() -> None:
    strategy = SingleDeviceStrategy()
    module = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(module.parameters(), 1.0)
    assert strategy.setup_module(module) is module
    assert strategy.setup_optimizer(optimizer) is optimizer


def test_a_device_of_another_kind_than_the_accelerator_is_refused() -> None:
    with pytest.raises(ValueError, match="cuda"):
        SingleDeviceStrategy("cuda:0", accelerator=CPUAccelerator()).setup_environment()


def test_a_module_is_moved_in_place() -> None:
    module = nn.Linear(1, 1)
    SingleDeviceStrategy("meta").module_to_device(module)
    assert module.weight.is_meta


def test_a_batch_is_moved_to_this_device_or_another() -> None:
    batch = {"x": [torch.ones(1)], "name": "a"}
    assert SingleDeviceStrategy("meta").batch_to_device(batch)["x"][0].is_meta
    moved = SingleDeviceStrategy("cpu").batch_to_device(batch, torch.device("meta"))
    assert moved["x"][0].is_meta
    assert moved["name"] == "a"


def test_collectives_answer_with_the_input() -> None:
    strategy = SingleDeviceStrategy()
    tensor = torch.ones(2)
    assert strategy.all_gather(tensor) is tensor
    assert strategy.all_reduce(tensor) is tensor
    assert strategy.broadcast(tensor) is tensor
    assert strategy.barrier("anywhere") is None
    assert strategy.reduce_boolean_decision(False) is False


def test_leaving_synchronisation_out_is_asked_for_in_vain_but_without_harm() -> None:
    control = SingleDeviceStrategy()._backward_sync_control
    assert isinstance(control, _BackwardSyncControl)
    with control.no_backward_sync(nn.Linear(1, 1), enabled=True), control.no_backward_sync(nn.Identity(), True):
        pass
