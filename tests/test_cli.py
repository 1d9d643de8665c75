"""`fabric run`: which words are whose, what is exported, how many ranks, which port, and what a mistake is told.

And that `fabric consolidate` and `fabric checkpoint` reach their commands.
"""

import socket
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning.fabric import cli
from lightning.fabric.checkpoint import consolidation
from lightning.fabric.strategies.launchers import ranks_of_a_script


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("")
    return "train.py"


@pytest.fixture
def started(monkeypatch):
    """What would be run: script, arguments, the ranks' variables."""
    calls = []
    monkeypatch.setattr(ranks_of_a_script, "run_script", lambda *call, preload: calls.append(call) or 0)
    return calls


OPTIONS = {"--devices": True, "--num-nodes": True, "--help": False}


@pytest.mark.parametrize(
    ("line", "own", "found", "arguments"),
    [
        ("train.py", [], "train.py", []),
        ("--devices 2 train.py --devices 3", ["--devices=2"], "train.py", ["--devices", "3"]),
        ("--devices=2 --num-nodes -1 train.py x", ["--devices=2", "--num-nodes=-1"], "train.py", ["x"]),
        ("--lr=1 --fast train.py --x", [], "train.py", ["--lr=1", "--fast", "--x"]),
        ("--lr 1 train.py", [], "train.py", ["--lr", "1"]),
        ("--lr 1 gone.py", [], "gone.py", ["--lr", "1"]),
        ("--fast gone.py", [], "gone.py", ["--fast"]),
        ("-- train.py -- x", [], "train.py", ["--", "x"]),
        ("--help", ["--help"], None, []),
        ("--devices", ["--devices"], None, []),
        ("", [], None, []),
    ],
)
def test_words_go_to_whom_they_belong(script, line, own, found, arguments):
    assert cli.split(line.split(), OPTIONS) == (own, found, arguments)


@given(st.lists(st.sampled_from(["--devices", "2", "--lr", "x", "--help", "--"])))
def test_everything_after_the_script_is_the_scripts(words):
    assert cli.split([__file__, *words], OPTIONS) == ([], __file__, words)


@pytest.mark.parametrize("spelling", [["run"], ["run", "model"]])
def test_both_spellings_start_the_script(script, started, spelling):
    assert cli.main([*spelling, "--lr", "1", script, "x"]) == 0
    ((name, arguments, _),) = started
    assert (name, arguments) == (script, ["--lr", "1", "x"])


def test_given_values_are_exported_and_others_are_not(script, started, monkeypatch):
    for name in ("ACCELERATOR", "STRATEGY", "DEVICES", "NUM_NODES", "PRECISION"):
        monkeypatch.delenv(f"LT_{name}", raising=False)
    cli.main(["run", "--strategy=ddp", "--precision", "bf16-mixed", script])
    exported = {name: value for name, value in cli.os.environ.items() if name.startswith("LT_")}
    assert exported == {"LT_CLI_USED": "1", "LT_STRATEGY": "ddp", "LT_PRECISION": "bf16-mixed", "LT_DEVICES": "1"}


@pytest.mark.parametrize(
    ("options", "processes"),
    [
        ([], 1),
        (["--devices", "2"], 2),
        (["--devices", "0,1"], 2),
        (["--devices", "1,"], 1),
        (["--accelerator", "cpu", "--devices", "auto"], 1),
        (["--accelerator", "cpu", "--devices", "-1"], 1),
        (["--strategy", "dp", "--devices", "2"], 1),
        (["--strategy", "single_device", "--devices", "2"], 1),
        (["--strategy", "fsdp", "--devices", "2"], 2),
        (["--strategy", "xla_fsdp", "--devices", "2"], 1),
        (["--accelerator", "tpu"], 1),
    ],
)
def test_one_process_per_device(script, started, options, processes):
    cli.main(["run", *options, script])
    ((_, _, envs),) = started
    assert [env["LOCAL_RANK"] for env in envs] == [str(i) for i in range(processes)]
    assert {env["WORLD_SIZE"] for env in envs} == {str(processes)}


def test_all_gpus_are_counted(script, started, monkeypatch):
    from lightning.fabric.accelerators.cuda import CUDAAccelerator

    monkeypatch.setattr(CUDAAccelerator, "is_available", staticmethod(lambda: True))
    monkeypatch.setattr(CUDAAccelerator, "auto_device_count", staticmethod(lambda: 3))
    cli.main(["run", "--accelerator=cuda", "--devices=-1", script])
    assert len(started[0][2]) == 3


