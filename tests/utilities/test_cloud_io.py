import errno
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from lightning.fabric.utilities import cloud_io
from lightning.fabric.utilities.cloud_io import (
    _atomic_save,
    _is_dir,
    _is_local_file_protocol,
    _load,
    get_filesystem,
)

STATE = {"weight": torch.arange(6.0).view(2, 3), "step": 3}


def _assert_is_state(loaded: dict[str, Any]) -> None:
    assert loaded["step"] == 3
    assert torch.equal(loaded["weight"], STATE["weight"])


@pytest.fixture
def memory() -> Any:
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


@pytest.mark.parametrize(
    ("path", "local"),
    [
        ("a/b.ckpt", True),
        (Path("/a/b"), True),
        ("C:\\folder\\file", True),
        ("file:///a/b", True),
        ("local://a", True),
        ("s3://bucket/key", False),
        ("memory://a", False),
        ("https://host/a", False),
        ("simplecache::s3://bucket/key", False),
    ],
)
def test_local_or_not(path: Any, local: bool) -> None:
    assert _is_local_file_protocol(path) is local


def test_get_filesystem(memory: Any) -> None:
    assert get_filesystem("memory://a") is memory
    assert get_filesystem(Path("a")) is fsspec.filesystem("file")


def test_is_dir(tmp_path: Path) -> None:
    local = get_filesystem(tmp_path)
    assert _is_dir(local, tmp_path)
    assert not _is_dir(local, tmp_path / "missing")

    class Store:
        protocol = ("s3", "s3a")

        def isdir(self, path: str) -> bool:
            return path == "s3://bucket/full"

    assert _is_dir(Store(), "s3://bucket/any")  # type: ignore[arg-type]
    assert not _is_dir(Store(), "s3://bucket/any", strict=True)  # type: ignore[arg-type]
    assert _is_dir(Store(), "s3://bucket/full", strict=True)  # type: ignore[arg-type]


class TestSave:
    def test_local(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "folder" / "a.ckpt"
        _atomic_save(STATE, path)
        _assert_is_state(torch.load(path))
        assert os.listdir(path.parent) == ["a.ckpt"]

    def test_file_url(self, tmp_path: Path) -> None:
        _atomic_save(STATE, f"file://{tmp_path}/a.ckpt")
        _assert_is_state(_load(f"file://{tmp_path}/a.ckpt"))

    def test_remote(self, memory: Any) -> None:
        _atomic_save(STATE, "memory://new/folder/a.ckpt")
        _assert_is_state(_load("memory://new/folder/a.ckpt"))

    @pytest.mark.parametrize("umask", [0o022, 0o077])
    def test_permissions_follow_the_umask(self, umask: int, tmp_path: Path) -> None:
        before = os.umask(umask)
        try:
            _atomic_save(STATE, tmp_path / "a.ckpt")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "a.ckpt").stat().st_mode) == 0o666 & ~umask

    def test_a_link_stays_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "real.ckpt").write_bytes(b"old")
        (tmp_path / "link.ckpt").symlink_to("real.ckpt")
        _atomic_save(STATE, tmp_path / "link.ckpt")
        assert (tmp_path / "link.ckpt").is_symlink()
        _assert_is_state(torch.load(tmp_path / "real.ckpt"))

    def test_a_folder_is_not_replaced(self, tmp_path: Path) -> None:
        with pytest.raises(IsADirectoryError, match=tmp_path.name):
            _atomic_save(STATE, tmp_path)

    def test_a_pipe_is_not_replaced(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        os.mkfifo(tmp_path / "pipe")
        written = []
        monkeypatch.setattr(torch, "save", lambda obj, path: written.append(path))
        _atomic_save(STATE, tmp_path / "pipe")
        assert written == [tmp_path / "pipe"]
        assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)

    def test_goes_straight_to_the_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """No buffer in between: torch writes to a file beside the target, on the same file system."""
        targets: list[Any] = []
        save = torch.save
        monkeypatch.setattr(torch, "save", lambda obj, f: (targets.append(f), save(obj, f)))
        _atomic_save(STATE, tmp_path / "a.ckpt")
        assert isinstance(targets[0], Path)
        assert targets[0].parent == tmp_path
        assert targets[0].name != "a.ckpt"


