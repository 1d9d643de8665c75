"""The script run again for the other ranks: same threads and options, one page at a failure, no process left behind."""

import json
import os
import signal

import pytest
import torch

pytestmark = pytest.mark.slow

LAUNCH = """
    import json, os, signal, sys, time

    import torch
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    rank = fabric.global_rank
"""


def last_line(text):
    return text.rstrip().splitlines()[-1]


@pytest.mark.parametrize("launcher", ["python", "fabric run"])
def test_a_killed_rank_ends_the_job_and_is_named(launched_by, launcher):
    script = f"""{LAUNCH}
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    fabric.barrier()
    """
    result = launched_by(launcher, script)
    assert result.returncode == {"python": 1, "fabric run": 137}[launcher]
    assert last_line(result.stderr) == (
        "First cause: rank 1 was killed by signal SIGKILL, perhaps out of memory (exit code 137)"
    )


@pytest.mark.parametrize("launcher", ["python", "fabric run"])
def test_the_exception_is_shown_once_and_not_its_echo(launched_by, launcher):
    script = f"""{LAUNCH}
    def step():
        if rank == 1:
            raise ValueError("broken")
        fabric.barrier()

    step()
    """
    result = launched_by(launcher, script)
    assert result.returncode == 1
    assert last_line(result.stderr) == "First cause: rank 1 raised ValueError: broken (exit code 1)"
    assert result.stderr.count("Traceback (most recent call last)") == 1
    assert "launchers" not in result.stderr, "no frames but the script's"


def test_a_first_rank_that_waits_is_ended_too(launched_by):
    script = f"""{LAUNCH}
    if rank == 1:
        sys.exit(7)
    time.sleep(1000)
    """
    result = launched_by("python", script)
    assert result.returncode == 7
    assert last_line(result.stderr) == "First cause: rank 1 ended without an exception (exit code 7)"


def test_the_first_ranks_own_exception_ends_the_others(launched_by):
    script = f"""{LAUNCH}
    print(os.getpid())
    if rank == 0:
        raise ValueError("mine")
    time.sleep(1000)
    """
    result = launched_by("python", script)
    assert result.returncode == 1
    assert last_line(result.stderr) == "First cause: rank 0 raised ValueError: mine (exit code 1)"
    assert not any(os.path.exists(f"/proc/{pid}") for pid in result.stdout.split())


@pytest.mark.parametrize(("launcher", "failing"), [("python", [0]), ("python", [1]), ("fabric run", [0, 1])])
def test_what_is_being_saved_when_a_rank_raises_is_saved(launched_by, programs, launcher, failing):
    script = f"""{LAUNCH}
    from lightning.fabric.plugins import TorchCheckpointIO

    class SlowIO(TorchCheckpointIO):
        to_any_path = True
        def write_checkpoint(self, checkpoint, path):
            time.sleep(1)
            super().write_checkpoint(checkpoint, path)

    fabric.strategy.checkpoint_io = SlowIO()
    fabric.save("a.pt", {{"x": 1}}, blocking=False)
    if rank in {failing}:
        raise ValueError("broken")
    fabric.barrier()
    """
    result = launched_by(launcher, script)
    assert result.returncode == 1
    assert "ValueError: broken" in result.stderr
    assert torch.load(programs.folder / "a.pt") == {"x": 1}
    assert not list(programs.folder.glob(".a.pt*"))


def test_a_rank_that_is_still_busy_finishes_and_its_failure_counts(launched_by):
    script = f"""{LAUNCH}
    fabric.barrier()
    if rank == 1:
        time.sleep(1)
        print("still busy", flush=True)
        raise ValueError("late")
    """
    result = launched_by("python", script)
    assert result.stdout == "still busy\n"
    assert result.returncode == 1
    assert last_line(result.stderr) == "First cause: rank 1 raised ValueError: late (exit code 1)"


def test_every_rank_has_the_same_command_folder_and_threads(programs):
    script = f"""{LAUNCH}
    os.chdir("..")
    second = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    second.launch()
    facts = [sys.argv, sys.warnoptions, __spec__ and __spec__.name, torch.get_num_threads(), second.world_size]
    print(json.dumps([os.getpid(), os.environ["LOCAL_RANK"], facts]) + chr(10), end="", flush=True)
    """
    programs.write(script, "package/train.py")
    result = programs.run("-W", "ignore::ImportWarning", "-m", "package.train", "a b")
    assert result.returncode == 0, result.stderr
    (pid0, rank0, facts0), (pid1, rank1, facts1) = sorted(
        map(json.loads, result.stdout.split("\n")[:2]), key=lambda f: f[1]
    )
    assert (rank0, rank1) == ("0", "1")
    assert pid0 != pid1
    assert facts0 == facts1
    assert facts0[1:3] == [["ignore::ImportWarning"], "package.train"]


@pytest.mark.parametrize("launcher", [(), ("-m", "lightning.fabric.cli", "run", "--devices=2")])
def test_the_ranks_end_when_what_started_them_is_killed(programs, launcher):
    script = f"""{LAUNCH}
    fabric.barrier()
    print("ready\\n", end="", flush=True)
    time.sleep(1000)
    """
    program = programs.start(*launcher, programs.write(script))
    assert program.stdout.readline() == "ready\n"
    program.send_signal(signal.SIGKILL)
    program.communicate(timeout=60)  # returns when nobody holds the pipes any more: when the last rank has ended
    assert program.returncode == -signal.SIGKILL


def test_each_job_of_a_hydra_sweep_has_its_ranks_and_one_folder(programs):
    programs.write("lr: 1", "config.yaml")
    script = """
    import os

    import hydra
    from lightning.fabric import Fabric

    @hydra.main(version_base=None, config_path=".", config_name="config")
    def main(config):
        fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
        fabric.launch()
        folders = fabric.strategy.broadcast(os.getcwd())
        print(f"same folder: {os.getcwd() == folders} lr: {config.lr}\\n", end="", flush=True)

    main()
    """
    result = programs.run(programs.write(script), "--multirun", "lr=5,6", "hydra.job.chdir=True")
    assert result.returncode == 0, result.stderr
    assert [result.stdout.count(f"same folder: True lr: {lr}\n") for lr in (5, 6)] == [2, 2], result.stdout
    assert len(list((programs.folder / "multirun").glob("*/*/*/.hydra"))) == 2
    assert not (programs.folder / "outputs").exists()
