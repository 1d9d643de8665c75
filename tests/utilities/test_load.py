import copy
import os
from pathlib import Path

import pytest
import torch

from lightning.fabric.utilities.load import (
    _lazy_load,
    _materialize_tensors,
    _move_state_into,
    _NotYetLoadedTensor,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    weight = torch.arange(6.0).view(2, 3)
    state = {"model": {"weight": weight, "tied": weight, "half": torch.ones(2, dtype=torch.half)}, "step": 3}
    torch.save(state, tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


class TestLazyLoad:
    def test_tensors_stay_in_the_file(self, path: Path) -> None:
        state = _lazy_load(path)
        weight = state["model"]["weight"]
        assert type(weight) is _NotYetLoadedTensor
        assert state["step"] == 3
        assert (weight.shape, weight.dtype, weight.device.type) == ((2, 3), torch.float, "cpu")
        assert str(path) in Path("/proc/self/maps").read_text()
        assert repr(state["model"]["half"]) == "_NotYetLoadedTensor(shape=(2,), dtype=torch.float16)"

    def test_the_file_may_be_deleted(self, path: Path) -> None:
        state = _lazy_load(path)
        os.unlink(path)
        assert state["model"]["weight"].sum() == 15

    def test_torch_functions_and_methods_read(self, path: Path) -> None:
        weight = _lazy_load(path)["model"]["weight"]
        assert torch.add(weight, 1).sum() == 21
        assert torch.stack([weight, weight]).shape == (2, 2, 3)
        assert weight.to(torch.double).dtype == torch.double
        target = torch.zeros(2, 3)
        target.copy_(weight)
        assert target.sum() == 15

    def test_writing_does_not_change_the_file(self, path: Path) -> None:
        _lazy_load(path)["model"]["weight"]._load_tensor().zero_()
        assert torch.load(path)["model"]["weight"].sum() == 15

    def test_materialize(self, path: Path) -> None:
        state = _materialize_tensors(_lazy_load(path))
        expected = torch.load(path)
        assert torch.equal(state["model"]["half"], expected["model"]["half"])
        assert state["model"]["tied"].data_ptr() == state["model"]["weight"].data_ptr()

    def test_load_state_dict(self, path: Path) -> None:
        layer = torch.nn.Linear(3, 2, bias=False)
        layer.load_state_dict(_materialize_tensors({"weight": _lazy_load(path)["model"]["weight"]}))
        assert layer.weight.sum() == 15

    def test_can_be_copied(self, path: Path) -> None:
        lazy = _lazy_load(path)["model"]["weight"]
        assert copy.copy(lazy)._load_tensor() is lazy._load_tensor()

    def test_what_is_no_checkpoint_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="missing.ckpt"):
            _lazy_load(tmp_path / "missing.ckpt")
        torch.save({}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
        with pytest.raises(RuntimeError, match="old.ckpt"):
            _lazy_load(tmp_path / "old.ckpt")


class TestMoveStateInto:
    def test_stateful_objects_load_and_values_are_replaced(self) -> None:
        layer = torch.nn.Linear(1, 1)
        weights = {"weight": torch.tensor([[2.0]]), "bias": torch.tensor([3.0])}
        source = {"model": weights, "step": 5, "extra": 1}
        destination = {"model": layer, "step": 0}
        _move_state_into(source, destination, keys={"model", "step"})
        assert source == {"extra": 1}
        assert destination == {"model": layer, "step": 5}
        assert layer.bias.item() == 3

    def test_all_keys(self) -> None:
        source, destination = {"a": 1, "b": 2}, {"b": 0}
        _move_state_into(source, destination)
        assert (source, destination) == ({}, {"a": 1, "b": 2})

    def test_a_missing_key(self) -> None:
        with pytest.raises(KeyError, match="a"):
            _move_state_into({}, {}, keys={"a"})
