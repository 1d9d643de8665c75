"""`fabric checkpoint`: what is listed, verified, converted and compared, with which words and exit codes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning.fabric import cli
from lightning.fabric.checkpoint.conversion import convert
from lightning.fabric.checkpoint.directory import CheckpointDirectory
from lightning.fabric.checkpoint.manifest import MANIFEST, attach, manifest_of, read_manifest

STATE = {"model": {"w": torch.arange(4.0), "b": torch.ones(2)}, "epoch": 3}


def _run(capsys, *words):
    """The exit code, and the lines of both streams."""
    code = cli.main(["checkpoint", *map(str, words)])
    printed = capsys.readouterr()
    return code, printed.out.splitlines(), printed.err.splitlines()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two checkpoints by step, a file and a folder, and one without a manifest."""
    folder = tmp_path_factory.mktemp("made")
    torch.save(STATE, folder / "old.pt")
    run = CheckpointDirectory(folder / "run")
    run.folder.mkdir()
    torch.save(STATE, run.path_of(1))
    manifest = manifest_of(
        run.path_of(1), step=1, metrics={"loss": 0.52}, world_size=2, strategy="DDP", time="2026-01-02T03:04:05+00:00"
    )
    attach(run.path_of(1), manifest)
    convert(folder / "old.pt", run.path_of(20), "sharded")
    run.set_latest(run.path_of(20))
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "made")


def _flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


class TestList:
    def test_prints_a_line_for_each(self, folder, capsys):
        code, lines, errors = _run(capsys, "list", folder / "run")
        assert (code, errors) == (0, [])
        assert lines[0].split() == ["NAME", "STEP", "SIZE", "TIME", "(UTC)", "STRATEGY", "RANKS", "METRICS"]
        assert lines[1].split()[:2] == ["step-00000001", "1"]
        assert lines[1].endswith("2026-01-02 03:04:05  DDP       2      loss=0.52")
        assert lines[2].split()[:2] == ["step-00000020", "20"]
        assert lines[2].endswith("latest")
        assert len(lines) == 3

    def test_says_the_same_as_json(self, folder, capsys):
        assert cli.main(["checkpoint", "list", str(folder / "run"), "--json"]) == 0
        first, second = json.loads(capsys.readouterr().out)
        manifest = read_manifest(folder / "run" / "step-00000001")
        assert first == {
            "path": str(folder / "run" / "step-00000001"),
            "step": 1,
            "size": manifest.size,
            "time": "2026-01-02T03:04:05+00:00",
            "strategy": "DDP",
            "world_size": 2,
            "metrics": {"loss": 0.52},
            "versions": {},
            "latest": False,
            "damages": [],
        }
        assert second["latest"] is True
        assert second["versions"]["torch"] == torch.__version__

    def test_shows_which_are_damaged(self, folder, capsys):
        (folder / "run" / "step-00000020" / "meta.pt").unlink()
        (folder / "run" / "step-00000003").mkdir()
        (folder / "run" / "step-00000001").write_bytes((folder / "run" / "step-00000001").read_bytes()[:-1])
        code, lines, _ = _run(capsys, "list", folder / "run")
        assert code == 0
        assert "DAMAGED: does not end as it was written" in lines[1]
        assert lines[2].split() == ["step-00000003", "3", "DAMAGED:", "'manifest.json'", "is", "missing"]
        assert lines[3].endswith("latest, DAMAGED: 'meta.pt' is missing")
        assert cli.main(["checkpoint", "list", str(folder / "run"), "--json"]) == 0
        assert [bool(each["damages"]) for each in json.loads(capsys.readouterr().out)] == [True, True, True]

    def test_takes_one_checkpoint_and_none(self, folder, capsys):
        assert len(_run(capsys, "list", f"file://{folder}/run/step-00000020")[1]) == 2
        assert _run(capsys, "list", folder) == (0, [f"There are no checkpoints with a manifest in '{folder}'."], [])
        assert _run(capsys, "list", folder, "--json") == (0, ["[]"], [])
        assert _run(capsys, "list", folder / "gone") == (
            1,
            [],
            [f"fabric checkpoint list: There is nothing at '{folder / 'gone'}'."],
        )


