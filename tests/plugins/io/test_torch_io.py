import pickle
from pathlib import PurePosixPath

import pytest
import torch

from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities import cloud_io
from lightning.fabric.utilities.data import AttributeDict


class NotPlain:
    """Something that only full unpickling can make."""


class OldAttributeDict(dict):
    """Pickled as any subclass of dict is, item by item."""


@pytest.fixture
def io():
    return TorchCheckpointIO()


class TestSave:
    def test_writes_what_torch_load_reads(self, io, tmp_path):
        io.save_checkpoint({"w": torch.ones(2), "step": 3}, tmp_path / "new" / "folder" / "checkpoint.pt")
        loaded = torch.load(tmp_path / "new" / "folder" / "checkpoint.pt")
        assert (loaded["w"].tolist(), loaded["step"]) == ([1.0, 1.0], 3)

    @pytest.mark.parametrize("storage_options", [{}, {"anon": True}])
    def test_takes_no_storage_options(self, io, tmp_path, storage_options):
        with pytest.raises(TypeError, match="`TorchCheckpointIO.save_checkpoint` takes no `storage_options`"):
            io.save_checkpoint({}, tmp_path / "checkpoint.pt", storage_options=storage_options)
        assert not list(tmp_path.iterdir())


class TestLoad:
    def test_on_the_cpu_unless_told_otherwise(self, io, tmp_path):
        io.save_checkpoint({"w": torch.ones(2)}, tmp_path / "checkpoint.pt")
        assert io.load_checkpoint(tmp_path / "checkpoint.pt")["w"].device.type == "cpu"
        assert io.load_checkpoint(tmp_path / "checkpoint.pt", map_location="meta")["w"].is_meta

    @pytest.mark.parametrize("weights_only", [None, True, False])
    def test_attribute_dicts_come_back_as_such(self, io, tmp_path, weights_only):
        state = {"hparams": AttributeDict(lr=0.1, inner=AttributeDict(w=torch.ones(1)))}
        io.save_checkpoint(state, tmp_path / "checkpoint.pt")
        hparams = io.load_checkpoint(tmp_path / "checkpoint.pt", weights_only=weights_only)["hparams"]
        assert type(hparams) is type(hparams.inner) is AttributeDict
        assert (hparams.lr, hparams.inner.w.item()) == (0.1, 1.0)

    @pytest.mark.parametrize(("obj", "name"), [(NotPlain(), "NotPlain"), (PurePosixPath("x"), "PurePosixPath")])
    def test_a_refused_object_is_named_with_the_way_out(self, io, tmp_path, obj, name):
        path = tmp_path / "checkpoint.pt"
        io.save_checkpoint({"obj": obj}, path)
        with pytest.raises(pickle.UnpicklingError, match=rf"checkpoint.pt' holds an object of \S*{name}, .*") as info:
            io.load_checkpoint(path)
        assert "pass `weights_only=False`" in str(info.value)
        assert type(io.load_checkpoint(path, weights_only=False)["obj"]) is type(obj)
        with torch.serialization.safe_globals([type(obj)]):
            assert type(io.load_checkpoint(path)["obj"]) is type(obj)

    def test_an_allowed_subclass_of_dict_that_torch_still_refuses_is_named(self, io, tmp_path):
        io.save_checkpoint({"obj": OldAttributeDict(a=1)}, tmp_path / "checkpoint.pt")
        with (
            torch.serialization.safe_globals([OldAttributeDict]),
            pytest.raises(pickle.UnpicklingError, match="OldAttributeDict, .* pass `weights_only=False`"),
        ):
            io.load_checkpoint(tmp_path / "checkpoint.pt")

    def test_a_file_that_is_no_checkpoint_fails_as_torch_says(self, io, tmp_path):
        (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
        with pytest.raises(pickle.UnpicklingError):
            io.load_checkpoint(tmp_path / "checkpoint.pt")

    def test_a_missing_file_is_not_found(self, io, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"missing\.pt"):
            io.load_checkpoint(tmp_path / "missing.pt")

    @pytest.mark.parametrize("mmap", [True, False])
    def test_mmap_is_handed_to_torch(self, io, tmp_path, monkeypatch, mmap):
        seen = []
        monkeypatch.setattr(cloud_io.torch, "load", lambda *args, **options: seen.append(options["mmap"]))
        torch.save({}, tmp_path / "checkpoint.pt")
        io.load_checkpoint(tmp_path / "checkpoint.pt", mmap=mmap)
        assert seen == [mmap]


class TestElsewhere:
    def test_saves_loads_and_removes_through_fsspec(self, io):
        path = "memory://run/checkpoint.pt"
        io.save_checkpoint({"w": torch.ones(2)}, path)
        assert io.load_checkpoint(path)["w"].tolist() == [1.0, 1.0]
        io.remove_checkpoint(path)
        assert not cloud_io.get_filesystem(path).exists(path)
