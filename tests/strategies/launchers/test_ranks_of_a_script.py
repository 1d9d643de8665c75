"""`fabric run`'s ranks: the script sees what plain Python would show it, signals reach it, its exit code comes back."""

import json
import signal

import pytest
from tests.strategies.launchers.conftest import FABRIC_RUN

pytestmark = pytest.mark.slow

WITHOUT_TORCH = {"PL_DISABLE_FORK": "1"}  # what is not forked does not wait for torch to be imported

FACTS = """
    import json, os, sys

    facts = {
        "argv": sys.argv,
        "file": __file__,
        "main": sys.modules["__main__"].__dict__ is globals() and __name__,
        "path": sys.path[0],
        "loader": type(__loader__).__name__,
        "stdin": sys.stdin.read(),
        "neighbour": __import__("neighbour").__file__,
        "env": {k: v for k, v in os.environ.items() if "RANK" in k or "WORLD" in k or k.startswith(("LT_", "MASTER_"))},
    }
    print(json.dumps(facts) + "\\n", end="", flush=True)
"""


@pytest.mark.parametrize("no_fork", ["0", "1"])
def test_every_rank_runs_the_script_as_main(programs, no_fork):
    programs.write("", "scripts/neighbour.py")
    script = programs.write(FACTS, "scripts/train.py")
    options = ("--devices=2", "--num-nodes=2", "--node-rank=1", "--main-address=127.0.0.9", "--main-port=1234")
    result = programs.run(*FABRIC_RUN, *options, script, "--lr", "1", stdin="typed", PL_DISABLE_FORK=no_fork)
    assert result.returncode == 0, result.stderr
    ranks = sorted(map(json.loads, result.stdout.splitlines()), key=lambda facts: facts["env"]["RANK"])
    for local_rank, facts in enumerate(ranks):
        assert facts.pop("env") == {
            "LT_CLI_USED": "1",
            "LT_DEVICES": "2",
            "LT_NUM_NODES": "2",
            "RANK": str(2 + local_rank),
            "LOCAL_RANK": str(local_rank),
            "GROUP_RANK": "1",
            "NODE_RANK": "1",
            "WORLD_SIZE": "4",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.9",
            "MASTER_PORT": "1234",
        }
        assert facts.pop("stdin") == ("typed" if local_rank == 0 else "")
        assert facts == {
            "argv": [script, "--lr", "1"],
            "file": str(programs.folder / script),
            "main": "__main__",
            "path": str(programs.folder / "scripts"),
            "loader": "SourceFileLoader",
            "neighbour": str(programs.folder / "scripts/neighbour.py"),
        }


def test_a_rank_can_spawn_processes_of_its_own(programs):
    script = """
    import multiprocessing

    def square(x):
        return x * x

    if __name__ == "__main__":
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print(pool.map(square, range(4)))
    """
    result = programs.run(*FABRIC_RUN, programs.write(script))
    assert result.stdout == "[0, 1, 4, 9]\n", result.stderr


def test_a_syntax_error_looks_as_it_does_without_us(programs):
    script = programs.write("x = = 1\n")
    result = programs.run(*FABRIC_RUN, script, **WITHOUT_TORCH)
    plain = programs.run(script).stderr
    assert plain in result.stderr
    assert result.returncode == 1


def test_a_signal_is_passed_on_and_the_exit_code_comes_back(programs):
    script = """
    import signal, sys, time

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
    print("ready\\n", end="", flush=True)
    time.sleep(1000)
    """
    program = programs.start(*FABRIC_RUN, programs.write(script), **WITHOUT_TORCH)
    assert program.stdout.readline() == "ready\n"
    program.send_signal(signal.SIGTERM)
    _, err = program.communicate(timeout=60)
    assert program.returncode == 5
    assert err.endswith("First cause: rank 0 ended without an exception (exit code 5)\n")
