"""``fabric checkpoint``: look at checkpoints, verify them, compare them, convert them.

``fabric checkpoint list FOLDER [--json]``, ``verify PATH...``, ``diff A B``, ``convert SOURCE TARGET --to FORMAT``.

Torch is not imported for ``list`` and ``verify``, nor before it is clear that there is work for it.
"""

import argparse
import json
import os
import pickle
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from lightning.fabric.checkpoint.directory import CheckpointDirectory
from lightning.fabric.checkpoint.manifest import MANIFEST, DamagedCheckpointError, Manifest, read_manifest, verify
from lightning.fabric.checkpoint.sizes import size_as_text, size_in_bytes

_FORMATS = ("torch", "safetensors", "sharded")
_BY_STEP = re.compile(r"step-(\d{8,})")
_BAD, _TROUBLE, _NOT_VERIFIABLE = 1, 2, 3
_ERRORS = (OSError, ValueError, TypeError, KeyError, RuntimeError, ModuleNotFoundError, pickle.UnpicklingError)


def main(arguments: Sequence[str]) -> int:
    """Run the command line after ``fabric checkpoint`` and return its exit code."""
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except _ERRORS as error:
        _complain(options.command, error)
        return _TROUBLE if options.command == "diff" else 1


def _complain(command: str, error: BaseException) -> None:
    print(f"fabric checkpoint {command}: {as_text(error)}", file=sys.stderr)


def as_text(error: BaseException) -> str:
    """Return what is to be told of it on the command line."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return f"{text} On the command line that is --trusted." if isinstance(error, pickle.UnpicklingError) else text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("fabric checkpoint", description="Look at checkpoints, verify and convert them.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")
    _add_list(commands)
    _add_verify(commands)
    _add_convert(commands)
    _add_diff(commands)
    return parser


_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def _add_list(commands: _Commands) -> None:
    parser = commands.add_parser(
        "list",
        help="the checkpoints in a folder, by their manifests",
        description="List the checkpoints in FOLDER, by their manifests. Sizes of files are compared; `verify` reads "
        "them.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="a folder of checkpoints, or one checkpoint")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_list)


def _add_verify(commands: _Commands) -> None:
    parser = commands.add_parser(
        "verify",
        help="compare every file with what was saved",
        description="Compare every file of checkpoints with their manifests.",
        epilog="The exit code is 0 if all is as it was saved, 1 if something is damaged or missing, 3 if something "
        "has no manifest to compare it with.",
    )
    parser.add_argument("paths", metavar="PATH", nargs="+", help="a checkpoint, or a folder of checkpoints")
    parser.set_defaults(run=_verify)


def _add_convert(commands: _Commands) -> None:
    parser = commands.add_parser(
        "convert",
        help="write a checkpoint in another form",
        description="Write the checkpoint SOURCE to TARGET in another form, after verifying it. SOURCE may be what any "
        "strategy has saved, a file of torch.save, a folder of torch.distributed.checkpoint, or safetensors.",
    )
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("target", metavar="TARGET", help="a file, or a folder for sharded forms")
    parser.add_argument(
        "--to",
        choices=_FORMATS,
        default="torch",
        help="torch: one file with everything, the default; safetensors: the weights alone, in a file if TARGET ends "
        "with .safetensors, else in a folder with an index; sharded: a folder as FSDP saves it",
    )
    parser.add_argument("--key", help="the entry with the weights; default model, or the only one there is")
    parser.add_argument(
        "--max-shard-size",
        "--max_shard_size",
        type=_size,
        metavar="SIZE",
        help="of a safetensors file in a folder; default 5GB",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint at TARGET")
    add_trusted(parser)
    parser.set_defaults(run=_convert)


def _add_diff(commands: _Commands) -> None:
    parser = commands.add_parser(
        "diff",
        help="in what two checkpoints differ",
        description="Compare two checkpoints, of any forms, value by value, after verifying them. Of a folder of "
        "checkpoints, it is the newest good one.",
        epilog="The exit code is 0 if they are equal, 1 if they differ, 2 if they cannot be compared.",
    )
    parser.add_argument("first", metavar="A")
    parser.add_argument("second", metavar="B")
    parser.add_argument("--key", help="compare this entry alone; what is a bare state dict is that entry")
    add_trusted(parser)
    parser.set_defaults(run=_diff)


def add_trusted(parser: argparse.ArgumentParser) -> None:
    """Let a command line say that files may run code."""
    parser.add_argument("--trusted", action="store_true", help="run code that the files may hold (weights_only=False)")


def _size(text: str) -> int:
    try:
        return size_in_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def local_path(text: str) -> Path:
    """Return the path that a text or ``file://`` URL names."""
    scheme, separator, rest = text.partition("://")
    if not separator:
        return Path(text)
    if scheme != "file":
        raise ValueError(
            f"{text!r} is not on this machine. `fabric checkpoint convert {text} PATH` verifies it, and makes a copy "
            "here."
        )
    return Path(rest)


