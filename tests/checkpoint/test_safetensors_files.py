"""Safetensors: what is written is what others read, what others write is read, and damage is named."""

import json
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, load_model, save_file
from torch import nn

from lightning.fabric.checkpoint.safetensors_files import is_safetensors, read_safetensors, write_safetensors
from lightning.fabric.checkpoint.sizes import size_as_text, size_in_bytes
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

INDEX = "model.safetensors.index.json"


def _tensors():
    return {name: torch.full((100,), float(number)) for number, name in enumerate("abcde")}


def _same(found, expected):
    return found.keys() == expected.keys() and all(
        found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name]) for name in expected
    )


@pytest.fixture
def sharded(tmp_path):
    """Three files of at most two tensors each."""
    write_safetensors(_tensors(), tmp_path / "hf", 800)
    return tmp_path / "hf"


class TestWriting:
    def test_one_file_as_others_read_it(self, tmp_path):
        odd = {
            "transposed": torch.arange(6.0).reshape(2, 3).t(),
            "bf16": torch.ones(3, dtype=torch.bfloat16),
            "empty": torch.empty(0, 4),
            "also_empty": torch.empty(0, 4),
            "number": torch.tensor(7),
            "flags": torch.tensor([True, False]),
            "slice": torch.arange(10)[2:4],
            "parameter": nn.Parameter(torch.ones(2)),
            "float8": torch.ones(2).to(torch.float8_e4m3fn),
        }
        write_safetensors(odd, tmp_path / "w.safetensors")
        plain = {name: value.detach() for name, value in odd.items()}
        float8 = plain["float8"].float()
        for found in (load_file(tmp_path / "w.safetensors"), read_safetensors(tmp_path / "w.safetensors")):
            assert torch.equal(found.pop("float8").float(), float8)
            assert _same(found, {name: value for name, value in plain.items() if name != "float8"})

    def test_shards_have_names_and_an_index_as_others_know_them(self, sharded):
        names = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
        assert sorted(file.name for file in sharded.iterdir()) == sorted([*names, INDEX])
        index = json.loads((sharded / INDEX).read_text())
        assert index == {
            "metadata": {"total_size": 2000},
            "weight_map": {"a": names[0], "b": names[0], "c": names[1], "d": names[1], "e": names[2]},
        }
        assert _same(load_file(sharded / names[0]), {name: _tensors()[name] for name in "ab"})

    def test_what_fits_into_one_file_of_a_folder_has_no_index(self, tmp_path):
        write_safetensors(_tensors(), tmp_path / "hf", 2000)
        assert [file.name for file in (tmp_path / "hf").iterdir()] == ["model.safetensors"]
        assert _same(read_safetensors(tmp_path / "hf"), _tensors())

    def test_a_tensor_larger_than_a_shard_has_one_of_its_own(self, tmp_path):
        write_safetensors(_tensors(), tmp_path / "hf", 1)
        assert len(list((tmp_path / "hf").iterdir())) == 6

    @pytest.mark.parametrize("limit", [None, 10, 10**6])
    def test_tied_tensors_are_written_once_and_come_back_tied(self, tmp_path, limit):
        weight = torch.arange(4.0).reshape(2, 2)
        state = {"in.weight": weight, "mid": torch.ones(2), "out.weight": weight, "turned": weight.t()}
        state["flat"] = weight.view(-1)  # the same memory, but no other name of the same tensor
        write_safetensors(state, tmp_path / "w", limit)
        found = read_safetensors(tmp_path / "w")
        assert _same(found, state)
        assert found["out.weight"] is found["in.weight"]
        files = [tmp_path / "w"] if limit is None else tmp_path.glob("w/*.safetensors")
        assert sorted(name for file in files for name in load_file(file)) == ["flat", "in.weight", "mid", "turned"]

    def test_what_says_who_has_written_a_file_is_no_tie(self, tmp_path):
        save_file({"pt": torch.ones(2)}, tmp_path / "others.safetensors", metadata={"format": "pt"})
        assert read_safetensors(tmp_path / "others.safetensors").keys() == {"pt"}
        weight = torch.ones(2)
        state = {"pt": weight, "format": weight, "other": weight}
        write_safetensors(state, tmp_path / "w.safetensors")
        assert _same(read_safetensors(tmp_path / "w.safetensors"), state)

    def test_tied_models_load_by_the_package_itself(self, tmp_path):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        write_safetensors(model.state_dict(), tmp_path / "w.safetensors")
        other = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        other[1].weight = other[0].weight
        missing, unexpected = load_model(other, tmp_path / "w.safetensors")
        assert not missing
        assert not unexpected
        assert torch.equal(other[1].weight, model[0].weight)

    @pytest.mark.parametrize(
        ("value", "error", "message"),
        [
            (3, TypeError, r"holds tensors by name and nothing else, but the state has {'x': 'int'}"),
            (torch.eye(3).to_sparse(), ValueError, r"these are sparse, quantized or meta: \['x'\]"),
            (torch.empty(3, device="meta"), ValueError, r"these are sparse, quantized or meta: \['x'\]"),
            (torch.ones(2, dtype=torch.complex128), ValueError, r"hold torch.complex128, which is .* of \['x'\]"),
        ],
    )
    def test_what_no_such_file_holds_is_named(self, tmp_path, value, error, message):
        with pytest.raises(error, match=message):
            write_safetensors({"w": torch.ones(1), "x": value}, tmp_path / "w.safetensors")
        assert not list(tmp_path.iterdir())


