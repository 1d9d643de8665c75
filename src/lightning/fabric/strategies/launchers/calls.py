"""A function call on its way into another process, and its result or error on the way back, all by value."""

import atexit
import contextlib
import functools
import importlib.util
import os
import pickle
import sys
from collections.abc import Callable, Mapping
from multiprocessing import util
from pathlib import Path
from typing import Any, NoReturn

from lightning.fabric.strategies.launchers import report


def write_call(
    path: Path, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], sender: str
) -> None:
    """Write a call down for `read_call`; ``TypeError`` in the name of ``sender`` if a part does not pickle.

    Tensors are copied: unlike what ``multiprocessing`` does by itself, no process shares memory with another one.
    """
    inner: Any = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    module = getattr(inner, "__module__", None) or type(inner).__module__
    _origin_of(path).write_bytes(pickle.dumps((module, getattr(sys.modules.get(module), "__file__", None))))
    try:
        save((function, args, kwargs), path)
    except (pickle.PicklingError, AttributeError, TypeError, RecursionError) as error:
        raise TypeError(
            f"{sender} cannot send {getattr(inner, '__qualname__', repr(inner))!r} and its arguments to other "
            f"processes: {error}. Define the function at the top level of a module, and pass it arguments that pickle."
        ) from error


def read_call(path: Path) -> Callable[[], Any]:
    """Return the call that `write_call` has written, ready to be made."""
    _import_from(*pickle.loads(_origin_of(path).read_bytes()))
    function, args, kwargs = load(path)
    return functools.partial(function, *args, **kwargs)


def _origin_of(path: Path) -> Path:
    return path.with_suffix(".origin")


def _import_from(name: str, file: str | None) -> None:
    """Import the module ``name`` of ``file``, also where the name alone does not lead to it."""
    if name == "__main__" or file is None:
        return
    with contextlib.suppress(ImportError):  # an error of the module itself comes up again below
        importlib.import_module(name)
    found = getattr(sys.modules.get(name), "__file__", None)
    if found is not None and os.path.samefile(found, file):
        return
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"Cannot import {file!r} as the module {name!r}.")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def save(value: Any, path: Path) -> None:
    """Write any object that pickles, tensors and what they share included."""
    import torch

    torch.save(value, path)


def load(path: Path, map_location: str | None = None) -> Any:
    """Read what `save` has written."""
    import torch

    return torch.load(path, map_location=map_location, weights_only=False)


def run_call(call: Callable[[], Any], folder: Path, rank: int, result: Path | None) -> None:
    """Make the call as rank ``rank`` of a launch; leave the result in ``result``, or the error in ``folder``.

    Does not return after an error: the process ends at once, so that the other ranks notice.
    """
    try:
        value = _value_of(call)
        wait_for_saves()
        if result is not None:
            save(value, result)
    except BaseException as error:
        report.write_error(folder, rank, error)
        _exit_now(error)
    destroy_process_group()


def _value_of(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except SystemExit as error:
        if report.exit_code_of(error) != 0:
            raise
        return None


def _exit_now(error: BaseException) -> NoReturn:
    """Leave without the interpreter's farewell, which may wait for other ranks; saves are waited for."""
    try:
        finish_saves()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(report.exit_code_of(error))


def wait_for_saves() -> None:
    """Return when no checkpoint is being written in the background; raise what went wrong with it."""
    if (background := sys.modules.get("lightning.fabric.checkpoint.background")) is not None:
        background.wait_for_all()


def finish_saves() -> None:
    """The same for a process that ends by an error: what went wrong besides is printed."""
    if (background := sys.modules.get("lightning.fabric.checkpoint.background")) is not None:
        background.finish_all()


def destroy_process_group() -> None:
    """Leave the process group, if there is one: a process that ends with a group may abort at its exit."""
    if "torch.distributed" in sys.modules:
        from lightning.fabric.utilities.distributed import _destroy_dist_connection

        _destroy_dist_connection()


def leave() -> NoReturn:
    """End this process well: what was registered for its end runs, the interpreter is not taken apart.

    A module that outlives the process group holds on to the group's threads; the interpreter may abort over them.
    """
    util._exit_function()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
