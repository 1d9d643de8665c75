import dataclasses
from collections import Counter, OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning.fabric.utilities.apply_func import (
    apply_to_collection,
    convert_tensors_to_scalars,
    convert_to_tensors,
    move_data_to_device,
)
from lightning.fabric.utilities.data import AttributeDict

Point = namedtuple("Point", ["x", "y"])


@dataclasses.dataclass(frozen=True)
class Batch:
    inputs: Any
    name: str = "batch"
    derived: Any = dataclasses.field(init=False, default=None)


class ReadOnly(Mapping):
    def __init__(self, items: dict[str, Any]) -> None:
        self._items = items

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


def _trees(leaves: st.SearchStrategy) -> st.SearchStrategy:
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.lists(inner, max_size=3).map(tuple),
            st.dictionaries(st.text(max_size=2), inner, max_size=3),
            st.dictionaries(st.text(max_size=2), inner, max_size=3).map(OrderedDict),
            st.dictionaries(st.text(max_size=2), inner, max_size=3).map(ReadOnly),
            st.builds(Point, inner, inner),
            st.builds(Batch, inner),
        ),
        max_leaves=8,
    )


def _skeleton(tree: Any) -> Any:
    """Types all the way down; the values of leaves that are no containers."""
    if isinstance(tree, Mapping):
        return type(tree), [(key, _skeleton(value)) for key, value in tree.items()]
    if isinstance(tree, (list, tuple)):
        return type(tree), [_skeleton(value) for value in tree]
    if isinstance(tree, Batch):
        return Batch, _skeleton(tree.inputs)
    return type(tree), tree


@settings(deadline=None, max_examples=50)
@given(_trees(st.one_of(st.none(), st.booleans(), st.floats(-1e300, 1e300), st.text(max_size=3))))
def test_only_leaves_of_the_type_change_and_the_shape_of_the_tree_is_kept(tree: Any) -> None:
    before = _skeleton(tree)
    doubled = apply_to_collection(tree, float, lambda value: value * 2)
    assert _skeleton(apply_to_collection(doubled, float, lambda value: value / 2)) == before
    assert _skeleton(tree) == before, "the input is not changed"


def test_arguments_reach_the_function() -> None:
    assert apply_to_collection([1, {"a": 2}], int, lambda x, y, z: x + y + z, 10, z=100) == [111, {"a": 112}]
    assert apply_to_collection(1, int, lambda x, y: x + y, 1) == 2


def test_wrong_dtype_is_left_alone() -> None:
    assert apply_to_collection([1, True], int, lambda x: -x, wrong_dtype=bool) == [-1, True]
    assert apply_to_collection(True, int, lambda x: -x, wrong_dtype=bool) is True


def test_several_types() -> None:
    assert apply_to_collection([1, "a", 2.0], (int, str), lambda x: x * 2) == [2, "aa", 2.0]


def test_containers_can_be_the_type_that_is_looked_for() -> None:
    assert apply_to_collection({"a": [1, 2]}, list, len) == {"a": 2}


def test_include_none() -> None:
    drop_ones = lambda x: None if x == 1 else x
    tree = {"a": 1, "b": [1, 2], "c": OrderedDict(d=1, e=3)}
    assert apply_to_collection(tree, int, drop_ones, include_none=False) == {"b": [2], "c": OrderedDict(e=3)}
    assert apply_to_collection(tree, int, drop_ones) == {"a": None, "b": [None, 2], "c": OrderedDict(d=None, e=3)}