class TestRecognising:
    def test_by_name_by_content_and_by_what_lies_in_a_folder(self, tmp_path, sharded):
        save_file(_tensors(), tmp_path / "unnamed")
        (tmp_path / "cut.safetensors").write_bytes(b"")
        (tmp_path / "one").mkdir()
        save_file(_tensors(), tmp_path / "one" / "model.safetensors")
        for path in (sharded, sharded / INDEX, tmp_path / "unnamed", tmp_path / "cut.safetensors", tmp_path / "one"):
            assert is_safetensors(path), path

    def test_other_files_are_not_taken_for_one(self, tmp_path):
        torch.save(_tensors(), tmp_path / "zip")
        torch.save(_tensors(), tmp_path / "old", _use_new_zipfile_serialization=False)
        (tmp_path / "short").write_bytes(b"{}")
        (tmp_path / "json").write_text('{"a": "long enough to have more than eight bytes"}')
        (tmp_path / "other").mkdir()
        (tmp_path / "sharded").mkdir()
        for name in (".metadata", "model.safetensors"):
            (tmp_path / "sharded" / name).touch()
        for name in ("zip", "old", "short", "json", "other", "sharded", "gone"):
            assert not is_safetensors(tmp_path / name), name
        assert not is_safetensors("s3://bucket/model.safetensors")


