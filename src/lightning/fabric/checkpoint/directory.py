"""A folder of checkpoints by step: the latest good one, and which of them are kept."""

import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.checkpoint.manifest import DamagedCheckpointError, Manifest, read_manifest, verify
from lightning.fabric.checkpoint.transaction import recover, remove, remove_if_stale, sync

LATEST = "latest"
_NAME = re.compile(r"step-(\d{8,})")


def _check_count(name: str, count: Any, advice: str = "") -> None:
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"{name} must be an integer, but got {count!r}.{advice}")
    if count < 1:
        raise ValueError(f"{name} must be at least 1, but got {count!r}.{advice}")


@dataclass(frozen=True)
class Best:
    """Keep those ``count`` checkpoints whose ``metric`` is the smallest (``"min"``) or largest (``"max"``).

    Of equal ones the newer; NaN is never among the best.
    """

    metric: str
    mode: Literal["min", "max"] = "min"
    count: int = 1

    def __post_init__(self) -> None:
        if self.mode not in ("min", "max"):
            raise ValueError(f"The best {self.metric!r} is the 'min' or the 'max', but got {self.mode!r}.")
        _check_count("`count` of the best to keep", self.count)


@dataclass(frozen=True)
class Entry:
    """A checkpoint in the folder; ``manifest`` None: its own is damaged, as ``error`` says."""

    path: Path  # a URL as text, where it is remote
    step: int
    manifest: Manifest | None
    error: DamagedCheckpointError | None = None

    def was_saved_before(self, time: str) -> bool:
        """Whether that is known."""
        return self.manifest is not None and self.manifest.time < time


def _entry(path: Path, step: int) -> Entry | None:
    """None: it has gone meanwhile."""
    try:
        return Entry(path, step, read_manifest(path))
    except DamagedCheckpointError as error:
        return Entry(path, step, None, error)
    except OSError as error:
        if not os.path.lexists(path):
            return None
        return Entry(path, step, None, unreadable(path, error))


def unreadable(path: Path, error: OSError) -> DamagedCheckpointError:
    """What is wrong with a checkpoint of which the disk, or a link that leads nowhere, gives nothing."""
    file = os.path.relpath(os.fsdecode(error.filename), path) if error.filename is not None else "."
    return DamagedCheckpointError(path, "" if file == "." else file, f"cannot be read: {error.strerror or error}")


def newest_first(entries: Iterable[Entry], latest: Any) -> list[Entry]:
    """Return ``entries`` in order, where ``latest`` is the path of the one that was committed last.

    Newer is what has the later step. But where a run has gone back to an earlier step and on from there, what it had
    saved beyond is older than all that it has saved since.
    """
    in_order = sorted(entries, key=lambda entry: entry.step, reverse=True)
    last = next((entry.manifest for entry in in_order if entry.path == latest), None)
    if last is None:
        return in_order
    # clocks of machines differ, so what seems to be saved after the last one says nothing
    times = [(each.step, each.manifest.time) for each in in_order if each.manifest and each.manifest.time <= last.time]
    left_behind = [
        each for each in in_order if any(step < each.step and each.was_saved_before(time) for step, time in times)
    ]
    return [each for each in in_order if each not in left_behind] + left_behind


def _target_of(hidden: Path) -> Path:
    return hidden.with_name(hidden.name[1:].split(".")[0])


class CheckpointDirectory:
    """``folder/step-00000012``, each a checkpoint in a file or a folder, and ``latest``, which names one.

    One process writes to it at a time. Whatever else lies in the folder stays there.

    Args:
        folder: where they are; made by the first save.
        keep_last: how many of the newest to keep; None: all, or with ``keep_best`` the newest alone.
        keep_best: which to keep besides.

    """

    def __init__(self, folder: Path, keep_last: int | None = None, keep_best: Best | None = None) -> None:
        if keep_last is not None:
            _check_count("`keep_last`", keep_last, " Pass None to keep all.")
        self.folder = folder
        self.keep_last = keep_last
        self.keep_best = keep_best

    def path_of(self, step: int) -> Path:
        """Where the checkpoint of ``step`` goes."""
        return self.folder / f"step-{step:08d}"

    def entries(self) -> list[Entry]:
        """Return what was committed, the newest first, as :func:`newest_first` says."""
        if not self.folder.is_dir():
            return []
        named = [(path, match) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name))]
        found = (_entry(path, int(match[1])) for path, match in named)
        return newest_first([entry for entry in found if entry is not None], self.latest())

    def latest(self) -> Path | None:
        """What ``latest`` names, the checkpoint that was committed last; None if it names none that is there."""
        try:
            name = (self.folder / LATEST).read_text().strip()
        except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError):
            return None
        path = self.folder / name
        return path if _NAME.fullmatch(name) and path.exists() else None

    def set_latest(self, path: Path, durable: bool = True) -> None:
        """Let ``latest`` name a committed checkpoint, in one step."""
        temporary = self.folder / f".{LATEST}.tmp"
        temporary.write_text(f"{path.name}\n")
        if durable:
            sync(temporary)
        os.replace(temporary, self.folder / LATEST)

    def good(self, checksums: bool = True) -> Iterator[tuple[Entry, DamagedCheckpointError | None]]:
        """Yield every checkpoint, the newest first, with what is wrong with it, or None: then it is as it was saved."""
        self.recover_all()
        for entry in self.entries():
            if entry.manifest is None:
                yield entry, entry.error or DamagedCheckpointError(entry.path, "", "has no manifest")
                continue
            try:
                verify(entry.path, entry.manifest, checksums)
            except DamagedCheckpointError as error:
                yield entry, error
            else:
                yield entry, None

    def recover_all(self) -> None:
        """Put back what interrupted saves have left out of its place."""
        if self.folder.is_dir():
            for path in self.folder.glob(".step-*.former"):
                recover(_target_of(path))

    def to_remove(self, entries: list[Entry]) -> list[Entry]:
        """Return which of ``entries`` (the newest first) need not stay.

        Never the newest one. Never what is damaged or has no manifest, for nobody knows what it is worth. And never
        what a run has left behind by going back to an earlier step: it may have been a mistake.
        """
        if self.keep_last is None and self.keep_best is None:
            return []
        whole = [entry for entry in entries if entry.manifest is not None]
        kept = {entry.path for entry in (*whole[: self.keep_last or 1], *self._best(whole))}
        kept |= {entry.path for entry in whole if entry.step > whole[0].step}
        return [entry for entry in whole if entry.path not in kept]

    def _best(self, entries: list[Entry]) -> list[Entry]:
        best = self.keep_best
        if best is None:
            return []
        sign = 1 if best.mode == "min" else -1
        rated = [
            (sign * value, -entry.step, entry)
            for entry in entries
            if entry.manifest is not None and not math.isnan(value := entry.manifest.metrics.get(best.metric, math.nan))
        ]
        return [entry for *_, entry in sorted(rated, key=lambda row: row[:2])[: best.count]]

    def retain(self) -> list[Path]:
        """Delete what need not stay, and return it. Called last, when ``latest`` names what was committed.

        Also what killed processes have left behind of saves and deletions.
        """
        for pattern in (".step-*.staged", ".step-*.removed", ".step-*.former"):
            for path in self.folder.glob(pattern):
                if not pattern.endswith("former") or _target_of(path).exists():
                    remove_if_stale(path)
        gone = [entry.path for entry in self.to_remove(self.entries())]
        for path in gone:
            hidden = path.with_name(f".{path.name}.removed")
            remove(hidden)
            os.rename(path, hidden)  # in one step: a half-deleted checkpoint never looks like one
            remove(hidden)
        return gone