class TestFailedSave:
    """The temporary file is gone, what was there before is intact, and the error names the path."""

    @pytest.fixture
    def path(self, tmp_path: Path) -> Any:
        path = tmp_path / "a.ckpt"
        _atomic_save(STATE, path)
        yield path
        _assert_is_state(torch.load(path))
        assert os.listdir(tmp_path) == ["a.ckpt"]

    @pytest.mark.parametrize(
        ("error", "raised"),
        [
            (OSError(errno.ENOSPC, "No space left on device"), OSError),
            (RuntimeError("unexpected pos 64 vs 0"), RuntimeError),
        ],
    )
    def test_full_disk(
        self, path: Path, error: Exception, raised: type[Exception], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(obj: Any, file: Path) -> None:
            file.write_bytes(b"half")
            raise error

        monkeypatch.setattr(torch, "save", fail)
        with pytest.raises(raised, match="a.ckpt") as caught:
            _atomic_save(STATE, path)
        assert getattr(caught.value, "errno", errno.ENOSPC) == errno.ENOSPC

    def test_what_cannot_be_pickled(self, path: Path) -> None:
        with pytest.raises((pickle.PicklingError, AttributeError)):
            _atomic_save({"weight": torch.ones(3), "function": lambda: None}, path)

    def test_interrupt(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(source: Any, target: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            _atomic_save({"weight": torch.zeros(3)}, path)


def test_failed_remote_save_keeps_what_was_there(memory: Any) -> None:
    _atomic_save(STATE, "memory://a.ckpt")
    with pytest.raises((pickle.PicklingError, AttributeError)):
        _atomic_save({"weight": torch.ones(3), "function": lambda: None}, "memory://a.ckpt")
    _assert_is_state(_load("memory://a.ckpt"))


class TestLoad:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        torch.save(STATE, tmp_path / "a.ckpt")
        return tmp_path / "a.ckpt"

    @pytest.mark.parametrize("mmap", [None, False, True])
    def test_local(self, path: Path, mmap: bool | None) -> None:
        _assert_is_state(_load(path, mmap=mmap))
        _assert_is_state(_load(str(path), mmap=mmap))

    def test_mmap_leaves_tensors_in_the_file(self, path: Path) -> None:
        mapped = lambda: str(path) in Path("/proc/self/maps").read_text()
        read = _load(path)
        assert not mapped()
        left = _load(path, mmap=True)
        assert mapped()
        assert torch.equal(left["weight"], read["weight"])

    def test_mmap_of_an_old_format_reads_it(self, tmp_path: Path) -> None:
        torch.save(STATE, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
        _assert_is_state(_load(tmp_path / "old.ckpt", mmap=True))

    def test_open_file(self, path: Path) -> None:
        with path.open("rb") as file:
            _assert_is_state(_load(file))

    def test_map_location(self, path: Path) -> None:
        assert _load(path, map_location="meta")["weight"].is_meta

    def test_weights_only_is_the_default_of_torch(self, tmp_path: Path) -> None:
        torch.save({"path": Path("x")}, tmp_path / "a.ckpt")
        with pytest.raises(pickle.UnpicklingError):
            _load(tmp_path / "a.ckpt")
        assert _load(tmp_path / "a.ckpt", weights_only=False) == {"path": Path("x")}

    def test_missing_file_and_folder(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="missing.ckpt"):
            _load(tmp_path / "missing.ckpt")
        with pytest.raises(IsADirectoryError, match="is a folder"):
            _load(tmp_path)


def test_importing_does_not_import_fsspec() -> None:
    assert "fsspec" not in vars(cloud_io)