class TestReading:
    def test_maps_files_and_does_not_change_them(self, sharded):
        before = {file: file.read_bytes() for file in sharded.iterdir()}
        tensors = read_safetensors(sharded)
        for tensor in tensors.values():
            tensor.zero_()
        assert {file: file.read_bytes() for file in sharded.iterdir()} == before

    def test_reads_what_the_index_file_names(self, sharded):
        assert _same(read_safetensors(sharded / INDEX), _tensors())
        (sharded / INDEX).rename(sharded / "ema.safetensors.index.json")
        assert _same(read_safetensors(sharded), _tensors())
        (sharded / "b.safetensors.index.json").write_text("")
        with pytest.raises(ValueError, match="several indices: .*'b.safe.* Pass the path of the one"):
            read_safetensors(sharded)

    @pytest.mark.parametrize("outside", ["../w.safetensors", "/w.safetensors", "a/../../w", "..\\w", "C:w"])
    def test_an_index_that_names_files_outside_is_refused(self, sharded, outside):
        (sharded / INDEX).write_text(json.dumps({"weight_map": {"a": outside}}))
        with pytest.raises(ValueError, match="not inside of its folder"):
            read_safetensors(sharded)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (lambda places: places.update(f=places["a"]), RuntimeError, r"lacks tensors that .* names: \['f'\]"),
            (lambda places: places.pop("a"), RuntimeError, r"has tensors that .* does not: \['a'\]"),
            (lambda places: places.update(f="g.safetensors"), FileNotFoundError, "g.safetensors' is missing, which"),
        ],
    )
    def test_a_file_or_tensor_that_is_missing_or_extra_is_named(self, sharded, change, error, message):
        index = json.loads((sharded / INDEX).read_text())
        change(index["weight_map"])
        (sharded / INDEX).write_text(json.dumps(index))
        with pytest.raises(error, match=message):
            read_safetensors(sharded)

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": []}}'])
    def test_what_is_no_index_is_named(self, sharded, text):
        (sharded / INDEX).write_text(text)
        with pytest.raises(RuntimeError, match="is no index of safetensors files, or is damaged"):
            read_safetensors(sharded)

    def test_a_cut_file_is_named(self, sharded):
        file = sharded / "model-00002-of-00003.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(RuntimeError, match=r"model-00002-of-00003.safetensors' is damaged"):
            read_safetensors(sharded)

    def test_without_the_package_an_error_says_what_to_install(self, sharded, monkeypatch):
        monkeypatch.setitem(sys.modules, "safetensors", None)
        with pytest.raises(ModuleNotFoundError, match="pip install safetensors"):
            read_safetensors(sharded)
        with pytest.raises(ModuleNotFoundError, match="pip install safetensors"):
            write_safetensors(_tensors(), sharded / "w")


class TestAsCheckpoint:
    def test_is_a_bare_state_dict(self, sharded):
        io = TorchCheckpointIO()
        assert _same(io.load_checkpoint(sharded), _tensors())
        assert _same(io.load_checkpoint(sharded, mmap=True, weights_only=True), _tensors())

    def test_what_is_not_mapped_outlives_an_overwritten_file(self, tmp_path):
        weight = torch.ones(3)
        write_safetensors({"a": weight, "b": weight}, tmp_path / "w.safetensors")
        found = TorchCheckpointIO().load_checkpoint(tmp_path / "w.safetensors")
        size = (tmp_path / "w.safetensors").stat().st_size
        (tmp_path / "w.safetensors").write_bytes(bytes(size))
        assert _same(found, {"a": torch.ones(3), "b": torch.ones(3)})
        assert found["a"] is found["b"]

    @pytest.mark.parametrize(
        ("map_location", "device"),
        [
            (None, "cpu"),
            ("meta", "meta"),
            (torch.device("meta"), "meta"),
            ({"cuda:0": "cpu"}, "cpu"),
            ({"cpu": "meta"}, "meta"),
            (lambda storage, location: storage, "cpu"),
            (lambda storage, location: None, "cpu"),
        ],
    )
    def test_goes_where_the_location_says(self, sharded, map_location, device):
        found = TorchCheckpointIO().load_checkpoint(sharded, map_location)
        assert {tensor.device.type for tensor in found.values()} == {device}


class TestSizes:
    @pytest.mark.parametrize(
        ("text", "size"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), ("7", 7), ("2kb", 2000), ("8B", 8)]
    )
    def test_are_read_as_people_write_them(self, text, size):
        assert size_in_bytes(text) == size

    @pytest.mark.parametrize("text", ["", "GB", "5XB", "-1", "0", "0.1", "1e3", "5 GB GB"])
    def test_that_are_none_are_refused(self, text):
        with pytest.raises(ValueError, match=f"such as 5GB, 500MB or 4GiB, but got {text!r}"):
            size_in_bytes(text)

    @given(st.integers(1, 10**13))
    @settings(max_examples=30)
    def test_are_written_about_right(self, size):
        assert size_in_bytes(size_as_text(size)) == pytest.approx(size, rel=0.01)
