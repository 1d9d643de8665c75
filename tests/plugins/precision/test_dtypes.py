from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning.fabric.plugins.precision._dtypes import cast_floating, default_dtype

FLOATING = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
OTHER = [torch.bool, torch.uint8, torch.int32, torch.int64, torch.complex64]


class Pair(NamedTuple):
    first: object
    second: object


tensors = st.sampled_from(FLOATING + OTHER).map(lambda dtype: torch.ones(2, dtype=dtype))
leaves = st.one_of(tensors, st.none(), st.integers(), st.floats(allow_nan=False), st.text(max_size=3), st.booleans())
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=2), inner, max_size=3),
        st.dictionaries(st.text(max_size=2), inner, max_size=3).map(OrderedDict),
        st.tuples(inner, inner).map(lambda both: Pair(*both)),
    ),
    max_leaves=10,
)


def _check(before, after, dtype):
    """Same types all the way down; floating-point tensors as ``dtype``, every other leaf the very same object."""
    assert type(after) is type(before)
    if isinstance(before, torch.Tensor):
        if before.is_floating_point():
            assert after.dtype is dtype
            assert after.tolist() == before.tolist()
        if before.dtype is dtype or not before.is_floating_point():
            assert after is before
    elif isinstance(before, dict):
        assert list(after) == list(before)
        for key in before:
            _check(before[key], after[key], dtype)
    elif isinstance(before, list | tuple):
        assert len(after) == len(before)
        for old, new in zip(before, after, strict=True):
            _check(old, new, dtype)
    else:
        assert after is before


@settings(deadline=None)
@given(trees, st.sampled_from(FLOATING))
def test_any_tree_keeps_its_shape_and_its_other_leaves(tree, dtype):
    _check(tree, cast_floating(tree, dtype), dtype)


def test_tensors_inside_dataclasses_and_tensor_subclasses_are_cast():
    @dataclass
    class Batch:
        x: torch.Tensor
        size: int

    batch = Batch(torch.ones(2), 2)
    cast = cast_floating((batch, torch.nn.Parameter(torch.ones(2))), torch.float64)
    assert cast[0].x.dtype is torch.float64
    assert (cast[0].size, batch.x.dtype) == (2, torch.float32)
    assert cast[1].dtype is torch.float64


def test_gradients_flow_back_through_a_cast():
    x = torch.ones(2, requires_grad=True)
    cast_floating({"x": x}, torch.float64)["x"].sum().backward()
    assert x.grad.tolist() == [1.0, 1.0]


class TestDefaultDtype:
    def test_holds_inside_only_also_nested(self):
        with default_dtype(torch.float64):
            with default_dtype(torch.bfloat16):
                assert torch.ones(1).dtype is torch.bfloat16
            assert torch.ones(1).dtype is torch.float64
        assert torch.ones(1).dtype is torch.float32

    def test_ends_with_an_error(self):
        with pytest.raises(KeyError), default_dtype(torch.float64):
            raise KeyError
        assert torch.get_default_dtype() is torch.float32
