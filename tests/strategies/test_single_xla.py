"""What is particular to one XLA device; training, files and batches are tested with those of several."""

import pytest
import torch
from tests.xla_stand_in import xla  # noqa: F401
from torch import nn

from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision, XLACheckpointIO, XLAPrecision
from lightning.fabric.strategies import SingleDeviceStrategy
from lightning.fabric.strategies.single_xla import SingleDeviceXLAStrategy


@pytest.mark.parametrize("device", [1, "xla:1", torch.device("xla", 1)])
def test_the_device_may_be_an_index(device):
    strategy = SingleDeviceXLAStrategy(device)
    assert isinstance(strategy, SingleDeviceStrategy)
    assert strategy.root_device == torch.device("xla", 1)
    assert (strategy.world_size, strategy.global_rank, strategy.launcher) == (1, 0, None)
    assert strategy.distributed_sampler_kwargs is None


def test_parts():
    assert isinstance(SingleDeviceXLAStrategy().checkpoint_io, XLACheckpointIO)
    io, precision = XLACheckpointIO(), XLAPrecision("bf16-true")
    strategy = SingleDeviceXLAStrategy(checkpoint_io=io, precision=precision)
    assert (strategy.checkpoint_io, strategy.precision) == (io, precision)
    with pytest.raises(ValueError, match="SingleDeviceXLAStrategy computes in one dtype"):
        SingleDeviceXLAStrategy(precision=MixedPrecision("bf16-mixed", "cpu"))


def test_it_is_what_one_core_gets(xla):  # noqa: F811
    fabric = Fabric(accelerator="tpu", devices=1, precision="bf16-true")
    assert type(fabric.strategy) is SingleDeviceXLAStrategy
    assert type(fabric.strategy.precision) is XLAPrecision
    module = nn.Linear(2, 1, bias=False)
    model = fabric.setup_module(module)
    optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.5))
    before = model.weight.detach().cpu().clone()
    with fabric.no_backward_sync(model):
        fabric.backward(model(torch.ones(1, 2, device=fabric.device)).sum())
    optimizer.step()
    assert torch.equal(model.weight.detach().cpu(), before - 0.5)


def test_without_torch_xla_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("lightning.fabric.utilities.imports.package_available", lambda name: False)
    with pytest.raises(ModuleNotFoundError, match="pip install torch_xla"):
        SingleDeviceXLAStrategy().setup_environment()
