"""The kit of faults: what it sees, that it strikes where it was told to, and that it leaves no trace."""

import contextlib
import errno
import os
import pathlib
import shutil
import signal
import tempfile
import threading
import time

import pytest
import torch

from lightning.fabric.checkpoint import transaction
from lightning.fabric.testing import (
    Forked,
    WritePoint,
    fail,
    fault_at,
    file_size_limit,
    flip,
    kill,
    on_ranks,
    stall,
    write_points,
)


def _write_all_ways(folder):
    os.mkdir(folder / "a")
    (folder / "a" / "b").mkdir()
    (folder / "a" / "text").write_text("text")
    descriptor = os.open(folder / "a" / "text", os.O_RDWR)
    os.fsync(descriptor)
    os.ftruncate(descriptor, 2)
    os.close(descriptor)
    os.truncate(folder / "a" / "text", 1)
    os.symlink("text", folder / "a" / "link")
    os.rename(folder / "a" / "text", folder / "a" / "moved")
    os.replace(folder / "a" / "moved", folder / "a" / "b" / "again")
    os.unlink(folder / "a" / "link")
    shutil.rmtree(folder / "a")


ALL_WAYS = [
    "mkdir a",
    "mkdir a/b",
    "open a/text",
    "open a/text",
    "fsync a/text",
    "truncate a/text",
    "truncate a/text",
    "symlink a/link",
    "rename a/text -> a/moved",
    "rename a/moved -> a/b/again",
    "remove a/link",
    "remove a/b/again",
    "rmdir a/b",
    "rmdir a",
]


class TestWritePoints:
    def test_sees_every_kind_in_order(self, tmp_path):
        with write_points(tmp_path) as points:
            _write_all_ways(tmp_path)
        assert [str(point) for point in points] == ALL_WAYS

    def test_sees_two_folders_change_places(self, tmp_path):
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
        with write_points(tmp_path) as points:
            transaction._exchange(tmp_path / "a", tmp_path / "b")
        assert points == [WritePoint("exchange", "a", "b")]

    def test_sees_other_threads(self, tmp_path):
        with write_points(tmp_path) as points:
            thread = threading.Thread(target=_write_all_ways, args=(tmp_path,))
            thread.start()
            thread.join()
        assert len(points) == len(ALL_WAYS)

    def test_does_not_see_reading_nor_other_folders(self, tmp_path):
        (tmp_path / "watched").mkdir()
        (tmp_path / "watched" / "file").write_text("text")
        with write_points(tmp_path / "watched") as points:
            (tmp_path / "watched" / "file").read_text()
            os.listdir(tmp_path / "watched")
            (tmp_path / "watched but not quite").write_text("text")
            with tempfile.TemporaryFile(dir=tmp_path) as file:
                os.fsync(file.fileno())
        assert points == []

    def test_sees_what_comes_in_or_goes_by_any_path(self, tmp_path, monkeypatch):
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "real")
        (tmp_path / "outside").write_text("text")
        monkeypatch.chdir(tmp_path / "real")
        with write_points(tmp_path / "link") as points:
            pathlib.Path("relative").touch()
            (tmp_path / "link" / "linked").touch()
            os.rename(tmp_path / "outside", b"inside")
        assert [(point.event, point.path, point.to) for point in points] == [
            ("open", "relative", ""),
            ("open", "linked", ""),
            ("rename", str(tmp_path / "outside"), "inside"),
        ]

    def test_ends_with_its_block(self, tmp_path):
        fsync, exchange = os.fsync, transaction._exchange
        with pytest.raises(ZeroDivisionError), write_points(tmp_path) as points, write_points(tmp_path):
            _ = 1 / 0
        _write_all_ways(tmp_path)
        assert points == []
        assert (os.fsync, transaction._exchange) == (fsync, exchange)


class TestFaultAt:
    @pytest.mark.parametrize("number", range(len(ALL_WAYS)))
    def test_comes_before_the_write_with_that_number(self, tmp_path, number):
        (tmp_path / "w").mkdir()
        with (
            pytest.raises(OSError, match="No space left") as caught,
            write_points(tmp_path / "w") as points,
            fault_at(number, tmp_path / "w", fail()),
        ):
            _write_all_ways(tmp_path / "w")
        assert caught.value.errno == errno.ENOSPC
        assert str(points[-1]) == ALL_WAYS[number]
        assert (number == 0) == (os.listdir(tmp_path / "w") == [])

    def test_is_over_after_one_write_unless_it_lasts(self, tmp_path):
        for lasting, found in ((False, ["0", "2"]), (True, ["0"])):
            with fault_at(1, tmp_path, fail(PermissionError("locked")), lasting=lasting):
                for name in "012":
                    with contextlib.suppress(PermissionError):
                        (tmp_path / name).touch()
            assert sorted(os.listdir(tmp_path)) == found
            for name in found:
                (tmp_path / name).unlink()

    def test_does_nothing_where_there_are_not_so_many(self, tmp_path):
        with fault_at(len(ALL_WAYS), tmp_path):
            _write_all_ways(tmp_path)

    def test_may_stall_the_write_or_do_anything(self, tmp_path):
        seen = []

        def act(point):
            (tmp_path / "written by the act").touch()  # which is no point
            seen.append(point)
            stall(0.01)(point)

        start = time.monotonic()
        with fault_at(0, tmp_path, act):
            (tmp_path / "a").touch()
        assert time.monotonic() - start >= 0.01
        assert seen == [WritePoint("open", "a")]


