"""A file system in memory for fsspec, where what is due goes wrong: ``faulty://``, and ``faulty-store://``.

The first shows a file while it is written, as a disk does; the second an object when it is whole, as object stores do.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

FAILURES = ("fails", "fails late", "stops halfway")  # late: it has happened all the same
SILENT = ("stops halfway in silence",)
DEATHS = ("dies", "dies late", "dies halfway")
LIES = ("returns a flipped byte", "returns half")


class Killed(BaseException):
    """The process has ended: nothing handles this, and nothing that is tried afterwards happens."""


class Faults:
    """What is to go wrong: ``due`` at operations by their numbers from 0, or at all for which ``is_due(name, path)``.

    ``looks``: so many times what was just written looks as it was before. ``after``: called after each operation.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.clear()

    def clear(self) -> None:
        """Let nothing go wrong, and begin to count anew."""
        self.operations: list[tuple[str, str]] = []
        self.due: dict[int, str] = {}
        self.is_due: Callable[[str, str], str | None] = lambda name, path: None
        self.looks = 0
        self.stale: dict[str, list[Any]] = {}
        self.is_dead = False
        self.after: Callable[[str, str], None] | None = None

    def next(self, name: str, path: str) -> str | None:
        if self.is_dead:
            raise Killed
        self.operations.append((name, path))
        act = self.due.get(len(self.operations) - 1) or self.is_due(name, path)
        self.is_dead = act in DEATHS
        return act


class FaultyFileSystem(MemoryFileSystem):
    """Counts what is done to it; see :class:`Faults`."""

    protocol = "faulty"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    faults = Faults()
    shows_halves = True

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return MemoryFileSystem._strip_protocol(str(path).removeprefix(f"{cls.protocol}://"))

    @classmethod
    def clear(cls) -> None:
        """Make it empty, and whole."""
        cls.store.clear()
        cls.pseudo_dirs[:] = [""]
        cls.faults.clear()

    @classmethod
    def content(cls) -> dict[str, bytes]:
        """Return all files by their paths; this is no operation."""
        return {path: file.getvalue() for path, file in sorted(cls.store.items())}

    @classmethod
    def flip(cls, path: str, position: int = 0) -> None:
        """Change a byte of the file for good; this is no operation."""
        data = bytearray(cls.store[path].getvalue())
        data[position] ^= 0xFF
        cls.store[path].seek(0)
        cls.store[path].write(data)

    # -- what changes it

    def put_file(self, lpath: Any, rpath: str, **options: Any) -> None:
        data = Path(lpath).read_bytes()
        path = self._strip_protocol(rpath)
        with self._changing("put", path) as act:
            self.makedirs(self._parent(path), exist_ok=True)
            if not (act and "halfway" in act):
                super().pipe_file(path, data)
            elif self.shows_halves:
                super().pipe_file(path, data[: len(data) // 2])

    def cp_file(self, path1: str, path2: str, **options: Any) -> None:
        with self._changing("copy", self._strip_protocol(path2)):
            super().cp_file(path1, path2)

    def rm_file(self, path: str) -> None:
        with self._changing("delete", self._strip_protocol(path)):
            super()._rm(path)

    def rmdir(self, path: str) -> None:
        with self._changing("rmdir", self._strip_protocol(path)):
            super().rmdir(path)

    @contextmanager
    def _changing(self, name: str, path: str) -> Iterator[str | None]:
        faults = self.faults
        with faults.lock:
            act = faults.next(name, path)
            if act in ("fails", "dies") or (name != "put" and act and "halfway" in act):
                self._raise(act)
            before = self.store.get(path)
            before = None if before is None else before.getvalue()
            yield act
            if faults.looks:
                looks, shown = faults.stale.get(path, (0, None))
                faults.stale[path] = [faults.looks, shown if looks > 0 else before]
            if faults.after is not None:
                faults.after(name, path)
            if act and "silence" not in act:
                self._raise(act)

    def _raise(self, act: str) -> None:
        if act in DEATHS:
            raise Killed
        raise ConnectionError("the network is down")

    # -- what reads it

    def info(self, path: str, **options: Any) -> Any:
        path = self._strip_protocol(path)
        with self._looking("info", path) as before:
            if before is None:
                return super().info(path)
            if before[1] is None:
                raise FileNotFoundError(path)
            return {"name": path, "size": len(before[1]), "type": "file"}

    def cat_file(self, path: str, start: Any = None, end: Any = None, **options: Any) -> bytes:
        return self._read("cat", self._strip_protocol(path))[start:end]

    def get_file(self, rpath: str, lpath: Any, **options: Any) -> None:
        Path(lpath).write_bytes(self._read("get", self._strip_protocol(rpath)))

    def _read(self, name: str, path: str) -> bytes:
        with self._looking(name, path) as before:
            if (before is not None and before[1] is None) or path not in self.store:
                raise FileNotFoundError(path)
            data = self.store[path].getvalue() if before is None else before[1]
            if self._lie == "returns a flipped byte" and data:
                return data[:-1] + bytes([data[-1] ^ 1])
            return data[: len(data) // 2] if self._lie == "returns half" else data

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        return self._listed("ls", path, detail, super().ls)

    def find(self, path: str, *args: Any, detail: bool = False, **options: Any) -> Any:
        look = super().find
        found = self._listed("find", path, True, lambda path, detail: list(look(path, detail=True).values()))
        if options.get("withdirs"):
            found += [{"name": p, "size": 0, "type": "directory"} for p in self.pseudo_dirs if p.startswith(f"{path}/")]
        return {each["name"]: each for each in found} if detail else [each["name"] for each in found]

    def _listed(self, name: str, path: str, detail: bool, look: Callable[..., Any]) -> Any:
        path = self._strip_protocol(path)
        with self._looking(name, path):
            found = [each for each in look(path, detail=True) if not self._is_hidden(each["name"])]
            return found if detail else [each["name"] for each in found]

    def _is_hidden(self, path: str) -> bool:
        looks, before = self.faults.stale.get(path, (0, None))
        return looks > 0 and before is None

    @contextmanager
    def _looking(self, name: str, path: str) -> Iterator[list[Any] | None]:
        faults = self.faults
        with faults.lock:
            self._lie = act = faults.next(name, path)
            if act is not None and act not in (*LIES, *SILENT):
                self._raise(act)
            for each in faults.stale.values():
                each[0] -= 1
            before = faults.stale.get(path)
            yield before if before is not None and before[0] >= 0 else None
        if faults.after is not None:
            faults.after(name, path)


class FaultyObjectStore(FaultyFileSystem):
    protocol = "faulty-store"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    faults = Faults()
    shows_halves = False

    def mkdir(self, path: str, create_parents: bool = True, **options: Any) -> None:
        """There are no folders."""


for each in (FaultyFileSystem, FaultyObjectStore):
    fsspec.register_implementation(each.protocol, each, clobber=True)
