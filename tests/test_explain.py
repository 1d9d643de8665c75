"""`fabric run --explain` and `--dry-run`: what is printed when, what goes on, what ends, what stays as it was."""

import io
import os
import pickle
import subprocess
import sys
import textwrap
from contextlib import redirect_stdout

import pytest
import torch
from tests.xla_stand_in import install
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning.fabric import Fabric, cli
from lightning.fabric.strategies.launchers import ranks_of_a_script
from lightning.fabric.testing import on_ranks, preload

preload("torch.distributed.fsdp", "lightning.fabric.strategies.xla_fsdp")

NO_STEP = "no optimizer has taken a step; this is how it was after the last set-up"
END = "dry run: this would be the first step of an optimizer, so the run ends here"


def train(fabric, steps=2, optimizers=1):
    """Returns the weights, and the numbers of optimizers that stepped."""
    torch.manual_seed(0)
    stepped, kept = [], []
    for number in range(optimizers):
        model = nn.Linear(2, 1)
        model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        kept.append((number, model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1)))
    for _ in range(steps):
        for number, model, optimizer, scheduler in kept:
            fabric.backward(model(torch.ones(1, 2)).sum())
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            stepped.append(number)
    return [parameter.tolist() for _, model, _, _ in kept for parameter in model.parameters()], stepped


def test_it_is_printed_once_before_the_first_step_and_training_is_the_same(monkeypatch, capsys):
    plain = train(Fabric(accelerator="cpu", devices=1), optimizers=2)
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("LT_EXPLAIN", "1")
    fabric = Fabric(accelerator="cpu", devices=1)
    assert train(fabric, optimizers=2) == plain
    out = capsys.readouterr().out
    assert out.count("rank 0 of 1") == 1
    assert "covers  2 of 2 trainable tensors of model 2 (Linear)" in out
    assert "got no gradient" not in out
    train(fabric)
    assert capsys.readouterr().out == ""


def test_what_steps_is_the_optimizer_itself_again(monkeypatch):
    monkeypatch.setenv("LT_EXPLAIN", "1")
    fabric = Fabric(accelerator="cpu", devices=1)
    model, optimizer = fabric.setup(m := nn.Linear(1, 1), torch.optim.SGD(m.parameters(), lr=0.1))
    kept = optimizer.step  # as loops do that look it up once
    monkeypatch.delenv("LT_EXPLAIN")
    plain = Fabric(accelerator="cpu", devices=1).setup(m := nn.Linear(1, 1), torch.optim.SGD(m.parameters(), lr=0.1))[1]
    for _ in range(2):
        fabric.backward(model(torch.ones(1, 1)).sum())
        kept(closure=lambda: torch.zeros(()))
        assert optimizer.step.__func__ is plain.step.__func__


def test_a_dry_run_ends_at_the_first_step(monkeypatch, capsys):
    monkeypatch.setenv("LT_EXPLAIN", "dry-run")
    with pytest.raises(SystemExit) as ended:
        train(Fabric(accelerator="cpu", devices=1))
    assert ended.value.code == 0
    assert END in capsys.readouterr().out


def _dry_run():
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    out = io.StringIO()
    with redirect_stdout(out), pytest.raises(SystemExit):
        train(fabric)
    return out.getvalue(), fabric.all_reduce(torch.tensor(1.0), reduce_op="sum").item()


def test_in_a_dry_run_all_ranks_end_together_and_rank_0_speaks():
    (first, total), (second, _) = on_ranks(2, _dry_run, env={"LT_EXPLAIN": "dry-run"})
    assert first.count("rank 0 of 2") == 1
    assert END in first
    assert second == ""
    assert total == 2  # who has something to finish still can


@pytest.mark.parametrize("text", ["0", "", "off", "False"])
def test_off(monkeypatch, capsys, text):
    monkeypatch.setenv("LT_EXPLAIN", text)
    train(Fabric(accelerator="cpu", devices=1))
    assert capsys.readouterr().out == ""


