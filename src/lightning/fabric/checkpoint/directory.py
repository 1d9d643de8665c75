"""A folder of checkpoints by step: the latest good one, and which of them are kept."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lightning.fabric.checkpoint.manifest import DamagedCheckpointError, Manifest, read_manifest, verify
from lightning.fabric.checkpoint.transaction import recover, remove, sync

LATEST = "latest"
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Best:
    """Keep those ``count`` checkpoints whose ``metric`` is the smallest (``"min"``) or largest (``"max"``)."""

    metric: str
    mode: Literal["min", "max"] = "min"
    count: int = 1

    def __post_init__(self) -> None:
        if self.mode not in ("min", "max"):
            raise ValueError(f"The best {self.metric!r} is the 'min' or the 'max', but got {self.mode!r}.")
        if self.count < 1:
            raise ValueError(f"`count` of the best to keep must be at least 1, but got {self.count!r}.")


@dataclass(frozen=True)
class Entry:
    """A checkpoint in the folder; ``manifest`` None: its own is damaged, as ``error`` says."""

    path: Path
    step: int
    manifest: Manifest | None
    error: DamagedCheckpointError | None = None


class CheckpointDirectory:
    """``folder/step-00000012``, each a checkpoint in a file or a folder, and ``latest``, which names one.

    One process writes to it at a time.
    """

    def __init__(self, folder: Path, keep_last: int | None = None, keep_best: Best | None = None) -> None:
        if keep_last is not None and keep_last < 1:
            raise ValueError(f"`keep_last` must be at least 1, or None to keep all, but got {keep_last!r}.")
        self.folder = folder
        self.keep_last = keep_last
        self.keep_best = keep_best

    def path_of(self, step: int) -> Path:
        """Where the checkpoint of ``step`` goes."""
        return self.folder / f"step-{step:08d}"

    def entries(self) -> list[Entry]:
        """Return what was committed, the newest first."""
        if not self.folder.is_dir():
            return []
        found = []
        for path in self.folder.iterdir():
            if (match := _NAME.fullmatch(path.name)) is None:
                continue
            try:
                found.append(Entry(path, int(match[1]), read_manifest(path)))
            except DamagedCheckpointError as error:
                found.append(Entry(path, int(match[1]), None, error))
        return sorted(found, key=lambda entry: entry.step, reverse=True)

    def latest(self) -> Path | None:
        """What ``latest`` names; None if there is no such file, or no such checkpoint any more."""
        try:
            name = (self.folder / LATEST).read_text().strip()
        except FileNotFoundError:
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
        self._recover()
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

    def _recover(self) -> None:
        if self.folder.is_dir():
            for path in self.folder.glob(".step-*.former"):
                recover(self.folder / path.name[1:].split(".")[0])

    def to_remove(self, entries: list[Entry]) -> list[Entry]:
        """Return which of ``entries`` (the newest first) need not stay: never the newest, never what is damaged."""
        if self.keep_last is None:
            return []
        whole = [entry for entry in entries if entry.manifest is not None]
        kept = {entry.path for entry in (*whole[: self.keep_last], *self._best(whole))}
        return [entry for entry in whole if entry.path not in kept]

    def _best(self, entries: list[Entry]) -> list[Entry]:
        best = self.keep_best
        if best is None:
            return []
        sign = 1 if best.mode == "min" else -1
        rated = [
            (sign * entry.manifest.metrics[best.metric], -entry.step, entry)
            for entry in entries
            if entry.manifest is not None and best.metric in entry.manifest.metrics
        ]
        return [entry for *_, entry in sorted(rated, key=lambda row: row[:2])[: best.count]]

    def retain(self) -> list[Path]:
        """Delete what need not stay, and return it. Called last, when ``latest`` names what was committed."""
        gone = [entry.path for entry in self.to_remove(self.entries())]
        for path in gone:
            hidden = path.with_name(f".{path.name}.removed")
            remove(hidden)
            os.rename(path, hidden)  # in one step: a half-deleted checkpoint never looks like one
            remove(hidden)
        return gone
