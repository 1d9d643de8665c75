import pickle

import pytest
import torch
from tests.xla_stand_in import xla  # noqa: F401

from lightning.fabric.plugins import XLACheckpointIO


def test_tensors_are_read_where_there_is_no_xla_device(xla, tmp_path):  # noqa: F811
    import torch_xla

    there = torch_xla.device()
    checkpoint = {"a": torch.arange(3, device=there), "nested": [{"b": torch.ones(2, 2, device=there)}], "step": 3}
    XLACheckpointIO().save_checkpoint(checkpoint, tmp_path / "new" / "a.pt")
    for loaded in (torch.load(tmp_path / "new" / "a.pt"), XLACheckpointIO().load_checkpoint(tmp_path / "new" / "a.pt")):
        assert loaded["a"].device == torch.device("cpu")
        assert loaded["a"].tolist() == [0, 1, 2]
        assert loaded["nested"][0]["b"].tolist() == [[1.0, 1.0], [1.0, 1.0]]
        assert loaded["step"] == 3
    assert checkpoint["a"].device == there


def test_what_a_file_must_not_run_is_refused(tmp_path):
    torch.save({"a": slice(1)}, tmp_path / "a.pt")
    with pytest.raises(pickle.UnpicklingError, match="slice"):
        XLACheckpointIO().load_checkpoint(tmp_path / "a.pt", weights_only=True)
    assert XLACheckpointIO().load_checkpoint(tmp_path / "a.pt", weights_only=False) == {"a": slice(1)}


def test_storage_options_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"XLACheckpointIO.save_checkpoint"):
        XLACheckpointIO().save_checkpoint({}, tmp_path / "a.pt", storage_options={})


def test_a_file_is_removed(tmp_path):
    XLACheckpointIO().save_checkpoint({}, tmp_path / "a.pt")
    XLACheckpointIO().remove_checkpoint(tmp_path / "a.pt")
    assert not (tmp_path / "a.pt").exists()