def test_threads_are_shared_among_the_ranks_unless_the_user_has_said(script, started, monkeypatch):
    monkeypatch.setattr(cli, "_num_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cli.main(["run", "--devices", "3", script])
    assert cli.os.environ["OMP_NUM_THREADS"] == "2"
    cli.main(["run", "--devices", "1", script])
    assert cli.os.environ["OMP_NUM_THREADS"] == "2"


def test_where_nobody_else_has_to_know_the_port_each_run_has_its_own(script, started, monkeypatch):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setattr(cli, "_MAIN_PORT", port)
        for _ in range(2):  # neither of which listens on it
            cli.main(["run", script])
        assert len({str(port), *(run[2][0]["MASTER_PORT"] for run in started)}) == 3
        with pytest.raises(SystemExit, match="2"):
            cli.main(["run", "--num-nodes", "2", script])
        cli.main(["run", "--num-nodes", "2", "--node-rank", "1", "--main-address", "10.0.0.1", script])
        assert started[2][2][0]["MASTER_PORT"] == str(port)


def test_a_given_port_that_is_taken_is_refused(script, capsys):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(SystemExit, match="2"):
            cli.main(["run", "--main-port", str(port), script])
    assert f"Port {port} of this machine is taken" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run"], "SCRIPT is missing"),
        (["run", "gone.py"], "SCRIPT 'gone.py' does not exist"),
        (["run", "--strategy", "ddp_spawn", "train.py"], "invalid choice: 'ddp_spawn'"),
        (["run", "--accelerator", "abacus", "train.py"], "invalid choice: 'abacus'"),
        (["run", "--precision", "17", "train.py"], "Unknown precision '17'"),
        (
            ["run", "--devices", "two", "train.py"],
            "--devices must be a count (2), a list (0,1), -1 or auto, but got 'two'",
        ),
        (["run", "--devices", "0", "train.py"], "but got '0'"),
        (["run", "--main-port", "0", "train.py"], "--main-port must be from 1 to 65535, but got 0"),
        (["run", "--main-port", "70000", "train.py"], "but got 70000"),
        (["run", "--num-nodes", "0", "train.py"], "'0' is not a whole number above 0"),
        (["walk"], "invalid choice: 'walk'"),
        (["consolidate"], "the following arguments are required: FOLDER"),
        ([], "required"),
    ],
)
def test_a_mistake_ends_with_a_message(script, started, capsys, words, message):
    with pytest.raises(SystemExit, match="2"):
        cli.main(words)
    assert message in capsys.readouterr().err
    assert not started


def _help_without_torch(*words):
    code = (
        "import sys\nfrom lightning.fabric import cli\n"
        f"try: cli.main([*{words}, '--help'])\nfinally: assert 'torch' not in sys.modules"
    )
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_help_answers_without_torch():
    assert "merge a sharded checkpoint into one file" in _help_without_torch()
    assert "list, verify, convert and compare checkpoints" in _help_without_torch()
    help_text = _help_without_torch("run")
    assert "fabric run [OPTIONS] SCRIPT" in help_text
    assert "ddp_spawn" not in help_text
    assert "FOLDER.consolidated" in _help_without_torch("consolidate")


@pytest.mark.parametrize("option", ["--output_file", "--output-file"])
def test_consolidate_reaches_its_command(monkeypatch, option):
    calls = []
    monkeypatch.setattr(consolidation, "consolidate_checkpoint", lambda *call: calls.append(call) or "merged.pt")
    assert cli.main(["consolidate", "folder"]) == 0
    assert cli.main(["consolidate", "folder", option, "merged.pt"]) == 0
    assert cli.main(["consolidate", "folder", "--trusted"]) == 0
    assert calls == [("folder", None, None), ("folder", "merged.pt", None), ("folder", None, False)]


def test_consolidate_of_nothing_is_a_message_and_exit_code_1(capsys, tmp_path):
    assert cli.main(["consolidate", str(tmp_path / "gone")]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_checkpoint_reaches_its_commands(capsys, tmp_path):
    assert cli.main(["checkpoint", "list", str(tmp_path)]) == 0
    assert "no checkpoints" in capsys.readouterr().out
    assert cli.main(["checkpoint", "verify", str(tmp_path / "gone")]) == 1
    assert "fabric checkpoint verify: There is nothing at" in capsys.readouterr().err
