import pytest
import torch
from torch import nn

from lightning.fabric.plugins import XLAPrecision

DTYPES = {"32-true": torch.float32, "16-true": torch.float16, "bf16-true": torch.bfloat16}


@pytest.mark.parametrize(("name", "dtype"), DTYPES.items())
class TestOneDtype:
    def test_of_weights_and_new_tensors(self, name, dtype):
        precision = XLAPrecision(name)
        assert (precision.precision, precision.dtype) == (name, dtype)
        assert precision.convert_module(nn.Linear(1, 1)).weight.dtype is dtype
        for context in (precision.tensor_init_context, precision.module_init_context, precision.forward_context):
            with context():
                assert torch.ones(1).dtype is dtype
            assert torch.ones(1).dtype is torch.float32

    def test_of_inputs_and_the_default_one_of_outputs(self, name, dtype):
        precision = XLAPrecision(name)
        data = {"x": torch.ones(1), "i": torch.tensor([1]), "s": "text"}
        converted = precision.convert_input(data)
        assert converted["x"].dtype is dtype
        assert (converted["i"].dtype, converted["s"]) == (torch.int64, "text")
        assert precision.convert_output(converted)["x"].dtype is torch.float32


def test_full_precision_is_the_default_and_leaves_all_as_it_is():
    double = torch.ones(1, dtype=torch.float64)
    assert XLAPrecision().convert_input(double) is double
    assert XLAPrecision().convert_output(double) is double


@pytest.mark.parametrize("name", ["16-mixed", "bf16-mixed", "64-true", 16, None])
def test_others_are_refused(name):
    with pytest.raises(ValueError, match=f"'32-true', '16-true', 'bf16-true', but got {name!r}"):
        XLAPrecision(name)
