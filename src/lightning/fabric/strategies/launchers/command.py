"""The command that started this program, so that it can be run again for another rank."""

import multiprocessing.process
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

_TAKE_A_VALUE = ("W", "X")


def command_of_this_program() -> list[str]:
    """The command line that runs this program again with the same arguments, from `directory_of_this_program`.

    Raises:
        RuntimeError: This is an interactive session, or the program was read from standard input.
    """
    python = [sys.executable, *interpreter_flags(sys.orig_argv)]
    if sys.argv[:1] == ["-c"]:
        return [sys.executable, *sys.orig_argv[1:]]
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name != "__main__":  # `-m package` runs the module package.__main__
        module = spec.name.removesuffix(".__main__")
        return [*python, "-m", module, *_arguments(lambda before, word: before == "-m" and word == module)]
    if spec is not None:  # a folder or a zip file
        program = os.path.join(directory_of_this_program(), sys.argv[0])
        return [*python, program, *_arguments(lambda _, word: _is_file(word, program))]
    if not os.path.isfile(getattr(main, "__file__", None) or ""):
        raise RuntimeError(
            "Launching several processes runs the script again for each of them, but this Python session has no "
            "script. Put the code into a file, or use strategy='ddp_notebook' with `fabric.launch(function)`."
        )
    file = str(main.__file__)
    script = sys.argv[0] if _is_file(sys.argv[0], file) else os.path.abspath(file)
    return [*python, script, *_arguments(lambda _, word: _is_file(word, file))]


def _is_file(word: str, file: str) -> bool:
    given = os.path.join(directory_of_this_program(), word)
    return os.path.exists(given) and os.path.samefile(given, file)


def directory_of_this_program() -> str:
    """The working directory that this program was started in."""
    return multiprocessing.process.ORIGINAL_DIR or os.getcwd()  # type: ignore[attr-defined]


def interpreter_flags(orig_argv: Sequence[str]) -> list[str]:
    """The interpreter's own options at the start of a command line, without ``-c`` and ``-m``."""
    flags: list[str] = []
    words = iter(orig_argv[1:])
    for word in words:
        if word in ("-", "--") or not word.startswith("-"):
            break
        if word.startswith("--"):
            flags += [word, next(words, "")] if word == "--check-hash-based-pycs" else [word]
            continue
        last = next((i for i, letter in enumerate(word) if letter in ("c", "m", *_TAKE_A_VALUE)), None)
        if last is None:
            flags.append(word)
        elif word[last] in _TAKE_A_VALUE:
            flags += [word] if word[last + 1 :] else [word, next(words, "")]
        else:  # the program's name follows: `-um package`
            flags += [word[:last]] if last > 1 else []
            break
    return flags


def _arguments(names_program: Callable[[str, str], bool]) -> list[str]:
    """What followed the program's name on the command line, whatever the program has since done to ``sys.argv``.

    ``names_program(word_before, word)`` finds the name; what it does not find was started by other means.
    """
    words = sys.orig_argv
    named = next((i for i in range(1, len(words)) if names_program(words[i - 1], words[i])), None)
    arguments = sys.argv[1:] if named is None else words[named + 1 :]
    hydra = sys.modules.get("hydra.core.hydra_config")
    if hydra is not None and hydra.HydraConfig.initialized():
        return _hydra_arguments(arguments, hydra.HydraConfig.get())
    return arguments


def _hydra_arguments(arguments: Sequence[str], config: Any) -> list[str]:
    """Arguments for one job that writes into the folder of the present one, and no second record of its settings."""
    if config.mode is not None and config.mode.name == "MULTIRUN":
        flags = [word for word in arguments if word not in ("-m", "--multirun") and not _is_override(word)]
        hydras = [word for word in config.overrides.hydra if not word.startswith("hydra.mode=")]
        arguments = [*flags, *config.overrides.task, *hydras, "hydra.mode=RUN"]
    folder = str(config.runtime.output_dir).replace("\\", "\\\\").replace('"', '\\"')
    return [*arguments, f'hydra.run.dir="{folder}"', "hydra.output_subdir=null"]


def _is_override(word: str) -> bool:
    return word.startswith(("+", "~")) or ("=" in word and not word.startswith("-"))
