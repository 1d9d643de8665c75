from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightning.fabric.utilities.device_dtype_mixin import _DeviceDtypeModuleMixin


class Sub(_DeviceDtypeModuleMixin):
    pass


class Top(_DeviceDtypeModuleMixin):
    def __init__(self) -> None:
        super().__init__()
        self.sub = Sub()
        self.layer = nn.Linear(1, 1)


CONVERSIONS: list[tuple[Callable[[nn.Module], object], torch.dtype]] = [
    (lambda m: m.to(torch.double), torch.double),
    (lambda m: m.to("cpu", torch.half), torch.half),
    (lambda m: m.to(torch.ones(1, dtype=torch.double)), torch.double),
    (lambda m: m.double(), torch.double),
    (lambda m: m.half(), torch.half),
    (lambda m: m.bfloat16(), torch.bfloat16),
    (lambda m: m.double().float(), torch.float),
    (lambda m: m.type(torch.double), torch.double),
    (lambda m: m.type("torch.HalfTensor"), torch.half),
]


@pytest.mark.parametrize(("convert", "dtype"), CONVERSIONS)
def test_dtype_follows(convert: Callable[[nn.Module], object], dtype: torch.dtype) -> None:
    module = Top()
    assert module.dtype == module.sub.dtype == torch.float
    convert(module)
    assert module.dtype == module.sub.dtype == module.layer.weight.dtype == dtype


@pytest.mark.parametrize("move", [lambda m: m.to("meta"), lambda m: m.to_empty(device="meta")])
def test_device_follows(move: Callable[[nn.Module], object]) -> None:
    module = Top()
    assert module.device == torch.device("cpu")
    move(module)
    assert module.device == module.sub.device == module.layer.weight.device == torch.device("meta")


def test_follows_the_parent() -> None:
    sub = Sub()
    nn.Sequential(nn.Sequential(sub)).to("meta", torch.double)
    assert (sub.device, sub.dtype) == (torch.device("meta"), torch.double)


def test_starts_with_the_defaults() -> None:
    torch.set_default_dtype(torch.double)
    with torch.device("meta"):
        module = Sub()
    assert (module.device, module.dtype) == (torch.device("meta"), torch.double)


def test_returns_itself_and_cannot_be_assigned() -> None:
    module = Top()
    assert module.to("cpu") is module
    with pytest.raises(AttributeError):
        module.dtype = torch.half  # type: ignore[misc]


@pytest.mark.gpu
def test_cuda_has_an_index() -> None:
    assert Top().cuda().device == Top().to("cuda").device == torch.device("cuda", torch.cuda.current_device())