class TestVerify:
    def test_good_ones_end_with_0(self, folder, capsys):
        code, lines, errors = _run(capsys, "verify", folder / "run", folder / "run" / "step-00000001")
        assert (code, errors) == (0, [])
        assert [line.split(": ")[0] for line in lines] == [
            str(folder / "run" / name) for name in ("step-00000001", "step-00000020", "step-00000001")
        ]
        assert ": good, 1 file, " in lines[0]
        assert ": good, 3 files, " in lines[1]

    @pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "meta.pt", MANIFEST])
    @pytest.mark.parametrize("harm", [_flip, Path.unlink, lambda file: file.write_bytes(b"")])
    def test_any_bad_file_is_named_and_ends_with_1(self, folder, capsys, name, harm):
        checkpoint = folder / "run" / "step-00000020"
        harm(checkpoint / name)
        code, lines, errors = _run(capsys, "verify", folder / "run")
        assert code == 1
        assert lines[1] == f"{checkpoint}: DAMAGED"
        assert ": good, " in lines[0]
        (error,) = errors
        assert error.startswith(f"fabric checkpoint verify: The checkpoint '{checkpoint}' is damaged: ")
        assert f"its file '{name}'" in error

    def test_all_bad_files_are_named(self, folder, capsys):
        checkpoint = folder / "run" / "step-00000020"
        for name in ("__0_0.distcp", "meta.pt"):
            _flip(checkpoint / name)
        errors = _run(capsys, "verify", checkpoint)[2]
        assert ["__0_0.distcp" in errors[0], "meta.pt" in errors[1]] == [True, True]

    def test_a_bad_single_file_is_named(self, folder, capsys):
        _flip(folder / "run" / "step-00000001")
        assert _run(capsys, "verify", folder / "run" / "step-00000001")[0] == 1

    def test_without_a_manifest_it_is_not_verifiable(self, folder, capsys):
        code, (line,), errors = _run(capsys, "verify", folder / "old.pt")
        assert (code, errors) == (3, [])
        assert line.startswith(f"{folder / 'old.pt'}: not verifiable: there is no manifest.")
        assert _run(capsys, "verify", folder)[0] == 3
        assert _run(capsys, "verify", folder / "old.pt", folder / "run")[0] == 3
        _flip(folder / "run" / "step-00000001")
        assert _run(capsys, "verify", folder / "old.pt", folder / "run")[0] == 1

    def test_one_that_is_gone_does_not_hide_the_others(self, folder, capsys):
        code, lines, errors = _run(capsys, "verify", folder / "gone", folder / "run")
        assert (code, len(lines)) == (1, 2)
        assert errors == [f"fabric checkpoint verify: There is nothing at '{folder / 'gone'}'."]

    def test_says_when_only_sizes_could_be_compared(self, folder, capsys):
        checkpoint = folder / "run" / "step-00000020"
        attach(checkpoint, manifest_of(checkpoint, checksums=False))
        code, (line,), _ = _run(capsys, "verify", checkpoint)
        assert code == 0
        assert line.endswith("(sizes alone: 3 saved without digests)")


class TestConvert:
    def test_prints_the_path_and_says_what_is_not_as_it_could_be(self, folder, capsys):
        code, lines, errors = _run(capsys, "convert", folder / "old.pt", folder / "new.pt")
        assert (code, lines) == (0, [str(folder / "new.pt")])
        assert errors == ["SOURCE has no manifest, so it could not be verified."]
        out = folder / "w.safetensors"
        code, lines, errors = _run(capsys, "convert", folder / "new.pt", out, "--to", "safetensors")
        assert (code, lines) == (0, [str(out)])
        assert errors[0] == "Safetensors hold weights alone. Left out: epoch."
        assert errors[1].startswith("A single safetensors file has no room for a manifest")
        assert load_file(out).keys() == {"w", "b"}

    def test_passes_everything_on(self, folder, capsys):
        words = ["--to", "safetensors", "--key", "model", "--max-shard-size", "10B"]
        assert _run(capsys, "convert", folder / "run", folder / "hf", *words)[0] == 0
        assert len(list((folder / "hf").glob("model-*-of-00002.safetensors"))) == 2
        assert _run(capsys, "convert", folder / "run", folder / "hf", *words)[0] == 1
        assert _run(capsys, "convert", folder / "run", folder / "hf", *words, "--overwrite")[0] == 0
        assert _run(capsys, "convert", folder / "hf", folder / "parts", "--to", "sharded") == (
            0,
            [str(folder / "parts")],
            [],
        )

    def test_objects_need_trust(self, folder, capsys):
        torch.save({"where": Path("here")}, folder / "objects")
        code, lines, (error,) = _run(capsys, "convert", folder / "objects", folder / "new")
        assert (code, lines) == (1, [])
        assert error.startswith("fabric checkpoint convert: The checkpoint")
        assert error.endswith("On the command line that is --trusted.")
        assert _run(capsys, "convert", folder / "objects", folder / "new", "--trusted")[0] == 0

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["gone", "new"], "There is nothing at 'gone'."),
            (["old.pt", "run"], "'run' exists. Delete it"),
            (["old.pt", "new", "--max-shard-size", "1GB"], "--max-shard-size is for `--to safetensors` with a folder"),
            (["old.pt", "new", "--to", "safetensors", "--key", "ema"], "has no entry 'ema'"),
        ],
    )
    def test_a_mistake_is_one_line_and_exit_code_1(self, folder, capsys, monkeypatch, words, message):
        monkeypatch.chdir(folder)
        code, lines, (error,) = _run(capsys, "convert", *words)
        assert (code, lines) == (1, [])
        assert error.startswith("fabric checkpoint convert: ")
        assert message in error
        assert not (folder / "new").exists()


