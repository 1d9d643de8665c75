"""The command line.

``fabric run [OPTIONS] SCRIPT [ARGUMENTS]`` starts a script as one process per device.
``fabric consolidate FOLDER [--output_file PATH]`` merges a sharded checkpoint into one file.
``fabric checkpoint {list,verify,convert,diff}`` is for checkpoints of any form.

Torch is not imported before it is clear that there is work for it, so that ``--help`` and wrong options answer at once.
"""

import argparse
import errno
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence

from lightning.fabric.checkpoint import commands as checkpoint_commands
from lightning.fabric.checkpoint import consolidation
from lightning.fabric.plugins.environments.lightning import keep_network_port
from lightning.fabric.plugins.precision._table import canonical
from lightning.fabric.strategies._table import STRATEGIES

_ACCELERATORS = ("cpu", "gpu", "cuda", "mps", "tpu")
_MAIN_PORT = 29400
_EVERY_SCRIPT_NEEDS = ("lightning.fabric.fabric",)  # names: only the process that starts the ranks imports them


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (without the program's name; default: this process's) and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["run"]:
        return _run(words[2:] if _is_old_spelling(words) else words[1:])
    if words[:1] == ["consolidate"]:
        return consolidation.main(words[1:])
    if words[:1] == ["checkpoint"]:
        return checkpoint_commands.main(words[1:])
    parser = argparse.ArgumentParser("fabric", description="Run PyTorch scripts on any number of devices.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    commands.add_parser("run", help="run a script as one process per device")
    commands.add_parser("consolidate", help="merge a sharded checkpoint into one file")
    commands.add_parser("checkpoint", help="list, verify, convert and compare checkpoints")
    parser.parse_args(words)
    return 0


def _is_old_spelling(words: Sequence[str]) -> bool:
    return words[1:2] == ["model"] and not os.path.isfile("model")


# -- fabric run


def _run(words: Sequence[str]) -> int:
    parser = _run_parser()
    own, script, arguments = split(words, _options_of(parser))
    options = parser.parse_args(own)
    if script is None:
        parser.error("SCRIPT is missing: name the Python file to run.")
    if not os.path.isfile(script):
        parser.error(f"SCRIPT {script!r} does not exist, or is not a file.")
    os.environ.update(outside_values(options))
    num_processes = 1
    if not _is_one_process(options):
        num_processes = _or_error(parser, lambda: _count(options.devices, options.accelerator))
    port = _or_error(parser, lambda: _choose_port(options))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _num_cores() // num_processes)))

    from lightning.fabric.strategies.launchers.ranks_of_a_script import run_script

    envs = rank_environments(options, num_processes, port)
    return run_script(script, arguments, envs, preload=(*_EVERY_SCRIPT_NEEDS, *_module_of(options.strategy)))


def _is_one_process(options: argparse.Namespace) -> bool:
    entry = STRATEGIES.get(options.strategy)
    starts_the_others_itself = options.accelerator == "tpu" or (entry is not None and entry.start_method == "xla")
    return starts_the_others_itself or (entry is not None and not entry.multi_process)


def _module_of(strategy: str | None) -> list[str]:
    target = STRATEGIES[strategy].target if strategy is not None else None
    return [target.partition(":")[0]] if isinstance(target, str) else []


def _run_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "fabric run",
        usage="fabric run [OPTIONS] SCRIPT [ARGUMENTS]...",
        description="Run SCRIPT, which makes a Fabric object, as one process per device.",
        epilog="Options that are not listed here, and everything after SCRIPT, are passed to the script.",
        allow_abbrev=False,
    )
    strategies = sorted(
        name for name, entry in STRATEGIES.items() if entry.start_method not in ("spawn", "fork", "forkserver")
    )
    parser.add_argument("--accelerator", choices=_ACCELERATORS, help="the kind of hardware")
    parser.add_argument("--strategy", choices=strategies, metavar="NAME", help=", ".join(strategies))
    parser.add_argument(
        "--devices", default="1", help="how many devices of this machine, or which: 2 | 0,1 | -1 (all); default 1"
    )
    parser.add_argument("--num-nodes", "--num_nodes", type=_positive, help="number of machines; default 1")
    parser.add_argument(
        "--node-rank", "--node_rank", type=int, default=0, help="this machine's number, from 0; default 0"
    )
    parser.add_argument(
        "--main-address", "--main_address", default="127.0.0.1", help="where rank 0 runs; default this machine"
    )
    parser.add_argument(
        "--main-port",
        "--main_port",
        type=int,
        help=f"rank 0's port; default {_MAIN_PORT}, on one machine a free one",
    )
    parser.add_argument("--precision", type=_precision, help="32-true, 16-mixed, bf16-mixed, bf16-true, ...")
    parser.add_argument(
        "--explain", action="store_true", help="print at the first step of an optimizer how everything was set up"
    )
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="print that, and end there")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _precision(text: str) -> str:
    try:
        canonical(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _options_of(parser: argparse.ArgumentParser) -> dict[str, bool]:
    return {name: action.nargs != 0 for action in parser._actions for name in action.option_strings}


def split(words: Sequence[str], options: Mapping[str, bool]) -> tuple[list[str], str | None, list[str]]:
    """Split a command line into this program's options, the script, and the script's arguments.

    ``options`` tells for each option of this program whether a value follows it. An unknown option belongs to the
    script; so does the word after it if that is no file and other words follow.
    """
    own: list[str] = []
    foreign: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            continue
        name, equals, _ = word.partition("=")
        if name in options:
            takes_next = options[name] and not equals and bool(rest)
            own.append(f"{word}={rest.pop(0)}" if takes_next else word)
        elif word.startswith("-") or _is_value(word, foreign, rest):
            foreign.append(word)
        else:
            return own, word, [*foreign, *rest]
    return own, None, foreign


def _is_value(word: str, foreign: Sequence[str], rest: Sequence[str]) -> bool:
    follows_option = bool(foreign) and foreign[-1].startswith("-") and "=" not in foreign[-1]
    return follows_option and bool(rest) and not os.path.isfile(word)


def outside_values(options: argparse.Namespace) -> dict[str, str]:
    """The variables that tell a ``Fabric`` object what was given on the command line."""
    given = {
        "LT_ACCELERATOR": options.accelerator,
        "LT_STRATEGY": options.strategy,
        "LT_DEVICES": options.devices,
        "LT_NUM_NODES": options.num_nodes,
        "LT_PRECISION": options.precision,
        "LT_EXPLAIN": "dry-run" if options.dry_run else "1" if options.explain else None,
    }
    return {"LT_CLI_USED": "1", **{name: str(value) for name, value in given.items() if value is not None}}


def rank_environments(options: argparse.Namespace, num_processes: int, port: int) -> list[dict[str, str]]:
    """The variables of every rank of this machine, as torchrun sets them."""
    shared = {
        "WORLD_SIZE": (options.num_nodes or 1) * num_processes,
        "LOCAL_WORLD_SIZE": num_processes,
        "GROUP_RANK": options.node_rank,
        "NODE_RANK": options.node_rank,
        "MASTER_ADDR": options.main_address,
        "MASTER_PORT": port,
    }
    first = options.node_rank * num_processes
    return [
        {name: str(value) for name, value in {**shared, "RANK": first + local, "LOCAL_RANK": local}.items()}
        for local in range(num_processes)
    ]


# -- what this machine has


def _count(devices: str, accelerator: str | None) -> int:
    text = devices.strip()
    if text in ("auto", "-1"):
        return _accelerator_count(accelerator)
    indices = [part.strip() for part in text.split(",") if part.strip()]
    if not indices or not all(part.isdecimal() for part in indices) or text == "0":
        raise ValueError(f"--devices must be a count (2), a list (0,1), -1 or auto, but got {devices!r}.")
    return len(indices) if "," in text else int(text)


def _accelerator_count(name: str | None) -> int:
    from lightning.fabric.accelerators import ACCELERATOR_REGISTRY

    names = {None: ("tpu", "mps", "cuda"), "gpu": ("mps", "cuda")}.get(name, (name,))
    for candidate in (*names, "cpu"):
        found = ACCELERATOR_REGISTRY.get(candidate)
        if found.is_available():
            return int(found.auto_device_count())
    return 1


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _choose_port(options: argparse.Namespace) -> int:
    if options.main_port is None and options.num_nodes in (None, 1):
        return keep_network_port()
    wanted = _MAIN_PORT if options.main_port is None else options.main_port
    if not 0 < wanted < 2**16:
        raise ValueError(f"--main-port must be from 1 to 65535, but got {wanted}.")
    if options.node_rank != 0 or not _is_taken(wanted):
        return int(wanted)
    raise ValueError(
        f"Port {wanted} of this machine is taken, by another run perhaps. Choose another one with --main-port, "
        "the same on every machine."
    )


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port of a run that has just ended is free
        try:
            probe.bind(("", port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ValueError(f"Port {port} cannot be used: {error.strerror}.") from error
            return True
    return False


def _or_error(parser: argparse.ArgumentParser, decide: Callable[[], int]) -> int:
    try:
        return decide()
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