def test_a_wrong_value_is_refused(monkeypatch):
    monkeypatch.setenv("LT_EXPLAIN", "maybe")
    with pytest.raises(ValueError, match="LT_EXPLAIN must be 1, dry-run or 0, but it is 'maybe'"):
        Fabric(accelerator="cpu", devices=1)


def test_without_it_nothing_comes_between_the_user_and_a_step():
    fabric = Fabric(accelerator="cpu", devices=1)
    _, optimizer = fabric.setup(m := nn.Linear(1, 1), torch.optim.SGD(m.parameters(), lr=0.1))
    assert optimizer.step.__self__ is optimizer


def test_another_process_has_set_up_nothing():
    fabric = Fabric(accelerator="cpu", devices=1)
    model = fabric.setup(nn.Linear(1, 1))
    assert len(fabric.explain().modules) == 1
    assert pickle.loads(pickle.dumps(fabric)).explain().modules == ()
    assert model is not None


@pytest.mark.parametrize(
    ("options", "value"),
    [([], None), (["--explain"], "1"), (["--dry-run"], "dry-run"), (["--dry_run", "--explain"], "dry-run")],
)
def test_the_options_of_fabric_run(monkeypatch, tmp_path, options, value):
    monkeypatch.delenv("LT_EXPLAIN", raising=False)
    monkeypatch.setattr(ranks_of_a_script, "run_script", lambda *call, preload: 0)
    script = tmp_path / "train.py"
    script.write_text("")
    assert cli.main(["run", *options, str(script), "--explain"]) == 0
    assert os.environ.get("LT_EXPLAIN") == value


# ---- DeepSpeed, which steps an engine in place of the optimizer ------------------------------------------------------


def _deepspeed():
    from lightning.fabric.strategies import DeepSpeedStrategy

    found = []
    for stage in (1, 3):
        os.environ["LT_EXPLAIN"] = "dry-run" if stage == 3 else "1"
        fabric = Fabric(accelerator="cpu", devices=2, strategy=DeepSpeedStrategy(stage=stage), precision="bf16-mixed")
        fabric.launch()
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
        module[0].bias.requires_grad = False
        model, optimizer = fabric.setup(module, torch.optim.Adam(module.parameters()))
        out = io.StringIO()
        with redirect_stdout(out):
            fabric.backward(model(torch.ones(2, 4)).sum(), model=model)
            try:
                optimizer.step()
            except SystemExit:
                assert stage == 3
        found.append((fabric.explain(), out.getvalue()))
    return found, {name: parameter.ds_tensor.numel() for name, parameter in module.named_parameters()}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_deepspeed():
    pytest.importorskip("deepspeed")
    (found, partitions), (_, _) = on_ranks(2, _deepspeed, timeout=280)
    (first, shown), (third, shown_in_dry_run) = found
    for explanation in (first, third):
        (module,), (optimizer,) = explanation.modules, explanation.optimizers
        assert module.wrappers == ("_FabricModule", "DeepSpeedEngine")
        assert {(p.dtype, p.computes_in) for p in module.parameters} == {("bfloat16", "bfloat16")}
        assert (optimizer.tensors, optimizer.coverage[0].covered, optimizer.foreign) == (3, 3, ())
        assert explanation.attention == ()
        assert {p.gradients.startswith("averaged over 2 ranks in") for p in module.parameters if p.trainable} == {True}
        assert [p.gradients for p in module.parameters if not p.trainable] == [""]
    assert {parameter.layout for parameter in first.modules[0].parameters} == {"a copy on each of 2 ranks"}
    assert {p.name: p.numel_here for p in third.modules[0].parameters} == partitions
    assert [p.shape for p in third.modules[0].parameters] == [(4, 4), (4,), (1, 4), (1,)]
    assert "ZeRO stage 3" in third.strategy_remarks[1]
    assert ("ZeRO stage 1" in shown, END in shown, END in shown_in_dry_run) == (True, False, True)


# ---- fresh interpreters ----------------------------------------------------------------------------------------------