def _killed_everywhere(folder):
    found = []
    for number in range(len(ALL_WAYS) + 1):
        own = folder / str(number)
        own.mkdir()
        code = Forked(_killed_at, number, own).wait().code
        found.append((code, sorted(path.name for path in own.rglob("*"))))
    return found


def _killed_at(number, folder):
    with fault_at(number, folder, kill):
        thread = threading.Thread(target=_write_all_ways, args=(folder,))  # a thread takes all others with it
        thread.start()
        thread.join()


def test_a_process_is_killed_at_any_point(tmp_path):
    (found,) = on_ranks(1, _killed_everywhere, tmp_path)
    assert [code for code, _ in found] == [-signal.SIGKILL] * len(ALL_WAYS) + [0]
    assert [names for _, names in found[:4]] == [[], ["a"], ["a", "b"], ["a", "b", "text"]]
    assert found[-2:] == [(-signal.SIGKILL, ["a"]), (0, [])]


def _killed_within_a_file(path, size, act):
    with file_size_limit(size, act):
        torch.save(torch.zeros(100), path)


def _sizes_when_killed(folder):
    found = []
    for size in (0, 1, 300):
        path = folder / str(size)
        code = Forked(_killed_within_a_file, path, size, "kill").wait().code
        found.append((code, path.stat().st_size))
    return found


class TestFileSizeLimit:
    def test_kills_in_the_middle_of_a_file(self, tmp_path):
        (found,) = on_ranks(1, _sizes_when_killed, tmp_path)
        assert found == [(-signal.SIGXFSZ, size) for size in (0, 1, 300)]

    def test_is_a_full_disk_for_the_block(self, tmp_path):
        with file_size_limit(10), pytest.raises(OSError, match="File too large") as caught:
            (tmp_path / "a").write_bytes(bytes(11))
        assert caught.value.errno == errno.EFBIG
        assert (tmp_path / "a").stat().st_size == 10
        (tmp_path / "a").write_bytes(bytes(11))

    def test_is_one_for_torch_too(self, tmp_path):
        with pytest.raises(RuntimeError, match=r"unexpected pos|iostream error"):
            _killed_within_a_file(tmp_path / "a", 300, "fail")

    def test_of_another_kind_is_refused(self):
        with pytest.raises(ValueError, match="`act` is 'fail' or 'kill', but got 'stop'"), file_size_limit(1, "stop"):
            pass


@pytest.mark.parametrize(("offset", "found"), [(0, b"\x9ebc"), (2, b"ab\x9c"), (-1, b"ab\x9c"), (-3, b"\x9ebc")])
def test_flip_changes_one_byte(tmp_path, offset, found):
    (tmp_path / "a").write_bytes(b"abc")
    flip(tmp_path / "a", offset)
    assert (tmp_path / "a").read_bytes() == found


def test_flip_of_a_byte_that_is_not_there_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    with pytest.raises(IndexError, match="no byte at 3"):
        flip(tmp_path / "a", 3)


class _OnlyWritten(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one}{two}")


def _end_as(how):
    if how == "by error":
        raise ValueError("as told")
    if how == "by odd error":
        raise _OnlyWritten("as ", "told")
    if how == "late":
        time.sleep(100)
    if how == "with a function":
        return lambda: 0
    return torch.arange(3)


def _outcomes():
    found = {}
    for how in ("by error", "by odd error", "with a function", "well"):
        outcome = Forked(_end_as, how).wait()
        found[how] = (outcome.code, outcome.value, repr(outcome.error))
    late = Forked(_end_as, "late")
    try:
        late.wait(0.1)
    except TimeoutError as error:
        found["late"] = str(error).replace(str(late.pid), "PID")
    return found


def test_a_fork_tells_how_it_ended():
    (found,) = on_ranks(1, _outcomes)
    assert found.pop("well")[1].tolist() == [0, 1, 2]
    assert found.pop("with a function")[0] == 1
    assert found == {
        "by error": (1, None, "ValueError('as told')"),
        "by odd error": (1, None, "RuntimeError('_OnlyWritten: as told')"),
        "late": "The forked process PID had not ended after 0.1 s.",
    }
