"""What a manifest says of a checkpoint, and that every change of a byte is noticed."""

import json
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning.fabric.checkpoint import manifest as module
from lightning.fabric.checkpoint.manifest import (
    MANIFEST,
    DamagedCheckpointError,
    FileRecord,
    Manifest,
    NewerCheckpointError,
    attach,
    manifest_of,
    read_manifest,
    record_of,
    verify,
)


def _save_file(path, trusts_archive=False):
    torch.save({"weight": torch.arange(8.0), "epoch": 3}, path)
    record = record_of(path, "", trusts_archive=trusts_archive)
    assert record.checksum.startswith("crc32/zip:" if trusts_archive else "crc32/4194304:")
    assert attach(path, Manifest({"": record}, step=3, metrics={"loss": 0.5}))
    return path


def _save_folder(path):
    (path / "inner").mkdir(parents=True)
    (path / "a.bin").write_bytes(b"first")
    (path / "inner" / "b.bin").write_bytes(b"second")
    (path / "empty").touch()
    attach(path, manifest_of(path, step=3))
    return path


def _check(path):
    manifest = read_manifest(path)
    assert manifest is not None
    verify(path, manifest)


class TestManifest:
    @given(
        st.dictionaries(st.text("abc/", min_size=1).filter(lambda name: not name.startswith("/")), st.integers(0)),
        st.none() | st.integers(0),
        st.dictionaries(st.text(), st.floats(allow_nan=False)),
    )
    def test_comes_back_as_it_was_written(self, sizes, step, metrics):
        manifest = Manifest({name: FileRecord(size, None) for name, size in sizes.items()}, step=step, metrics=metrics)
        assert Manifest.from_bytes(manifest.to_bytes()) == manifest

    @pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", "..\\windows", "C:file", "a/.."])
    def test_that_names_a_file_outside_is_refused(self, name):
        with pytest.raises(ValueError, match="not inside of the checkpoint"):
            Manifest.from_bytes(Manifest({name: FileRecord(1)}).to_bytes())

    def test_of_a_later_format_is_refused(self):
        later = Manifest({}).to_bytes().replace(b'"fabric_checkpoint":1', b'"fabric_checkpoint":2')
        with pytest.raises(ValueError, match="not as it was written"):
            Manifest.from_bytes(later)

    def test_any_changed_byte_of_it_is_noticed(self):
        data = Manifest({"a": FileRecord(1, "x")}, step=4).to_bytes()
        for position in range(len(data)):
            changed = bytearray(data)
            changed[position] ^= 1
            with pytest.raises(ValueError, match=r"."):
                Manifest.from_bytes(bytes(changed))


class TestOneFile:
    def test_is_still_what_torch_reads(self, tmp_path):
        path = _save_file(tmp_path / "a.pt")
        for mmap in (False, True):
            assert torch.load(path, mmap=mmap, weights_only=True)["weight"].tolist() == list(range(8))

    def test_has_its_manifest_inside(self, tmp_path):
        manifest = read_manifest(_save_file(tmp_path / "a.pt"))
        assert (manifest.step, dict(manifest.metrics), set(manifest.files)) == (3, {"loss": 0.5}, {""})

    @pytest.mark.parametrize("trusts_archive", [False, True])
    def test_any_flipped_byte_is_noticed(self, tmp_path, trusts_archive):
        path = _save_file(tmp_path / "a.pt", trusts_archive)
        _check(path)
        whole = path.read_bytes()
        for position in range(0, len(whole), 1 if trusts_archive else 5):
            changed = bytearray(whole)
            changed[position] ^= 1
            path.write_bytes(changed)
            with pytest.raises(DamagedCheckpointError):
                _check(path)

    @pytest.mark.parametrize("left", [0, 1, 100, -1, -30])
    def test_a_shorter_file_is_none_or_damaged(self, tmp_path, left):
        path = _save_file(tmp_path / "a.pt")
        path.write_bytes(path.read_bytes()[:left])
        try:
            found = read_manifest(path)
        except DamagedCheckpointError:
            return
        assert found is None  # nothing of ours is left in it,
        with pytest.raises((RuntimeError, EOFError, pickle.UnpicklingError)):  # nor anything for torch
            torch.load(path, weights_only=True)

    def test_what_the_disk_made_of_a_file_before_its_manifest_came_is_noticed(self, tmp_path):
        path = tmp_path / "a.pt"
        torch.save({"weight": torch.arange(1000.0)}, path)
        whole = bytearray(path.read_bytes())
        whole[whole.index(torch.arange(1000.0).numpy().tobytes()) + 2000] ^= 1
        path.write_bytes(whole)
        attach(path, Manifest({"": record_of(path, "", trusts_archive=True)}))
        with pytest.raises(DamagedCheckpointError, match="other content"):
            _check(path)

    def test_of_another_program_has_none(self, tmp_path):
        path = tmp_path / "a.pt"
        torch.save({}, path)
        assert read_manifest(path) is None

    def test_that_is_no_archive_gets_none(self, tmp_path):
        path = tmp_path / "a.txt"
        path.write_text("a text")
        assert not attach(path, manifest_of(path))
        assert path.read_text() == "a text"


