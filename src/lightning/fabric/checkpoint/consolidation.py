"""Merge a sharded checkpoint, a folder with a file per rank, into one file that any strategy and plain torch load.

    fabric consolidate FOLDER [--output_file PATH] [--trusted]
    python -m lightning.fabric.utilities.consolidate_checkpoint FOLDER [--output_file PATH] [--trusted]

Torch is not imported before there is something to merge, so that ``--help`` and mistakes answer at once.
"""

import argparse
import os
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning.fabric.checkpoint.commands import add_trusted, as_text, local_path


def consolidate_checkpoint(
    folder: str | os.PathLike[str],
    output_file: str | os.PathLike[str] | None = None,
    weights_only: bool | None = None,
) -> Path:
    """Write all of the sharded checkpoint in ``folder`` into one file, and return its path.

    The file is what a strategy that does not shard would have saved: under its keys, the state dicts of modules with
    full tensors, those of optimizers with parameters by number, and the plain values. ``torch.load`` reads it. The
    folder is verified first, if it has a manifest, and the file gets one. One process does this, on the CPU, in whose
    memory the whole checkpoint must fit; no process group is needed.

    Args:
        folder: what ``fabric.save`` wrote.
        output_file: ``<folder>.consolidated`` by default.
        weights_only: ``False`` runs code that the files may hold, as objects that are no plain values need it.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it holds no sharded checkpoint; if one of both is not on this machine.
        FileExistsError: if there is something at ``output_file``.
        RuntimeError: if the checkpoint is damaged.
        pickle.UnpicklingError: if it holds what ``weights_only`` refuses.

    """
    local = local_path(os.fspath(folder))
    output = _check(local, output_file)

    from lightning.fabric.checkpoint.conversion import convert

    convert(local, output, "torch", weights_only=weights_only)
    return output


def _check(folder: Path, output_file: str | os.PathLike[str] | None) -> Path:
    """Return where to write to."""
    if not folder.exists():
        raise FileNotFoundError(f"The folder {str(folder)!r} does not exist.")
    if not (folder / ".metadata").is_file():
        hint = "It is a file, and may be consolidated already." if folder.is_file() else "It has no `.metadata`."
        raise ValueError(f"{str(folder)!r} is no sharded checkpoint. {hint} Pass the folder that `fabric.save` wrote.")
    folder = folder.absolute()
    output = folder.with_name(f"{folder.name}.consolidated") if output_file is None else _output(os.fspath(output_file))
    if os.path.lexists(output):
        raise FileExistsError(f"{str(output)!r} exists. Delete it, or choose another path with --output_file.")
    return output


def _output(text: str) -> Path:
    try:
        return local_path(text)
    except ValueError:
        raise ValueError(
            f"{text!r} is not on this machine. `fabric checkpoint convert FOLDER {text}` writes such a file there."
        ) from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (without the program's name; default: this process's) and return its exit code."""
    parser = argparse.ArgumentParser(
        "fabric consolidate",
        description="Merge a sharded checkpoint into one file, which any strategy and torch.load read.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="the checkpoint, as fabric.save wrote it")
    parser.add_argument(
        "--output-file", "--output_file", metavar="PATH", help="the file to write; default FOLDER.consolidated"
    )
    add_trusted(parser)
    options = parser.parse_args(arguments)
    try:
        output = consolidate_checkpoint(options.folder, options.output_file, False if options.trusted else None)
    except (OSError, ValueError, RuntimeError, ModuleNotFoundError, pickle.UnpicklingError) as error:
        print(f"fabric consolidate: {as_text(error)}", file=sys.stderr)
        return 1
    print(output)
    return 0