def _existing(text: str) -> Path:
    path = local_path(text)
    if not os.path.lexists(path):
        raise FileNotFoundError(f"There is nothing at {text!r}.")
    return path


# -- what lies in a folder


@dataclass(frozen=True)
class _Found:
    """A checkpoint, or what should be one; ``damages``: what is wrong with it."""

    path: Path
    manifest: Manifest | None = None
    damages: tuple[DamagedCheckpointError, ...] = ()


def _checkpoints(path: Path) -> list[_Found]:
    """Return the checkpoint at ``path`` or, if that is a folder of them, those in there, each with its manifest."""
    own = _found(path)
    if own.manifest is not None or own.damages or not path.is_dir():
        return [own]
    inside = [_found(child) for child in sorted(path.iterdir()) if _may_be_one(child)]
    return [each for each in inside if each.manifest is not None or each.damages]


def _may_be_one(path: Path) -> bool:
    return not path.name.startswith(".") and (path.is_file() or path.is_dir())


def _found(path: Path) -> _Found:
    try:
        manifest = read_manifest(path)
    except DamagedCheckpointError as error:
        return _Found(path, damages=(error,))
    if manifest is None and _BY_STEP.fullmatch(path.name):
        missing = (MANIFEST, "is missing") if path.is_dir() else ("", "has no manifest")
        return _Found(path, damages=(DamagedCheckpointError(path, *missing),))
    return _Found(path, manifest)


def _compared(found: _Found, checksums: bool) -> _Found:
    """Return it with all the files that are not as they were."""
    manifest = found.manifest
    if manifest is None:
        return found
    damages = list(found.damages)
    for name, record in manifest.files.items():
        try:
            verify(found.path, replace(manifest, files={name: record}), checksums)
        except DamagedCheckpointError as error:
            damages.append(error)
    return replace(found, damages=tuple(damages))


# -- list


def _list(options: argparse.Namespace) -> int:
    folder = _existing(options.folder)
    found = [_compared(each, checksums=False) for each in _checkpoints(folder)]
    found = [each for each in found if each.manifest is not None or each.damages]
    latest = CheckpointDirectory(folder).latest() if folder.is_dir() else None
    if options.json:
        print(json.dumps([_record(each, latest) for each in found], indent=2))
    elif not found:
        print(f"There are no checkpoints with a manifest in {str(folder)!r}.")
    else:
        for line in _table([_TITLES, *(_row(each, latest) for each in found)]):
            print(line)
    return 0


def _record(found: _Found, latest: Path | None) -> dict[str, object]:
    manifest = found.manifest or Manifest({})
    return {
        "path": str(found.path),
        "step": _step(found),
        "size": manifest.size if found.manifest else None,
        "time": manifest.time or None,
        "strategy": manifest.strategy or None,
        "world_size": manifest.world_size if found.manifest else None,
        "metrics": dict(manifest.metrics),
        "versions": dict(manifest.versions),
        "latest": found.path == latest,
        "damages": [str(error) for error in found.damages],
    }


