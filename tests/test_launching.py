"""Every way of starting a Fabric program, with fresh interpreters: who makes the processes, and who joins them."""

import os
import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.slow

SUM_OF_RANKS = """
    import torch
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    total = fabric.all_reduce(torch.tensor(fabric.global_rank + 1.0), reduce_op="sum").item()
    print(f"rank {fabric.global_rank} of {fabric.world_size} sees {total}\\n", end="", flush=True)
"""
BOTH_RANKS = ["rank 0 of 2 sees 3.0", "rank 1 of 2 sees 3.0"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]


@pytest.fixture
def run(tmp_path):
    """Write a script, run ``python <words> script`` and return the finished process."""

    def run(code, *words, stdin=None, name="script.py", **env):
        (tmp_path / name).write_text(textwrap.dedent(code))
        target = [] if stdin is not None else [str(tmp_path / name)]
        return subprocess.run(
            [sys.executable, *words, *target],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.path.abspath("src"), "PYTHONUNBUFFERED": "", **env},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    return run


def lines_with(text, process):
    assert process.returncode == 0, process.stderr
    return sorted(line for line in process.stdout.splitlines() if text in line)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["-m", "lightning.fabric.cli", "run", "--devices", "2"],
        ["-m", "lightning_fabric.cli", "run", "--devices=2"],
        TORCHRUN,
    ],
    ids=["python", "fabric-run", "alias", "torchrun"],
)
def test_the_same_script_runs_under_every_launcher(run, words):
    assert lines_with("sees", run(SUM_OF_RANKS, *words)) == BOTH_RANKS


def test_a_script_that_names_no_devices_takes_those_of_the_command_line(run):
    code = SUM_OF_RANKS.replace('devices=2, strategy="ddp"', "")
    words = ["-m", "lightning.fabric.cli", "run", "--devices", "2", "--strategy", "ddp"]
    assert lines_with("sees", run(code, *words)) == BOTH_RANKS
    assert lines_with("sees", run(code, *TORCHRUN)) == BOTH_RANKS


def test_under_fabric_run_a_script_may_leave_launch_out(run):
    code = SUM_OF_RANKS.replace("fabric.launch()", "")
    assert lines_with("sees", run(code, "-m", "lightning.fabric.cli", "run", "--devices", "2")) == BOTH_RANKS


def test_a_contradiction_of_script_and_command_line_is_named(run):
    process = run(SUM_OF_RANKS, "-m", "lightning.fabric.cli", "run", "--devices", "3")
    assert process.returncode != 0
    assert "devices is set twice: devices=2 says 2, LT_DEVICES says 3" in process.stderr


def test_a_module_is_run_again_as_a_module(run, tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "package" / "train.py").write_text(textwrap.dedent(SUM_OF_RANKS) + "print(__package__, 'sees')\n")
    process = run("", "-m", "package.train", stdin="")
    assert lines_with("sees", process) == ["package sees", "package sees", *BOTH_RANKS]


@pytest.mark.parametrize("method", ["ddp_spawn", "ddp_fork", "ddp_forkserver"])
def test_functions_run_in_new_processes_and_rank_zero_answers(run, method):
    code = f"""
        import torch
        from lightning.fabric import Fabric

        def train(fabric, scale):
            return fabric.all_reduce(torch.tensor(fabric.global_rank + 1.0), reduce_op="sum") * scale

        if __name__ == "__main__":
            fabric = Fabric(accelerator="cpu", devices=2, strategy="{method}")
            print("answer", fabric.launch(train, 2).item(), fabric.launch(train, scale=3).item())
    """
    assert lines_with("answer", run(code)) == ["answer 6.0 9.0"]


def test_in_an_interactive_session_a_fork_works_after_computing(run):
    session = textwrap.dedent("""
        import torch
        from lightning.fabric import Fabric
        torch.set_num_threads(2)
        _ = torch.randn(600, 600) @ torch.randn(600, 600)
        def train(fabric): return fabric.all_reduce(torch.randn(600, 600) @ torch.ones(600, 600)).shape

        print("auto", Fabric(accelerator="cpu", devices=2).launch(train), flush=True)
        print("again", Fabric(accelerator="cpu", devices=2, strategy="ddp_notebook").launch(train), flush=True)
    """)
    process = run("", "-i", "-q", stdin=session)
    assert "auto torch.Size([600, 600])" in process.stdout, process.stderr
    assert "again torch.Size([600, 600])" in process.stdout, process.stderr


def test_torchrun_restarts_after_a_rank_was_killed(run, tmp_path):
    code = f"""
        import os, pathlib, signal
        {textwrap.indent(textwrap.dedent(SUM_OF_RANKS), " " * 8).strip()}
        attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
        fabric.barrier()
        if attempt == "0" and fabric.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        fabric.barrier()
        print(f"done in attempt {{attempt}}\\n", end="", flush=True)
    """
    process = run(code, *TORCHRUN, "--max-restarts", "2", "--monitor-interval", "0.1")
    assert lines_with("done", process) == ["done in attempt 1"] * 2


def test_wrong_world_of_torchrun_is_refused(run):
    process = run(SUM_OF_RANKS.replace("devices=2", "devices=3"), *TORCHRUN)
    assert process.returncode != 0
    assert "torchrun has started WORLD_SIZE=2" in process.stderr


@pytest.mark.parametrize("local_rank", ["2", "x", "-1"])
def test_a_wrong_local_rank_is_named(run, local_rank):
    process = run(SUM_OF_RANKS, LOCAL_RANK=local_rank)
    assert process.returncode != 0
    assert "LOCAL_RANK" in process.stderr
    assert local_rank in process.stderr


def test_a_port_that_is_taken_is_named(run):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        process = run(SUM_OF_RANKS, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert process.returncode != 0
    assert f"127.0.0.1:{port}" in process.stderr
    assert "MASTER_PORT" in process.stderr
