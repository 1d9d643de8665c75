"""Checkpoints of any form become checkpoints of another form, with a manifest, and load as what they were."""

import json
import os
import pickle
import shutil
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from lightning.fabric import Fabric
from lightning.fabric.checkpoint.comparison import differences
from lightning.fabric.checkpoint.conversion import convert
from lightning.fabric.checkpoint.directory import CheckpointDirectory
from lightning.fabric.checkpoint.manifest import DamagedCheckpointError, read_manifest, verify
from lightning.fabric.checkpoint.safetensors_files import read_safetensors, write_safetensors
from lightning.fabric.testing import on_ranks, preload
from lightning.fabric.utilities.load import HAS_MANIFEST
from lightning.fabric.utilities.sharded_folder import ShardedFolder

preload("torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.distributed.checkpoint")


def _model(seed=1):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False))
    model[3].weight = model[2].weight
    return model


def _state(fabric, seed=1, step=3):
    model = _model(seed)
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    if step:
        fabric.backward(model(torch.arange(12.0).reshape(4, 3)).square().sum())
        optimizer.step()
    return {"model": model, "optimizer": optimizer, "step": step, "names": ["a"]}


def _alone():
    return Fabric(accelerator="cpu", devices=1)


def _save_in_parts(folder):
    """Under FSDP: save, and load weights from safetensors that others wrote."""
    fabric = Fabric(accelerator="cpu", devices=2, strategy="fsdp")
    fabric.launch()
    fabric.save(f"{folder}/parts", _state(fabric))
    model = fabric.setup_module(_model(seed=2))
    equal = []
    for name in ("w.safetensors", "hf"):
        fabric.load_raw(f"{folder}/{name}", model)
        weights = {
            key: value.full_tensor() if hasattr(value, "full_tensor") else value
            for key, value in model.state_dict().items()
        }
        equal.append(all(torch.equal(weights[key], value) for key, value in _model(seed=7).state_dict().items()))
    return equal


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What single-device, FSDP, torch and safetensors have written, once for all tests."""
    folder = tmp_path_factory.mktemp("saved")
    write_safetensors(_model(seed=7).state_dict(), folder / "w.safetensors")
    write_safetensors(_model(seed=7).state_dict(), folder / "hf", 100)
    assert on_ranks(2, _save_in_parts, str(folder)) == [[True, True], [True, True]]
    fabric = _alone()
    state = _state(fabric)
    fabric.save(folder / "whole", state)
    state = {
        "model": state["model"].state_dict(),
        "optimizer": state["optimizer"].state_dict(),
        "step": 3,
        "names": ["a"],
    }
    torch.save(state, folder / "old")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save({"model": _model(seed=7).state_dict()}, checkpoint_id=folder / "dcp", no_dist=True)
    return folder


def _loads(path, keys=("model", "optimizer", "step", "names")):
    """Whether a fresh state takes all of the checkpoint, as one trained like it."""
    fabric = _alone()
    state = {key: value for key, value in _state(fabric, seed=2, step=0).items() if key in keys}
    fabric.load(path, state)
    expected = _state(fabric)
    for key in keys:
        found, wanted = (
            each[key].state_dict() if hasattr(each[key], "state_dict") else each[key] for each in (state, expected)
        )
        if key in ("step", "names"):
            assert found == wanted
        elif key == "model":
            torch.testing.assert_close(dict(found), dict(wanted))
        else:
            torch.testing.assert_close(found["state"], wanted["state"])
    return True


def _raw(path):
    fabric = _alone()
    model = fabric.setup_module(_model(seed=2))
    fabric.load_raw(path, model)
    return model.state_dict()


def _check(path):
    verify(path, read_manifest(path))


def _raise(error):
    raise error


class TestToOneFile:
    @pytest.mark.parametrize("source", ["parts", "whole", "old"])
    def test_holds_everything(self, saved, tmp_path, source):
        done = convert(saved / source, tmp_path / "deep" / "c.pt")
        assert (done.path, done.left_out, done.has_manifest) == (tmp_path / "deep" / "c.pt", (), True)
        assert done.was_verified is (source != "old")
        _check(done.path)
        assert _loads(done.path)
        assert list(differences(saved / source, done.path)) == []

    def test_keeps_what_the_manifest_says_of_the_training(self, saved, tmp_path):
        convert(saved / "parts", tmp_path / "c.pt")
        assert read_manifest(tmp_path / "c.pt").strategy == read_manifest(saved / "parts").strategy == "FSDPStrategy"

    def test_of_weights_alone_is_bare_or_an_entry(self, saved, tmp_path):
        convert(saved / "w.safetensors", tmp_path / "bare.pt")
        convert(saved / "hf", tmp_path / "entry.pt", key="model")
        bare, entry = (torch.load(tmp_path / name, weights_only=True) for name in ("bare.pt", "entry.pt"))
        assert bare.keys() == entry["model"].keys() == _model().state_dict().keys()
        with pytest.raises(ValueError, match="takes all entries of the checkpoint, so leave out key='model'"):
            convert(saved / "whole", tmp_path / "c.pt", key="model")

    def test_of_torchs_own_folder_without_plain_values(self, saved, tmp_path):
        done = convert(saved / "dcp", tmp_path / "c.pt")
        assert torch.load(done.path, weights_only=True).keys() == {"model"}

    def test_of_a_flat_folder_that_does_not_say_where_values_were(self, saved, tmp_path):
        state = torch.load(convert(saved / "parts", tmp_path / "c.pt").path, weights_only=True)
        model, optimizer = state["model"], state["optimizer"]
        flat = {f"model.{name}": value for name, value in model.items()}
        for number, entries in optimizer["state"].items():
            flat |= {f"optimizer.state.{number}.{entry}": value for entry, value in entries.items()}
        flat |= {"optimizer.param_groups": optimizer["param_groups"]}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            planner = DefaultSavePlanner(flatten_state_dict=False)
            dcp.save(flat, checkpoint_id=tmp_path / "flat", planner=planner, no_dist=True)
        found = torch.load(convert(tmp_path / "flat", tmp_path / "d.pt").path, weights_only=True)
        assert found["optimizer"]["state"]["0"].keys() == optimizer["state"][0].keys()


class TestToSafetensors:
    @pytest.mark.parametrize("source", ["parts", "whole", "old"])
    def test_holds_the_weights_and_says_what_not(self, saved, tmp_path, source):
        done = convert(saved / source, tmp_path / "hf", "safetensors")
        assert sorted(done.left_out) == ["names", "optimizer", "step"]
        assert done.has_manifest
        _check(done.path)
        torch.testing.assert_close(dict(_raw(done.path)), dict(_state(_alone())["model"].state_dict()))
        assert list(differences(saved / source, done.path, key="model")) == []

    def test_shards_are_no_larger_than_asked_for(self, saved, tmp_path):
        done = convert(saved / "whole", tmp_path / "hf", "safetensors", max_shard_size="100B")
        index = json.loads((done.path / "model.safetensors.index.json").read_text())
        files = {name: load_file(done.path / name) for name in set(index["weight_map"].values())}
        assert len(files) > 1
        assert all(len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 100 for tensors in files.values())
        assert sorted(read_manifest(done.path).files) == sorted([*files, "model.safetensors.index.json"])

    def test_one_file_has_no_manifest_and_says_so(self, saved, tmp_path):
        done = convert(saved / "parts", tmp_path / "w.safetensors", "safetensors")
        assert not done.has_manifest
        assert done.path.is_file()
        assert _raw(done.path).keys() == _model().state_dict().keys()

    @pytest.mark.parametrize("source", ["w.safetensors", "hf", "hf/model.safetensors.index.json", "dcp"])
    def test_of_what_others_wrote(self, saved, tmp_path, source):
        done = convert(saved / source, tmp_path / "other", "safetensors")
        assert (done.left_out, done.was_verified) == ((), False)
        torch.testing.assert_close(read_safetensors(done.path), dict(_model(seed=7).state_dict()))

    def test_the_entry_is_the_one_that_is_named_or_the_only_one(self, tmp_path):
        states = {
            "ema": {"w": torch.ones(2)},
            "student": {"w": torch.zeros(2), "_extra_state": torch.ones(1)},
            "step": 1,
        }
        torch.save(states, tmp_path / "two")
        torch.save({"net": states["ema"], "loss": torch.ones(1), "empty": {}}, tmp_path / "one")
        convert(tmp_path / "one", tmp_path / "a.safetensors", "safetensors")
        convert(tmp_path / "two", tmp_path / "b.safetensors", "safetensors", key="student")
        assert load_file(tmp_path / "a.safetensors")["w"].tolist() == [1, 1]
        assert load_file(tmp_path / "b.safetensors").keys() == {"w", "_extra_state"}
        with pytest.raises(ValueError, match=r"\['ema', 'student'\] all look like the state dict of a module. Pass"):
            convert(tmp_path / "two", tmp_path / "c.safetensors", "safetensors")
        with pytest.raises(
            ValueError, match=r"has no entry 'teacher'. Pass as `key` one of \['ema', 'student', 'step'\]"
        ):
            convert(tmp_path / "two", tmp_path / "c.safetensors", "safetensors", key="teacher")
        with pytest.raises(ValueError, match="has int under 'step', no state dict of a module"):
            convert(tmp_path / "two", tmp_path / "c.safetensors", "safetensors", key="step")
        torch.save({"step": 1}, tmp_path / "none")
        with pytest.raises(ValueError, match="none of them looks"):
            convert(tmp_path / "none", tmp_path / "c.safetensors", "safetensors")
        assert sorted(file.name for file in tmp_path.iterdir()) == [
            "a.safetensors",
            "b.safetensors",
            "none",
            "one",
            "two",
        ]


class TestToShards:
    def test_of_a_folder_keeps_optimizers_by_name(self, saved, tmp_path):
        shutil.copytree(saved / "parts", tmp_path / "old")
        (tmp_path / "old" / "manifest.json").unlink()
        index = tmp_path / "old" / ".metadata"  # as it was written before there were manifests
        index.write_bytes(index.read_bytes().replace(HAS_MANIFEST.encode(), b" " * len(HAS_MANIFEST)))
        done = convert(tmp_path / "old", tmp_path / "new", "sharded")
        assert not done.was_verified
        _check(done.path)
        assert _loads(done.path)
        assert list(differences(saved / "parts", done.path)) == []
        assert "optimizer.state.0.weight.exp_avg" in ShardedFolder(done.path).stored

    @pytest.mark.parametrize("source", ["w.safetensors", "hf", "dcp"])
    def test_of_weights_alone_is_an_entry(self, saved, tmp_path, source):
        done = convert(saved / source, tmp_path / "new", "sharded")
        fabric = _alone()
        model = fabric.setup_module(_model(seed=2))
        fabric.load(done.path, {"model": model})
        torch.testing.assert_close(dict(model.state_dict()), dict(_model(seed=7).state_dict()))

    def test_of_one_file_with_an_optimizer_by_name(self, saved, tmp_path):
        state = {"state": {"0.weight": {"step": torch.ones(())}}, "param_groups": [{"lr": 1.0, "params": ["0.weight"]}]}
        torch.save({"model": _model().state_dict(), "optimizer": state, "epoch": 2}, tmp_path / "file")
        folder = ShardedFolder(convert(tmp_path / "file", tmp_path / "new", "sharded").path)
        assert folder.meta == {"epoch": 2}
        assert {place for _, place in folder.below("optimizer")} == {
            ("state", "0.weight", "step"),
            ("param_groups", 0, "lr"),
            ("param_groups", 0, "params"),
        }

    def test_of_one_file_with_an_optimizer_that_knows_names(self, tmp_path):
        model = _model()
        optimizer = torch.optim.AdamW(model.named_parameters())
        model(torch.arange(12.0).reshape(4, 3)).square().sum().backward()
        optimizer.step()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, tmp_path / "file")
        done = convert(tmp_path / "file", tmp_path / "new", "sharded")
        assert list(differences(tmp_path / "file", done.path)) == []
        assert "optimizer.state.0.weight.exp_avg" in ShardedFolder(done.path).stored
        torch.save({**state, "model": {"w": torch.ones(1)}}, tmp_path / "other")
        with pytest.raises(ValueError, match="has its parameters by number"):
            convert(tmp_path / "other", tmp_path / "new", "sharded", overwrite=True)

    def test_what_only_a_strategy_can_tell_is_not_guessed(self, saved, tmp_path):
        with pytest.raises(
            ValueError, match="'optimizer' has its parameters by number, and a sharded folder has them by"
        ):
            convert(saved / "whole", tmp_path / "new", "sharded")
        torch.save({"model": {"w": torch.ones(1)}, "rng": {"cpu": torch.ones(1)}}, tmp_path / "two")
        with pytest.raises(
            ValueError, match=r"Besides 'model', the entries \['rng'\] look like state dicts of modules"
        ):
            convert(tmp_path / "two", tmp_path / "new", "sharded")
        assert [file.name for file in tmp_path.iterdir()] == ["two"]

    @pytest.mark.parametrize("odd", [torch.eye(3).to_sparse(), torch.ones(3, device="meta")])
    def test_a_tensor_that_shards_cannot_hold_is_named(self, tmp_path, odd):
        torch.save({"w": torch.ones(1), "x": odd}, tmp_path / "file")
        with pytest.raises(ValueError, match=r"these are sparse, quantized or meta: \['model.x'\]"):
            convert(tmp_path / "file", tmp_path / "new", "sharded")


class TestSource:
    def test_that_is_damaged_is_refused_by_the_name_of_the_file(self, saved, tmp_path):
        shutil.copytree(saved / "parts", tmp_path / "parts")
        file = tmp_path / "parts" / "__1_0.distcp"
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        for format in ("torch", "safetensors", "sharded"):
            with pytest.raises(DamagedCheckpointError, match="__1_0.distcp"):
                convert(tmp_path / "parts", tmp_path / "new", format)
        assert [path.name for path in tmp_path.iterdir()] == ["parts"]

    def test_an_index_is_verified_with_its_folder(self, saved, tmp_path):
        folder = convert(saved / "hf", tmp_path / "hf", "safetensors", max_shard_size=100).path
        assert convert(folder / "model.safetensors.index.json", tmp_path / "a.pt").was_verified
        next(folder.glob("*.safetensors")).write_bytes(b"")
        with pytest.raises(DamagedCheckpointError):
            convert(folder / "model.safetensors.index.json", tmp_path / "b.pt")

    def test_of_a_folder_of_checkpoints_is_the_newest_good_one(self, saved, tmp_path):
        folder = CheckpointDirectory(tmp_path / "run")
        for step in (1, 2):
            convert(saved / "whole", folder.path_of(step))
        folder.path_of(2).write_bytes(folder.path_of(2).read_bytes()[:-1])
        with pytest.warns(UserWarning, match="step-00000002"):
            assert _loads(convert(folder.folder, tmp_path / "c.pt").path)

    def test_that_holds_objects_is_read_if_it_is_trusted(self, tmp_path):
        torch.save({"where": Path("here")}, tmp_path / "old")
        with pytest.raises(pickle.UnpicklingError, match="holds an object of pathlib.*weights_only=False"):
            convert(tmp_path / "old", tmp_path / "new")
        assert not (tmp_path / "new").exists()
        convert(tmp_path / "old", tmp_path / "new", weights_only=False)
        assert torch.load(tmp_path / "new", weights_only=False) == {"where": Path("here")}

    def test_that_is_none_is_named(self, tmp_path):
        (tmp_path / "empty").mkdir()
        (tmp_path / "text").write_text("hello")
        with pytest.raises(ValueError, match="empty' holds no checkpoint that can be read here"):
            convert(tmp_path / "empty", tmp_path / "new")
        with pytest.raises(RuntimeError, match="text' is no checkpoint that can be read here, or is damaged"):
            convert(tmp_path / "text", tmp_path / "new")
        with pytest.raises(FileNotFoundError, match="gone"):
            convert(tmp_path / "gone", tmp_path / "new")


def test_either_end_may_be_a_url(saved, tmp_path):
    place = f"memory://conversion-{tmp_path.name}"
    done = convert(saved / "parts", f"{place}/hf", "safetensors")
    assert done.has_manifest
    with pytest.raises(FileExistsError, match="hf' exists"):
        convert(saved / "parts", done.path, "safetensors")
    back = convert(done.path, tmp_path / "hf", "safetensors")
    assert back.was_verified
    assert list(differences(saved / "parts", back.path, key="model")) == []


class TestTarget:
    def test_that_exists_is_refused_and_stays(self, saved, tmp_path):
        (tmp_path / "c").write_text("mine")
        with pytest.raises(FileExistsError, match="c' exists. Delete it"):
            convert(saved / "whole", tmp_path / "c")
        assert (tmp_path / "c").read_text() == "mine"

    def test_is_replaced_on_demand_by_any_form(self, saved, tmp_path):
        target = tmp_path / "c"
        for format, kind in (
            ("torch", "parts"),
            ("safetensors", "whole"),
            ("sharded", "parts"),
            ("safetensors", "old"),
        ):
            convert(saved / kind, target, format, overwrite=True)
            _check(target)
        assert {file.name for file in target.iterdir()} == {"model.safetensors", "manifest.json"}
        assert [path.name for path in tmp_path.iterdir()] == ["c"]

    @pytest.mark.parametrize("has_manifest", [True, False])
    @pytest.mark.parametrize(("source", "format"), [("whole", "safetensors"), ("parts", "sharded")])
    def test_keeps_what_belongs_to_others_but_no_part_of_a_checkpoint(
        self, saved, tmp_path, source, format, has_manifest
    ):
        target = convert(saved / "hf", tmp_path / "c", "safetensors", max_shard_size=100).path
        if not has_manifest:
            (target / "manifest.json").unlink()
        others = ("config.json", "lora.safetensors")
        for name in others:
            (target / name).write_text(name)
        convert(saved / source, target, format, overwrite=True)
        assert {file.name for file in target.iterdir()} == {*read_manifest(target).files, "manifest.json", *others}
        assert (target / "lora.safetensors").read_text() == "lora.safetensors"
        assert not list(target.glob("model-*"))

    def test_keeps_weights_beside_shards(self, saved, tmp_path):
        target = shutil.copytree(saved / "parts", tmp_path / "c")
        (target / "lora.safetensors").touch()
        (target / "old.safetensors.index.json").touch()
        convert(saved / "parts", target, "sharded", overwrite=True)
        assert (target / "lora.safetensors").exists()
        with pytest.raises(FileExistsError, match="the index 'old.safetensors.index.json' of other weights, which"):
            convert(saved / "parts", target, "safetensors", overwrite=True)
        (target / "old.safetensors.index.json").unlink()
        convert(saved / "parts", target, "safetensors", overwrite=True)
        assert {file.name for file in target.iterdir()} == {"model.safetensors", "manifest.json", "lora.safetensors"}

    @pytest.mark.parametrize("text", ["{", '{"weight_map": {"w": "../w.safetensors"}}'])
    def test_of_an_index_that_is_damaged_only_what_surely_belongs_to_it_is_replaced(self, saved, tmp_path, text):
        (tmp_path / "c").mkdir()
        (tmp_path / "c" / "model.safetensors.index.json").write_text(text)
        (tmp_path / "c" / "lora.safetensors").touch()
        convert(saved / "whole", tmp_path / "c", "safetensors", overwrite=True)
        names = {file.name for file in (tmp_path / "c").iterdir()}
        assert names == {"model.safetensors", "manifest.json", "lora.safetensors"}

    def test_may_be_the_source(self, saved, tmp_path):
        shutil.copytree(saved / "parts", tmp_path / "c")
        convert(tmp_path / "c", tmp_path / "c", overwrite=True)
        assert _loads(tmp_path / "c")

    def test_a_folder_that_is_no_checkpoint_is_never_replaced(self, saved, tmp_path):
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "precious").touch()
        with pytest.raises(FileExistsError, match="data' holds no checkpoint, so it is not replaced"):
            convert(saved / "whole", tmp_path / "data", overwrite=True)
        assert (tmp_path / "data" / "precious").exists()

    @pytest.mark.parametrize("source", ["parts", "hf"])
    def test_no_file_takes_the_place_of_a_folder_with_other_things(self, saved, tmp_path, source):
        shutil.copytree(saved / source, tmp_path / "run.safetensors")
        (tmp_path / "run.safetensors" / "logs").mkdir()
        before = sorted(tmp_path.rglob("*"))
        for format in ("torch", "safetensors"):
            with pytest.raises(IsADirectoryError, match="has 'logs' in it, which is no part of a checkpoint"):
                convert(saved / "whole", tmp_path / "run.safetensors", format, overwrite=True)
        assert sorted(tmp_path.rglob("*")) == before

    @pytest.mark.parametrize("format", ["torch", "safetensors", "sharded"])
    def test_a_file_that_is_no_checkpoint_is_never_replaced(self, saved, tmp_path, format):
        (tmp_path / "text").write_text("mine")
        (tmp_path / "a.json").write_text('{"weight_map": {}}')
        with zipfile.ZipFile(tmp_path / "a.docx", "w") as archive:
            archive.writestr("word/document.xml", "mine")
        (tmp_path / "pickle").write_bytes(pickle.dumps([1]))
        os.mkfifo(tmp_path / "pipe")
        for path in list(tmp_path.iterdir()):
            with pytest.raises(FileExistsError, match=f"{path.name}' is no checkpoint, as far as can be seen"):
                convert(saved / "whole", path, format, overwrite=True)
        assert (tmp_path / "text").read_text() == "mine"

    def test_any_checkpoint_in_a_file_is_replaced_and_what_is_empty(self, saved, tmp_path):
        torch.save([1], tmp_path / "new.pt")
        torch.save([1], tmp_path / "old.pt", _use_new_zipfile_serialization=False)
        save_file({"w": torch.ones(1)}, tmp_path / "w")
        shutil.copy(saved / "whole", tmp_path / "cut")
        os.truncate(tmp_path / "cut", 500)
        (tmp_path / "empty").touch()
        for path in list(tmp_path.iterdir()):
            assert _loads(convert(saved / "whole", path, overwrite=True).path)

    def test_a_write_that_fails_leaves_what_was_there(self, saved, tmp_path, monkeypatch):
        target = convert(saved / "whole", tmp_path / "c").path

        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("lightning.fabric.checkpoint.conversion.write_safetensors", full)
        with pytest.raises(OSError, match="No space left"):
            convert(saved / "parts", target, "safetensors", overwrite=True)
        assert _loads(target)
        assert [path.name for path in tmp_path.iterdir()] == ["c"]

    @pytest.mark.parametrize(
        ("target", "arguments", "message"),
        [
            ("c", {"format": "zip"}, r"`format` must be one of \['torch', 'safetensors', 'sharded'\], but got 'zip'"),
            ("c", {"max_shard_size": 5}, "for safetensors files in a folder, but .*c' is format='torch'"),
            ("c.safetensors", {"format": "safetensors", "max_shard_size": 5}, "c.safetensors' is a single file"),
            ("c", {"format": "safetensors", "max_shard_size": 0}, "at least 1 byte, but got 0"),
            ("c", {"format": "safetensors", "max_shard_size": "much"}, "such as 5GB.*but got 'much'"),
        ],
    )
    def test_arguments_that_do_not_go_together(self, saved, tmp_path, target, arguments, message):
        with pytest.raises(ValueError, match=message):
            convert(saved / "whole", tmp_path / target, **arguments)


class TestDifferences:
    def test_forms_of_one_state_are_equal(self, saved, tmp_path):
        convert(saved / "parts", tmp_path / "c.pt")
        assert list(differences(saved / "parts", tmp_path / "c.pt")) == []
        assert list(differences(saved / "whole", saved / "old")) == []
        assert list(differences(saved / "w.safetensors", saved / "hf")) == []
        assert list(differences(saved / "dcp", saved / "hf", key="model")) == []

    @pytest.mark.parametrize(
        ("a", "b", "lines"),
        [
            ({"x": 1, "y": [1, 2]}, {"x": 1, "y": (1, 3)}, ["y.1: 2 / 3"]),
            ({"x": 1}, {"y": "z" * 99}, ["x: only in the first, 1", f"y: only in the second, '{'z' * 56}..."]),
            ({"x": float("nan"), "y": 1}, {"x": float("nan"), "y": True}, ["y: 1 / True"]),
            ({"x": {}}, {"x": []}, ["x: {} / []"]),
            ({"x": torch.ones(2)}, {"x": torch.ones(3)}, ["x: float32 (2,) / float32 (3,)"]),
            ({"x": torch.ones(2)}, {"x": 1}, ["x: float32 (2,) / 1"]),
            ({"x": torch.ones(2)}, {"x": torch.ones(2, dtype=torch.bfloat16)}, ["x: float32 / bfloat16"]),
            (
                {"x": torch.tensor([1, 2, 2**40])},
                {"x": torch.tensor([1, 5, 2**40])},
                ["x: max difference 3, in 1 of 3 values"],
            ),
            (
                {"x": torch.tensor([float("nan"), float("inf"), 1.0])},
                {"x": torch.tensor([float("nan"), float("inf"), float("nan")])},
                ["x: max difference nan, in 1 of 3 values"],
            ),
            (
                {"x": torch.ones(3, dtype=torch.float8_e4m3fn), "y": torch.tensor([True])},
                {"x": torch.full((3,), 1.5), "y": torch.tensor([False])},
                [
                    "x: float8_e4m3fn / float32, max difference 0.5, in 3 of 3 values",
                    "y: max difference 1, in 1 of 1 values",
                ],
            ),
            (
                {"x": torch.ones(2, dtype=torch.complex64), "y": torch.eye(3).to_sparse()},
                {"x": torch.full((2,), 1 + 2j), "y": torch.eye(3)},
                ["x: max difference 2, in 2 of 2 values"],
            ),
            (
                {"x": torch.ones(2, device="meta"), "y": torch.ones(2, device="meta")},
                {"x": torch.ones(2, device="meta", dtype=torch.half), "y": torch.ones(2)},
                ["x: float32 / float16", "y: no values / values"],
            ),
            (torch.ones(1), torch.zeros(1), ["everything: max difference 1, in 1 of 1 values"]),
        ],
    )
    def test_are_named_by_their_places(self, tmp_path, a, b, lines):
        torch.save(a, tmp_path / "a")
        torch.save(b, tmp_path / "b")
        assert list(differences(tmp_path / "a", tmp_path / "b")) == lines
        assert list(differences(tmp_path / "a", tmp_path / "a")) == []

    def test_are_found_anywhere_in_a_large_tensor(self, tmp_path):
        tensor = torch.zeros(3 * 2**20)
        torch.save(tensor, tmp_path / "a")
        tensor[-1], tensor[0] = 2.0, 1.0
        torch.save(tensor, tmp_path / "b")
        assert list(differences(tmp_path / "a", tmp_path / "b")) == [
            "everything: max difference 2, in 2 of 3145728 values"
        ]

    @pytest.mark.filterwarnings("ignore:torch.quantize:UserWarning", "ignore:TypedStorage:UserWarning")
    def test_of_quantized_tensors_are_those_of_their_values(self, tmp_path):
        for name, last in (("a", 2.0), ("b", 3.0)):
            tensor = torch.quantize_per_tensor(torch.tensor([1.0, last]), 0.5, 0, torch.qint8)
            torch.save({"x": tensor}, tmp_path / name)
        assert list(differences(tmp_path / "a", tmp_path / "b")) == ["x: max difference 1, in 1 of 2 values"]
        for format in ("sharded", "safetensors"):
            with pytest.raises(ValueError, match=r"sparse, quantized or meta: \['(model.)?x'\]"):
                convert(tmp_path / "a", tmp_path / "c", format)

    def test_a_tensor_that_cannot_be_compared_is_named(self, tmp_path):
        torch.save({"x": torch.ones(2)}, tmp_path / "a")
        with (
            pytest.MonkeyPatch.context() as patch,
            pytest.raises(ValueError, match="'x' is of a kind that cannot be compared: no"),
        ):
            patch.setattr("lightning.fabric.checkpoint.comparison._pieces", lambda tensor: _raise(RuntimeError("no")))
            list(differences(tmp_path / "a", tmp_path / "a"))

    def test_of_groups_that_a_folder_has_as_one_value(self, tmp_path):
        groups = [{"lr": 0.5, "params": ["a", "b"]}, {"lr": 1.0, "params": ["c"]}, {"lr": 2.0, "params": []}]
        flat = {"model.a": torch.ones(1), "optimizer.state.b.step": torch.ones(1), "optimizer.param_groups": groups}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            planner = DefaultSavePlanner(flatten_state_dict=False)
            dcp.save(flat, checkpoint_id=tmp_path / "folder", planner=planner, no_dist=True)
        done = convert(tmp_path / "folder", tmp_path / "c.pt")
        assert torch.load(done.path, weights_only=True)["optimizer"]["param_groups"][1]["params"] == [2]
        assert list(differences(tmp_path / "folder", done.path)) == []

    def test_an_entry_that_is_missing_is_named(self, saved):
        with pytest.raises(KeyError, match="There is no entry 'net'; the checkpoint has .*'model'"):
            list(differences(saved / "parts", saved / "whole", key="net"))