SCRIPT = """
    import sys
    import torch, torch._dynamo  # which every optimizer imports: once, where ranks are forked
    from torch.utils.data import DataLoader, TensorDataset
    from lightning.fabric import Fabric

    def train(fabric, steps):
        model = torch.nn.Linear(2, 1)
        model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        data = TensorDataset(torch.ones(5, 2))
        for x, in fabric.setup_dataloaders(DataLoader(data, num_workers=1)):
            fabric.backward(model(x).sum())
            if steps:
                optimizer.step()
        return "ended"

    if __name__ == "__main__":
        for steps in sys.argv[2:]:
            fabric = Fabric(accelerator="cpu", devices=2, strategy=sys.argv[1])
            print(fabric.launch(train, steps == "steps"))
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(textwrap.dedent(SCRIPT))
    return str(path)


def _run(*words, **variables):
    env = {**os.environ, "PYTHONPATH": os.path.abspath("src"), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=100, check=False, env=env, cwd="/"
    )


@pytest.mark.slow
def test_a_dry_run_of_a_script_ends_well(script):
    done = _run("-m", "lightning.fabric.cli", "run", "--devices=2", "--dry-run", script, "ddp", "steps", "never")
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "Joined" not in line] == []
    assert done.stdout.count("model 1: Linear") == 1
    assert done.stdout.rstrip().endswith(END)


@pytest.mark.slow
def test_ranks_that_are_forked_for_a_function(script):
    done = _run(script, "ddp_fork", "never", "steps", "never", LT_EXPLAIN="dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("model 1: Linear") == 2
    first, second = done.stdout.split(f"{NO_STEP}\nended\n")
    assert END not in first
    assert second.rstrip().endswith(END)


def test_memory_of_the_process():
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    before = fabric.explain().memory
    kept = torch.ones(16 << 20)  # 64 MiB
    after = fabric.explain().memory
    assert 60 << 20 < after.now - before.now < 80 << 20
    assert after.peak >= after.now
    assert kept.numel() > 0


def test_loaders_are_remembered_as_they_were():
    fabric = Fabric(accelerator="cpu", devices=1)
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(torch.zeros(3, 1)), shuffle=True))
    (report,) = fabric.explain().loaders
    assert (report.before.kind, report.samples_here, len(loader)) == ("RandomSampler", 3, 3)


# ---- XLA, against its stand-in ---------------------------------------------------------------------------------------


def _xla():
    install()
    from lightning.fabric.strategies import XLAFSDPStrategy

    found = []
    for strategy in (XLAFSDPStrategy(auto_wrap_policy={nn.Linear}, activation_checkpointing_policy={nn.Linear}), "xla"):
        fabric = Fabric(accelerator="tpu", devices=2, strategy=strategy, precision="bf16-true")
        fabric._strategy.setup_environment()
        fabric._launched = True
        module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
        found.append((fabric.explain(), [p.numel() for p in model.parameters()]))
        del model, optimizer
    return found


def test_xla():
    (sharded, parts), (replicated, whole) = on_ranks(2, _xla)[1]
    (module,), (optimizer,) = sharded.modules, sharded.optimizers
    assert [p.name for p in module.parameters] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert [p.numel_here for p in module.parameters] == parts
    assert {(p.dtype, p.computes_in, p.layout) for p in module.parameters} == {
        ("float32", "bfloat16", "1/2 of its elements over 2 ranks")
    }
    assert {p.gradients for p in module.parameters} == {"averaged over 2 ranks in bfloat16"}
    assert (optimizer.tensors, optimizer.numel, optimizer.foreign) == (4, 30, ())
    assert sum(part.is_unit for part in module.parts) == 2
    assert sum(part.recomputes for part in module.parts) == 2
    assert [p.numel_here for p in replicated.modules[0].parameters] == whole
    assert {p.gradients for p in replicated.modules[0].parameters} == {
        "averaged over 2 ranks when they are clipped or stepped"
    }
    assert sharded.attention == replicated.attention == ()