class TestContainersAreKept:
    def test_default_factory(self) -> None:
        out = apply_to_collection(defaultdict(list, a=1), int, str)
        assert out == {"a": "1"}
        assert out["new"] == []

    @pytest.mark.parametrize("kind", [OrderedDict, UserDict, AttributeDict, Counter])
    def test_kinds_of_dictionaries(self, kind: type) -> None:
        given = kind({"a": 1, "b": 2})
        out = apply_to_collection(given, int, lambda x: x + 1)
        assert type(out) is kind
        assert dict(out) == {"a": 2, "b": 3}
        assert dict(given) == {"a": 1, "b": 2}

    def test_attributes_of_a_subclass_of_dict(self) -> None:
        class Tagged(dict):
            tag = None

        given = Tagged(a=1)
        given.tag = "kept"
        out = apply_to_collection(given, int, str)
        assert (type(out), dict(out), out.tag) == (Tagged, {"a": "1"}, "kept")

    def test_torch_size_and_return_types(self) -> None:
        size = torch.Size([2, 3])
        assert apply_to_collection({"a": size}, Tensor, torch.neg) == {"a": size}
        largest = torch.tensor([3.0, 1.0]).max(dim=0)
        assert apply_to_collection(largest, Tensor, torch.neg).values == -3

    @pytest.mark.parametrize("leaf", ["text", b"bytes", bytearray(b"x"), range(3), {1, 2}, object, Batch])
    def test_what_is_no_collection_is_returned_as_it_is(self, leaf: Any) -> None:
        assert apply_to_collection([leaf], int, str)[0] is leaf

    def test_a_frozen_dataclass_is_copied(self) -> None:
        given = Batch(inputs=[1])
        object.__setattr__(given, "derived", 2)
        out = apply_to_collection(given, int, lambda x: x + 1)
        assert (out.inputs, out.derived, out.name) == ([2], 3, "batch")
        assert (given.inputs, given.derived) == ([1], 2)


class _Movable:
    def __init__(self, returns: Any) -> None:
        self.returns = returns
        self.device = None

    def to(self, device: torch.device) -> Any:
        self.device = device
        return self.returns


class TestMove:
    META = torch.device("meta")

    def test_every_tensor_in_the_tree(self) -> None:
        batch = {"x": torch.ones(2), "pair": (torch.ones(1), 3), "record": Batch([torch.nn.Parameter(torch.ones(1))])}
        moved = move_data_to_device(batch, "meta")
        assert moved["x"].is_meta
        assert moved["pair"][0].is_meta
        assert moved["pair"][1] == 3
        assert moved["record"].inputs[0].is_meta
        assert not batch["x"].is_meta

    def test_a_tensor_that_is_there_already_is_not_copied(self) -> None:
        tensor = torch.ones(2)
        assert move_data_to_device(tensor, torch.device("cpu")) is tensor
        assert move_data_to_device([tensor], "cpu")[0] is tensor

    def test_objects_with_a_to_method(self) -> None:
        moved = object()
        copied, in_place = _Movable(returns=moved), _Movable(returns=None)
        assert move_data_to_device([copied, in_place], self.META) == [moved, in_place]
        assert copied.device == in_place.device == self.META

    def test_packed_sequences_move_as_a_whole(self) -> None:
        packed = torch.nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2)])
        moved = move_data_to_device([packed], self.META)[0]
        assert type(moved) is type(packed)
        assert moved.data.is_meta

    @pytest.mark.parametrize(("target", "expected"), [("cuda", {"non_blocking": True}), ("cpu", {}), ("mps", {})])
    def test_copies_to_cuda_alone_do_not_wait(self, target: str, expected: dict[str, bool]) -> None:
        seen = []

        class Recorder(Tensor):
            def to(self, *args: Any, **kwargs: Any) -> Tensor:
                seen.append((args, kwargs))
                return self

        move_data_to_device(torch.ones(1).as_subclass(Recorder), target)
        assert seen == [((torch.device(target),), expected)]


class TestConvert:
    def test_numbers_and_arrays_become_tensors(self) -> None:
        data = {
            "i": 2**40,
            "f": 1.5,
            "b": True,
            "a": np.arange(3),
            "n": np.float64(0.1),
            "s": "text",
            "t": torch.ones(1),
        }
        out = convert_to_tensors(data, torch.device("cpu"))
        assert out["i"].item() == 2**40
        assert (out["f"].dtype, out["b"].dtype, out["n"].dtype) == (torch.float32, torch.bool, torch.float64)
        assert out["a"].tolist() == [0, 1, 2]
        assert out["s"] == "text"
        assert out["t"] is data["t"]

    def test_new_tensors_are_made_on_the_device(self) -> None:
        assert all(tensor.is_meta for tensor in convert_to_tensors([1, torch.ones(1)], "meta"))

    def test_an_array_is_copied(self) -> None:
        array = np.zeros(2)
        convert_to_tensors(array, "cpu").fill_(1)
        assert array.tolist() == [0, 0]

    def test_tensors_to_numbers(self) -> None:
        assert convert_tensors_to_scalars({"a": torch.tensor([1]), "b": [torch.tensor(0.5)], "c": "x"}) == {
            "a": 1,
            "b": [0.5],
            "c": "x",
        }

    def test_more_than_one_element_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"shape \(2,\)"):
            convert_tensors_to_scalars([torch.ones(2)])
