import socket
import sys

import pytest
from torch.distributed import TCPStore

from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.plugins.environments.lightning import (
    find_free_network_port,
    keep_network_port,
    release_network_port,
)

VARIABLES = ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_without_variables_it_is_one_process_that_meets_on_this_machine():
    environment = LightningEnvironment()
    assert not environment.creates_processes_externally
    assert environment.main_address == "127.0.0.1"
    assert (environment.world_size(), environment.global_rank()) == (1, 0)
    assert (environment.local_rank(), environment.node_rank()) == (0, 0)


def test_variables_are_read(monkeypatch):
    for name, value in {"LOCAL_RANK": "2", "NODE_RANK": "3", "MASTER_ADDR": "host", "MASTER_PORT": "1234"}.items():
        monkeypatch.setenv(name, value)
    environment = LightningEnvironment()
    assert environment.creates_processes_externally
    assert (environment.local_rank(), environment.node_rank()) == (2, 3)
    assert (environment.main_address, environment.main_port) == ("host", 1234)


def test_group_rank_is_the_node_rank_where_node_rank_is_not_set(monkeypatch):
    monkeypatch.setenv("GROUP_RANK", "4")
    assert LightningEnvironment().node_rank() == 4
    monkeypatch.setenv("NODE_RANK", "5")
    assert LightningEnvironment().node_rank() == 5


def test_the_strategy_hands_in_world_size_and_global_rank():
    environment = LightningEnvironment()
    environment.set_world_size(8)
    environment.set_global_rank(5)
    assert (environment.world_size(), environment.global_rank()) == (8, 5)


class TestPort:
    def test_is_free_and_stays_the_same(self):
        environment = LightningEnvironment()
        port = environment.main_port
        assert environment.main_port == port
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", port))
            listener.listen()
        environment.teardown()

    def test_is_forgotten_at_teardown(self, monkeypatch):
        ports = iter([1111, 2222])
        monkeypatch.setattr("lightning.fabric.plugins.environments.lightning.keep_network_port", lambda: next(ports))
        environment = LightningEnvironment()
        assert environment.main_port == 1111
        environment.teardown()
        assert environment.main_port == 2222

    def test_a_taken_port_is_not_given_out(self):
        with socket.socket() as listener:
            listener.bind(("", 0))
            assert find_free_network_port() != listener.getsockname()[1]

    @pytest.mark.skipif(sys.platform != "linux", reason="other systems do not know ports that are kept")
    def test_a_kept_port_is_nobody_elses(self):
        port = keep_network_port()
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("", port))
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        store.set("torch's store", "can listen on it")
        del store
        release_network_port(port)
        release_network_port(port)


@pytest.mark.parametrize(
    ("name", "ask"),
    [
        ("LOCAL_RANK", LightningEnvironment.local_rank),
        ("NODE_RANK", LightningEnvironment.node_rank),
        ("MASTER_PORT", lambda environment: environment.main_port),
    ],
)
@pytest.mark.parametrize("value", ["two", "", "-1", "1.5"])
def test_a_variable_that_is_no_number_is_named(monkeypatch, name, ask, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name} must be a whole number >= 0, but it is '{value}'"):
        ask(LightningEnvironment())


class TestValidateSettings:
    def test_anything_goes_where_this_process_starts_the_others(self, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "7")
        LightningEnvironment().validate_settings(num_devices=2, num_nodes=2)

    def test_agreement_passes(self, monkeypatch):
        for name, value in {"LOCAL_RANK": "1", "NODE_RANK": "1", "WORLD_SIZE": "4"}.items():
            monkeypatch.setenv(name, value)
        LightningEnvironment().validate_settings(num_devices=2, num_nodes=2)

    @pytest.mark.parametrize(("name", "value"), [("WORLD_SIZE", "3"), ("LOCAL_RANK", "2"), ("NODE_RANK", "2")])
    def test_disagreement_names_the_variable(self, monkeypatch, name, value):
        for known, good in {"LOCAL_RANK": "1", "NODE_RANK": "1", "WORLD_SIZE": "4"}.items():
            monkeypatch.setenv(known, good)
        monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=f"devices=2 and num_nodes=2.* {name} is {value}"):
            LightningEnvironment().validate_settings(num_devices=2, num_nodes=2)