_TITLES = ("NAME", "STEP", "SIZE", "TIME (UTC)", "STRATEGY", "RANKS", "METRICS", "")


def _row(found: _Found, latest: Path | None) -> tuple[str, ...]:
    state = [*(["latest"] if found.path == latest else []), *(f"DAMAGED: {_what(each)}" for each in found.damages[:1])]
    step = _step(found)
    manifest = found.manifest
    if manifest is None:
        return (found.path.name, "" if step is None else str(step), "", "", "", "", "", ", ".join(state))
    return (
        found.path.name,
        "" if step is None else str(step),
        size_as_text(manifest.size),
        manifest.time[:19].replace("T", " "),
        manifest.strategy,
        str(manifest.world_size),
        " ".join(f"{name}={value:.4g}" for name, value in manifest.metrics.items()),
        ", ".join(state),
    )


def _step(found: _Found) -> int | None:
    if found.manifest is not None and found.manifest.step is not None:
        return found.manifest.step
    match = _BY_STEP.fullmatch(found.path.name)
    return int(match[1]) if match else None


def _what(error: DamagedCheckpointError) -> str:
    return f"{error.file!r} {error.what}" if error.file else error.what


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()


# -- verify


def _verify(options: argparse.Namespace) -> int:
    codes = [_verify_path(path) for path in options.paths]
    return next((code for code in (_BAD, _NOT_VERIFIABLE) if code in codes), 0)


def _verify_path(text: str) -> int:
    try:
        path = _existing(text)
        found = _checkpoints(path)
    except (OSError, ValueError) as error:
        _complain("verify", error)
        return _BAD
    if not any(each.manifest is not None or each.damages for each in found):
        print(f"{path}: not verifiable: there is no manifest. `fabric checkpoint convert` makes a copy with one.")
        return _NOT_VERIFIABLE
    return max([_report(_compared(each, checksums=True)) for each in found])


def _report(found: _Found) -> int:
    for error in found.damages:
        _complain("verify", error)
    if found.damages:
        print(f"{found.path}: DAMAGED")
        return _BAD
    assert found.manifest is not None
    files = len(found.manifest.files)
    unread = sum(record.checksum is None for record in found.manifest.files.values())
    note = f" (sizes alone: {unread} saved without digests)" if unread else ""
    print(f"{found.path}: good, {files} file{'s' * (files != 1)}, {size_as_text(found.manifest.size)}{note}")
    return 0


# -- what needs torch


def _convert(options: argparse.Namespace) -> int:
    if "://" not in options.source:
        _existing(options.source)
    if options.max_shard_size is not None and (options.to != "safetensors" or options.target.endswith(".safetensors")):
        raise ValueError("--max-shard-size is for `--to safetensors` with a folder as TARGET. Leave it out.")

    from lightning.fabric.checkpoint.conversion import convert

    done = convert(
        options.source,
        options.target,
        options.to,
        key=options.key,
        max_shard_size=options.max_shard_size,
        weights_only=False if options.trusted else None,
        overwrite=options.overwrite,
    )
    print(done.path)
    if not done.was_verified:
        print("SOURCE has no manifest, so it could not be verified.", file=sys.stderr)
    if done.left_out:
        print(f"Safetensors hold weights alone. Left out: {', '.join(done.left_out)}.", file=sys.stderr)
    if not done.has_manifest:
        print(
            "A single safetensors file has no room for a manifest, so it cannot be verified. A folder has one: choose "
            "a TARGET that does not end with .safetensors.",
            file=sys.stderr,
        )
    return 0


def _diff(options: argparse.Namespace) -> int:
    first, second = _existing(options.first), _existing(options.second)

    from lightning.fabric.checkpoint.comparison import differences

    differ = False
    for line in differences(first, second, options.key, False if options.trusted else None):
        differ = True
        print(line)
    if not differ:
        print("equal")
    return int(differ)