class TestFolder:
    def test_lists_every_file(self, tmp_path):
        manifest = read_manifest(_save_folder(tmp_path / "a"))
        assert {name: record.size for name, record in manifest.files.items()} == {
            "a.bin": 5,
            "inner/b.bin": 6,
            "empty": 0,
        }
        assert manifest.size == 11

    @pytest.mark.parametrize("name", ["a.bin", "inner/b.bin", MANIFEST])
    def test_any_flipped_byte_is_noticed_with_the_file(self, tmp_path, name):
        path = _save_folder(tmp_path / "a")
        whole = (path / name).read_bytes()
        for position in range(len(whole)):
            changed = bytearray(whole)
            changed[position] ^= 1
            (path / name).write_bytes(changed)
            with pytest.raises(DamagedCheckpointError) as caught:
                _check(path)
            assert caught.value.file == name

    @pytest.mark.parametrize("name", ["a.bin", "inner/b.bin", "empty"])
    def test_a_missing_file_is_named(self, tmp_path, name):
        path = _save_folder(tmp_path / "a")
        (path / name).unlink()
        with pytest.raises(DamagedCheckpointError, match=f"'{name}' is missing"):
            _check(path)

    def test_a_shorter_file_is_named_without_reading_it(self, tmp_path):
        path = _save_folder(tmp_path / "a")
        (path / "a.bin").write_bytes(b"firs")
        with pytest.raises(DamagedCheckpointError, match=r"'a.bin' has 4 bytes, and had 5"):
            verify(path, read_manifest(path), checksums=False)

    def test_ranks_share_the_reading(self, tmp_path):
        path = _save_folder(tmp_path / "a")
        (path / "a.bin").write_bytes(b"FIRST")
        manifest = read_manifest(path)
        failed = []
        for rank in range(3):
            try:
                verify(path, manifest, is_mine=lambda number, rank=rank: number % 3 == rank)
            except DamagedCheckpointError:
                failed.append(rank)
        assert len(failed) == 1

    def test_without_one_is_of_another_program(self, tmp_path):
        assert read_manifest(tmp_path) is None

    def test_it_is_json_for_people(self, tmp_path):
        content = json.loads((_save_folder(tmp_path / "a") / MANIFEST).read_text())
        assert content["fabric_checkpoint"] == 1
        assert content["files"]["a.bin"]["size"] == 5


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_one_of_a_later_version_is_not_called_damaged(tmp_path, monkeypatch, kind):
    path = tmp_path / "a"
    if kind == "file":
        torch.save({"x": 1}, path)
    else:
        path.mkdir()
    monkeypatch.setattr(module, "_FORMAT", 2)
    attach(path, manifest_of(path))
    monkeypatch.undo()
    with pytest.raises(NewerCheckpointError, match="is of a later version: .* update lightning-fabric") as caught:
        read_manifest(path)
    assert type(pickle.loads(pickle.dumps(caught.value))) is NewerCheckpointError
