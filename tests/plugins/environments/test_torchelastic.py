import pytest

from lightning.fabric.plugins.environments import TorchElasticEnvironment

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "GROUP_RANK": "2",
    "MASTER_ADDR": "host",
    "MASTER_PORT": "29500",
}
ASK = {
    "RANK": TorchElasticEnvironment.global_rank,
    "WORLD_SIZE": TorchElasticEnvironment.world_size,
    "LOCAL_RANK": TorchElasticEnvironment.local_rank,
    "GROUP_RANK": TorchElasticEnvironment.node_rank,
    "MASTER_ADDR": lambda environment: environment.main_address,
    "MASTER_PORT": lambda environment: environment.main_port,
}


@pytest.fixture(autouse=True)
def _torchrun(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("name", ASK)
def test_each_answer_is_read_from_its_variable(name):
    assert str(ASK[name](TorchElasticEnvironment())) == TORCHRUN[name]


@pytest.mark.parametrize("name", ASK)
def test_a_missing_variable_is_named(monkeypatch, name):
    monkeypatch.delenv(name)
    with pytest.raises(RuntimeError, match=f"TorchElasticEnvironment needs the environment variable {name}"):
        ASK[name](TorchElasticEnvironment())


def test_a_variable_that_is_no_number_is_named(monkeypatch):
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ValueError, match="RANK must be a whole number >= 0, but it is 'first'"):
        TorchElasticEnvironment().global_rank()


def test_the_processes_are_always_started_by_torchrun():
    assert TorchElasticEnvironment().creates_processes_externally


def test_what_torchrun_decided_cannot_be_set():
    environment = TorchElasticEnvironment()
    environment.set_world_size(99)
    environment.set_global_rank(98)
    assert (environment.world_size(), environment.global_rank()) == (8, 5)


def test_detected_by_the_run_id_alone():
    assert TorchElasticEnvironment.detect()
    assert TorchElasticEnvironment.detect({"TORCHELASTIC_RUN_ID": ""})
    assert not TorchElasticEnvironment.detect({"RANK": "0", "WORLD_SIZE": "1"})


def test_settings_must_multiply_to_the_world_size():
    environment = TorchElasticEnvironment()
    environment.validate_settings(num_devices=4, num_nodes=2)
    with pytest.raises(ValueError, match=r"devices=2 and num_nodes=2 ask for 4 process\(es\), .* started 8"):
        environment.validate_settings(num_devices=2, num_nodes=2)
