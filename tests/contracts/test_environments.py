"""What every cluster environment promises, checked over all that the library knows and a foreign one."""

import pickle

import pytest

from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.fabric.plugins.environments._detection import DETECTION_ORDER, ENVIRONMENTS, build_environment

LAUNCHED = {  # what the launchers of all environments set for rank 1 of 2, on one machine
    "LOCAL_RANK": "1",
    "RANK": "1",
    "GROUP_RANK": "0",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29501",
}


class FixedEnvironment(ClusterEnvironment):
    """The smallest environment that somebody else could write."""

    creates_processes_externally = True
    main_address = "127.0.0.1"
    main_port = 29501

    @staticmethod
    def detect():
        return False

    def world_size(self):
        return 2

    def set_world_size(self, size):
        pass

    def global_rank(self):
        return 1

    def set_global_rank(self, rank):
        pass

    def local_rank(self):
        return 1

    def node_rank(self):
        return 0


# XLA's processes are never started from outside: tests/plugins/environments/test_xla.py
@pytest.fixture(params=[*(name for name in ENVIRONMENTS if name != "xla"), "foreign"])
def environment(request, monkeypatch):
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    made = FixedEnvironment() if request.param == "foreign" else build_environment(request.param)
    made.set_world_size(2)
    made.set_global_rank(1)
    return made


def test_is_a_cluster_environment(environment):
    assert isinstance(environment, ClusterEnvironment)


def test_answers_have_their_types(environment):
    assert environment.creates_processes_externally is True
    assert environment.main_address == "127.0.0.1"
    assert environment.main_port == 29501
    ranks = (environment.global_rank(), environment.local_rank(), environment.node_rank())
    assert ranks == (1, 1, 0)
    assert environment.world_size() == 2


def test_settings_that_fit_the_launch_pass(environment):
    environment.validate_settings(num_devices=2, num_nodes=1)


def test_the_answers_survive_teardown_and_pickling(environment):
    environment.teardown()
    environment.teardown()
    again = pickle.loads(pickle.dumps(environment))
    assert (again.global_rank(), again.world_size(), again.main_port) == (1, 2, 29501)


def test_detect_answers_yes_or_no(environment):
    assert environment.detect() in (True, False)


def test_detection_tries_only_known_environments():
    assert {name for name, _ in DETECTION_ORDER} <= set(ENVIRONMENTS)


@pytest.mark.parametrize("name", [name for name in ENVIRONMENTS if name != "xla"])
def test_settings_that_do_not_fit_the_launch_are_refused(name, monkeypatch):
    for variable, value in LAUNCHED.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match="devices=3"):
        build_environment(name).validate_settings(num_devices=3, num_nodes=1)
