import pickle
import sys

import pytest
from tests.xla_stand_in import install, xla  # noqa: F401

from lightning.fabric.plugins.environments.xla import XLAEnvironment
from lightning.fabric.testing import on_ranks
from lightning.fabric.utilities import imports


def test_one_device(xla):  # noqa: F811
    environment = pickle.loads(pickle.dumps(XLAEnvironment()))
    environment.set_world_size(7)
    environment.set_global_rank(5)
    assert not environment.creates_processes_externally
    assert (environment.world_size(), environment.global_rank()) == (1, 0)
    assert (environment.local_rank(), environment.node_rank()) == (0, 0)
    assert (environment.main_address, environment.main_port) == ("127.0.0.1", 29400)
    environment.validate_settings(num_devices=1, num_nodes=1)
    environment.teardown()
    environment.teardown()


def test_it_is_detected_by_tpus(xla):  # noqa: F811
    assert XLAEnvironment.detect()


def test_it_is_not_detected_without_torch_xla(monkeypatch):
    monkeypatch.setattr("lightning.fabric.plugins.environments.xla.package_available", lambda name: False)
    assert not XLAEnvironment.detect()


def test_address_and_port_may_be_set(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1234")
    assert (XLAEnvironment().main_address, XLAEnvironment().main_port) == ("10.0.0.1", 1234)


def test_on_a_tpu_the_runtime_knows_the_address(xla, monkeypatch):  # noqa: F811
    from torch_xla import runtime

    monkeypatch.setattr(runtime, "device_type", lambda: "TPU")
    monkeypatch.setattr(runtime, "get_master_ip", lambda: "10.0.0.7", raising=False)
    assert XLAEnvironment().main_address == "10.0.0.7"


def test_making_one_imports_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_xla", None)
    XLAEnvironment().teardown()


def test_without_torch_xla_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(imports, "package_available", lambda name: False)
    with pytest.raises(ModuleNotFoundError, match="XLAEnvironment needs.*pip install torch_xla"):
        XLAEnvironment().world_size()


def _facts():
    install()
    environment = XLAEnvironment()
    return environment.world_size(), environment.global_rank(), environment.local_rank(), environment.node_rank()


def test_two_devices():
    assert on_ranks(2, _facts) == [(2, 0, 0, 0), (2, 1, 1, 0)]
