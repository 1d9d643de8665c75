"""A process for each XLA device: two processes of the stand-in, and torch_xla itself in interpreters of its own."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch
from tests import xla_stand_in

from lightning.fabric import Fabric
from lightning.fabric.plugins.environments.xla import XLAEnvironment
from lightning.fabric.strategies.launchers.launcher import _Launcher
from lightning.fabric.strategies.launchers.xla import _XLALauncher
from lightning.fabric.testing import RankError
from lightning.fabric.utilities.imports import package_available


@pytest.fixture
def two_devices(monkeypatch):
    """The stand-in, on a machine with two devices."""
    package_available.cache_clear()
    for name, module in xla_stand_in._modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("XLA_STAND_IN_DEVICES", "2")
    yield
    package_available.cache_clear()


def _launcher(num_processes=2, start_method=None):
    return _XLALauncher(XLAEnvironment(), num_processes, start_method)


def _ranks(*args, **kwargs):
    return os.environ["LOCAL_RANK"], os.getpid(), os.getppid(), torch.get_num_threads(), args, kwargs


def _fail_on_second():
    if os.environ["LOCAL_RANK"] == "1":
        raise KeyError("of the second rank")
    time.sleep(60)


def _die_on_second():
    if os.environ["LOCAL_RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


@pytest.mark.usefixtures("two_devices")
class TestTwoProcesses:
    @pytest.mark.parametrize("start_method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
    def test_the_first_ranks_result_comes_back(self, start_method):
        rank, pid, parent, threads, args, kwargs = _launcher(start_method=start_method).launch(_ranks, 1, key="value")
        assert (rank, parent, args, kwargs) == ("0", os.getpid(), (1,), {"key": "value"})
        assert pid != os.getpid()
        assert threads == 1 or start_method == "spawn"

    def test_a_fork_runs_any_function(self):
        seen = torch.ones(256, 256) @ torch.ones(256, 256)  # after which a fork has no threads to compute with
        assert _launcher().launch(lambda: (seen @ seen).max().item()) == 256.0**3

    def test_what_a_spawned_process_cannot_get_is_an_error(self):
        with pytest.raises(TypeError, match="strategy='xla' cannot send"):
            _launcher(start_method="spawn").launch(lambda: 1)

    def test_the_rank_that_failed_is_shown_and_the_others_are_ended(self):
        begin = time.monotonic()
        with pytest.raises(RankError, match="KeyError: 'of the second rank'") as caught:
            _launcher().launch(_fail_on_second)
        assert caught.value.rank == 1
        assert time.monotonic() - begin < 30

    def test_a_rank_that_is_killed_ends_the_others(self):
        with pytest.raises(RuntimeError, match="perhaps out of memory") as caught:
            _launcher().launch(_die_on_second)
        assert isinstance(caught.value.__cause__, BrokenProcessPool)

    def test_fabric_launches_through_it(self):
        fabric = Fabric(accelerator="tpu", devices=2, strategy="xla")
        assert fabric.launch(_mean_of_ranks, 10.0) == (2, 10.5, "cpu")
        with pytest.raises(TypeError, match=r"fabric.launch\(train\)"):
            fabric.launch()

    def test_processes_of_torchrun_start_no_others(self, monkeypatch):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
        with pytest.raises(RuntimeError, match="plain `python`"):
            _launcher().launch(_ranks)


def _mean_of_ranks(fabric, more):
    mean = fabric.all_reduce(torch.tensor(fabric.global_rank + more))
    return fabric.world_size, mean.item(), mean.device.type


@pytest.mark.usefixtures("two_devices")
class TestOneDevice:
    def test_no_process_is_made(self):
        marker = object()
        assert _launcher(1).launch(lambda given: (given, os.getpid()), marker) == (marker, os.getpid())

    def test_an_error_is_the_users_own(self):
        with pytest.raises(ZeroDivisionError):
            _launcher(1).launch(lambda: 1 // 0)


def test_it_is_a_launcher_for_notebooks_that_needs_a_function(monkeypatch):
    launcher = _launcher()
    assert isinstance(launcher, _Launcher)
    assert launcher.needs_function
    assert launcher.is_interactive_compatible
    monkeypatch.setenv("PL_DISABLE_FORK", "1")
    assert not _launcher().is_interactive_compatible
    with pytest.raises(ValueError, match="PL_DISABLE_FORK=1"):
        _launcher(start_method="fork")


def test_without_torch_xla_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("lightning.fabric.utilities.imports.package_available", lambda name: False)
    with pytest.raises(ModuleNotFoundError, match="pip install torch_xla"):
        _launcher().launch(_ranks)


SCRIPT = """
    import sys, torch
    from lightning.fabric import Fabric
    from lightning.fabric.accelerators import XLAAccelerator

    def train(fabric, label):
        torch.ones(300, 300) @ torch.ones(300, 300)
        if label == "fail" and fabric.global_rank == fabric.world_size - 1:
            raise KeyError("as asked")
        module = torch.nn.Linear(2, 1, bias=False)
        torch.nn.init.ones_(module.weight)
        model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.5))
        if fabric.world_size == 1:
            fabric.backward(model(torch.ones(1, 2, device=fabric.device)).sum())
            optimizer.step()
            fabric.barrier()
        return label, fabric.world_size, fabric.global_rank, str(fabric.device), model.weight.detach()

    if __name__ == "__main__":
        devices, label = int(sys.argv[1]), sys.argv[2]
        XLAAccelerator.auto_device_count = staticmethod(lambda: devices)
        fabric = Fabric(accelerator="tpu", devices=devices, strategy="xla")
        fabric.strategy._sync_module_states = False  # the devices of one CPU cannot talk to each other
        label, *facts, weight = fabric.launch(train, label)
        print(label, facts, weight.device if devices > 1 else "", weight.cpu().tolist())
"""


@pytest.mark.xla
@pytest.mark.slow
@pytest.mark.skipif(not xla_stand_in.IS_INSTALLED, reason="needs torch_xla")
class TestTorchXLA:
    def _run(self, tmp_path, *args, **env):
        (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
        path = os.pathsep.join(sys.path)
        done = subprocess.run(
            [sys.executable, "script.py", *args],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path, "PJRT_DEVICE": "CPU", **env},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        return done.stdout.strip(), done.stderr

    def test_one_device_in_this_process(self, tmp_path):
        out, error = self._run(tmp_path, "1", "one")
        assert out == "one [1, 0, 'xla:0']  [[0.5, 0.5]]", error

    @pytest.mark.parametrize("disable_fork", ["0", "1"])
    def test_two_devices_of_one_process(self, tmp_path, disable_fork):
        out, error = self._run(tmp_path, "2", "two", CPU_NUM_DEVICES="2", PL_DISABLE_FORK=disable_fork)
        assert out == "two [2, 0, 'xla:0'] cpu [[1.0, 1.0]]", error

    def test_the_device_that_failed_is_shown(self, tmp_path):
        out, error = self._run(tmp_path, "2", "fail", CPU_NUM_DEVICES="2")
        assert out == ""
        assert "KeyError: 'as asked'" in error
        assert "First cause: rank 1 raised KeyError" in error