class TestDiff:
    def test_equal_ends_with_0(self, folder, capsys):
        run = folder / "run"
        assert _run(capsys, "diff", run / "step-00000001", run / "step-00000020") == (0, ["equal"], [])

    def test_takes_folders_of_checkpoints(self, folder, capsys):
        assert _run(capsys, "diff", folder / "run", folder / "run" / "step-00000001") == (0, ["equal"], [])

    @pytest.mark.parametrize("name", ["step-00000001", "step-00000020/__0_0.distcp"])
    def test_damage_is_no_difference(self, folder, capsys, name):
        _flip(folder / "run" / name)
        checkpoint = folder / "run" / name.partition("/")[0]
        code, lines, (error,) = _run(capsys, "diff", folder / "old.pt", checkpoint)
        assert (code, lines) == (2, [])
        assert error.startswith(f"fabric checkpoint diff: The checkpoint '{checkpoint}' is damaged: ")

    def test_different_ends_with_1(self, folder, capsys):
        torch.save({"model": {"w": torch.zeros(4), "b": torch.ones(2)}, "epoch": 4}, folder / "other")
        code, lines, errors = _run(capsys, "diff", folder / "old.pt", folder / "other")
        assert (code, errors) == (1, [])
        assert lines == ["model.w: max difference 3, in 3 of 4 values", "epoch: 3 / 4"]
        assert _run(capsys, "diff", folder / "old.pt", folder / "other", "--key", "epoch")[1] == ["everything: 3 / 4"]

    def test_trouble_ends_with_2(self, folder, capsys):
        assert _run(capsys, "diff", folder / "old.pt", folder / "gone")[0] == 2
        code, _, errors = _run(capsys, "diff", folder / "old.pt", folder / "old.pt", "--key", "ema")
        assert code == 2
        assert errors == ["fabric checkpoint diff: There is no entry 'ema'; the checkpoint has ['model', 'epoch']."]


@pytest.mark.parametrize(("command", "code"), [("list", 1), ("verify", 1), ("diff", 2)])
def test_what_is_not_on_this_machine_is_not_taken_for_missing(folder, capsys, command, code):
    words = ["memory://bucket/c", *([folder / "old.pt"] if command == "diff" else [])]
    found, _, (error,) = _run(capsys, command, *words)
    assert found == code
    assert "'memory://bucket/c' is not on this machine. `fabric checkpoint convert memory://bucket/c PATH`" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["burn"], "invalid choice: 'burn'"),
        (["verify"], "the following arguments are required: PATH"),
        (["diff", "a"], "the following arguments are required: B"),
        (["convert", "a", "b", "--to", "zip"], "invalid choice: 'zip'"),
        (["convert", "a", "b", "--to", "safetensors", "--max-shard-size", "much"], "such as 5GB, 500MB or 4GiB"),
    ],
)
def test_a_wrong_command_line_ends_with_2(capsys, words, message):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["checkpoint", *words])
    assert message in capsys.readouterr().err


def test_torch_is_not_imported_unless_it_is_needed(made):
    lines = [
        ["--help"],
        *([command, "--help"] for command in ("list", "verify", "convert", "diff")),
        ["convert", "gone", "new"],
        ["diff", "gone", "gone"],
        ["list", str(made / "run")],
        ["verify", str(made / "run"), str(made / "old.pt")],
    ]
    code = f"""
import sys
from lightning.fabric import cli
for words in {lines}:
    try:
        cli.main(["checkpoint", *words])
    except SystemExit:
        pass
    assert not {{"torch", "numpy", "safetensors", "fsspec"}} & sys.modules.keys(), words
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for text in ("usage: fabric checkpoint ", "--max-shard-size", "step-00000020: good", "not verifiable"):
        assert text in done.stdout
