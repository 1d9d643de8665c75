"""The connector puts the parts that a plan names together in a strategy."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning.fabric._plan import Machine
from lightning.fabric.accelerators.accelerator import Accelerator
from lightning.fabric.accelerators.cpu import CPUAccelerator
from lightning.fabric.accelerators.registry import ACCELERATOR_REGISTRY
from lightning.fabric.connector import _Connector, _is_using_cli
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.plugins.precision.amp import MixedPrecision
from lightning.fabric.plugins.precision.deepspeed import DeepSpeedPrecision
from lightning.fabric.plugins.precision.double import DoublePrecision
from lightning.fabric.plugins.precision.half import HalfPrecision
from lightning.fabric.plugins.precision.precision import Precision
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.dp import DataParallelStrategy
from lightning.fabric.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.fabric.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.fabric.strategies.registry import STRATEGY_REGISTRY
from lightning.fabric.strategies.single_device import SingleDeviceStrategy

CPU = torch.device("cpu")


class TwoAccelerator(Accelerator):
    """Somebody else's hardware: it counts in pairs and computes on the CPU."""

    def setup_device(self, device: torch.device) -> None:
        pass

    def teardown(self) -> None:
        pass

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return {"pairs": devices}

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [CPU] * 2 * devices["pairs"]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True


@pytest.fixture
def two() -> Iterator[None]:
    ACCELERATOR_REGISTRY.register("two", TwoAccelerator)
    yield
    ACCELERATOR_REGISTRY.remove("two")


def on_cpu(**arguments: Any) -> Any:
    return _Connector(**{"accelerator": "cpu", **arguments})


class TestStrategy:
    def test_one_device(self) -> None:
        connector = on_cpu()
        assert type(connector.strategy) is SingleDeviceStrategy
        assert connector.strategy.root_device == CPU
        assert connector.strategy.launcher is None
        assert isinstance(connector.accelerator, CPUAccelerator)
        assert connector.cluster_environment is None

    def test_several_devices(self) -> None:
        connector = on_cpu(devices=2, num_nodes=3)
        strategy = connector.strategy
        assert type(strategy) is DDPStrategy
        assert strategy.parallel_devices == [CPU, CPU]
        assert strategy.num_nodes == 3
        assert isinstance(connector.cluster_environment, LightningEnvironment)
        assert strategy.cluster_environment is connector.cluster_environment
        assert isinstance(strategy.launcher, _SubprocessScriptLauncher)

    @pytest.mark.parametrize("start_method", ["spawn", "fork", "forkserver"])
    def test_a_name_sets_the_start_method(self, start_method: str) -> None:
        strategy = on_cpu(strategy=f"ddp_{start_method}", devices=2).strategy
        assert strategy.start_method == start_method
        assert isinstance(strategy.launcher, _MultiProcessingLauncher)

    def test_dp_is_one_process(self) -> None:
        strategy = on_cpu(strategy="dp").strategy
        assert type(strategy) is DataParallelStrategy
        assert strategy.parallel_devices == [CPU]
        assert strategy.launcher is None

    def test_ddp_stays_ddp_on_one_device(self) -> None:
        assert type(on_cpu(strategy="ddp", devices=1).strategy) is DDPStrategy

    def test_a_registered_strategy_is_found_by_its_name(self) -> None:
        class Mine(DDPStrategy):
            pass

        STRATEGY_REGISTRY.register("mine", Mine, start_method="fork", precision=HalfPrecision("16-true"))
        try:
            connector = on_cpu(strategy="mine", devices=2)
            assert type(connector.strategy) is Mine
            assert isinstance(connector.strategy.launcher, _MultiProcessingLauncher)
            assert isinstance(connector.precision, HalfPrecision)
            assert isinstance(on_cpu(strategy="mine", precision="64-true").precision, DoublePrecision)
        finally:
            STRATEGY_REGISTRY.remove("mine")

    def test_an_object_is_used_as_it_is_and_gets_what_it_lacks(self) -> None:
        strategy = DDPStrategy(start_method="fork")
        connector = on_cpu(strategy=strategy, devices=2, precision="64-true")
        assert connector.strategy is strategy
        assert strategy.parallel_devices == [CPU, CPU]
        assert isinstance(strategy.precision, DoublePrecision)
        assert isinstance(strategy.accelerator, CPUAccelerator)
        assert isinstance(strategy.launcher, _MultiProcessingLauncher)

    def test_an_object_keeps_what_it_brings_along(self) -> None:
        accelerator, precision, io, environment = (
            CPUAccelerator(),
            HalfPrecision("bf16-true"),
            TorchCheckpointIO(),
            LightningEnvironment(),
        )
        strategy = DDPStrategy(accelerator, [CPU, CPU, CPU], environment, io, precision)
        connector = _Connector(strategy=strategy)
        assert connector.accelerator is accelerator
        assert connector.precision is precision
        assert connector.checkpoint_io is io
        assert connector.cluster_environment is environment
        assert strategy.num_processes == 3
        assert connector.plan.num_devices == 3

    def test_a_single_device_object_keeps_its_device(self) -> None:
        connector = _Connector(strategy=SingleDeviceStrategy("cpu"))
        assert connector.plan.accelerator.value == "cpu"
        assert connector.strategy.root_device == CPU

    @pytest.mark.parametrize(
        ("arguments", "carried"),
        [
            ({"accelerator": "cpu"}, {"accelerator": CPUAccelerator()}),
            ({"precision": "64-true"}, {"precision": Precision()}),
            ({"plugins": Precision()}, {"precision": Precision()}),
            ({"plugins": [TorchCheckpointIO()]}, {"checkpoint_io": TorchCheckpointIO()}),
            ({"plugins": LightningEnvironment()}, {"cluster_environment": LightningEnvironment()}),
        ],
    )
    def test_what_an_object_brings_along_cannot_be_given_again(
        self, arguments: dict[str, Any], carried: dict[str, Any]
    ) -> None:
        with pytest.raises(ValueError, match=r"is set twice: .*DDPStrategy\(\.\.\.\) says"):
            _Connector(strategy=DDPStrategy(**carried), **arguments)

    def test_an_object_with_devices_of_two_types_is_refused(self) -> None:
        with pytest.raises(ValueError, match="several types: cpu, cuda"):
            _Connector(strategy=DDPStrategy(parallel_devices=[CPU, torch.device("cuda:0")]))

    def test_no_process_group_and_no_cuda_context_is_made(self) -> None:
        on_cpu(devices=2)
        assert not dist.is_initialized()
        assert not torch.cuda.is_initialized()


class TestAccelerator:
    def test_an_object_answers_for_itself(self) -> None:
        accelerator = TwoAccelerator()
        connector = _Connector(accelerator=accelerator, devices=2)
        assert connector.accelerator is accelerator
        assert connector.plan.accelerator.value == "two"
        assert connector.strategy.parallel_devices == [CPU] * 4

    @pytest.mark.usefixtures("two")
    def test_a_registered_one_is_found_by_its_name(self) -> None:
        connector = _Connector(accelerator="two")
        assert isinstance(connector.accelerator, TwoAccelerator)
        assert connector.strategy.parallel_devices == [CPU, CPU]

    @pytest.mark.usefixtures("two")
    def test_a_registered_one_is_not_chosen_unasked(self) -> None:
        assert not isinstance(_Connector().accelerator, TwoAccelerator)

    def test_an_unavailable_one_is_refused(self) -> None:
        class Missing(TwoAccelerator):
            @staticmethod
            def is_available() -> bool:
                return False

        with pytest.raises(RuntimeError, match=r"accelerator=Missing\(\) asks for missing"):
            _Connector(accelerator=Missing())

    def test_it_comes_from_the_strategy(self) -> None:
        accelerator = TwoAccelerator()
        connector = _Connector(strategy=SingleDeviceStrategy("cpu", accelerator=accelerator))
        assert connector.accelerator is accelerator


class TestPrecision:
    @pytest.mark.parametrize(
        ("precision", "cls"),
        [
            (None, Precision),
            ("32-true", Precision),
            (64, DoublePrecision),
            ("bf16-true", HalfPrecision),
            ("bf16-mixed", MixedPrecision),
        ],
    )
    def test_a_name_becomes_a_plugin(self, precision: Any, cls: type) -> None:
        connector = on_cpu(precision=precision)
        assert type(connector.precision) is cls
        assert connector.precision is connector.strategy.precision

    def test_autocast_is_for_the_device_of_the_strategy(self) -> None:
        precision = on_cpu(precision="bf16-mixed").precision
        assert isinstance(precision, MixedPrecision)
        assert precision.device == "cpu"

    def test_sixteen_mixed_on_the_cpu_warns(self) -> None:
        with pytest.warns(UserWarning, match="precision='16-mixed' is not possible on the CPU"):
            connector = on_cpu(precision="16-mixed")
        assert connector.precision.precision == "bf16-mixed"


class TestPlugins:
    def test_each_kind_finds_its_place(self) -> None:
        precision, io, environment = HalfPrecision("bf16-true"), TorchCheckpointIO(), LightningEnvironment()
        connector = on_cpu(devices=2, plugins=[precision, io, environment])
        assert connector.strategy.precision is precision
        assert connector.strategy.checkpoint_io is io
        assert connector.strategy.cluster_environment is environment

    def test_one_alone_needs_no_list(self) -> None:
        io = TorchCheckpointIO()
        assert on_cpu(plugins=io).checkpoint_io is io

    @pytest.mark.parametrize("plugin", ["16-mixed", 3, Precision])
    def test_another_type_is_refused(self, plugin: Any) -> None:
        with pytest.raises(TypeError, match="Precision, ClusterEnvironment or CheckpointIO, but got"):
            on_cpu(plugins=plugin)

    def test_two_of_a_kind_are_refused(self) -> None:
        with pytest.raises(ValueError, match="precision is set twice"):
            on_cpu(plugins=[Precision(), Precision()])

    def test_the_environment_checks_devices_and_nodes(self) -> None:
        class Small(LightningEnvironment):
            def validate_settings(self, num_devices: int, num_nodes: int) -> None:
                raise ValueError(f"no room for {num_devices} x {num_nodes}")

        with pytest.raises(ValueError, match="no room for 2 x 3"):
            on_cpu(devices=2, num_nodes=3, plugins=Small())


class TestOutside:
    def test_the_command_line_fills_in_defaults(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in {"ACCELERATOR": "cpu", "DEVICES": "2", "STRATEGY": "ddp", "PRECISION": "64-true"}.items():
            monkeypatch.setenv(f"LT_{name}", value)
        connector = _Connector()
        assert type(connector.strategy) is DDPStrategy
        assert connector.strategy.num_processes == 2
        assert isinstance(connector.precision, DoublePrecision)

    def test_the_command_line_may_not_contradict(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LT_DEVICES", "2")
        with pytest.raises(ValueError, match="devices is set twice: devices=3 says 3, LT_DEVICES says 2"):
            on_cpu(devices=3)

    def test_torchrun_is_followed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        launcher = {"TORCHELASTIC_RUN_ID": "1", "RANK": "3", "LOCAL_RANK": "1", "GROUP_RANK": "1"}
        for name, value in {**launcher, "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        strategy = on_cpu().strategy
        assert isinstance(strategy, DDPStrategy)
        assert isinstance(strategy.cluster_environment, TorchElasticEnvironment)
        assert (strategy.num_processes, strategy.num_nodes) == (2, 2)

    @pytest.mark.parametrize(("value", "expected"), [("1", True), ("0", False), ("", False), (None, False)])
    def test_is_using_cli(self, monkeypatch: pytest.MonkeyPatch, value: str | None, expected: bool) -> None:
        monkeypatch.delenv("LT_CLI_USED", raising=False)
        if value is not None:
            monkeypatch.setenv("LT_CLI_USED", value)
        assert _is_using_cli() is expected


class TestMachineHere:
    def test_it_sees_what_torch_sees(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LT_DEVICES", "7")
        machine = Machine.here()
        assert machine.cuda == torch.cuda.device_count()
        assert machine.env["LT_DEVICES"] == "7"
        assert not machine.notebook
        assert machine.available()[-1] == "cpu"
        assert not torch.cuda.is_initialized()

    def test_variables_are_copied(self, monkeypatch: pytest.MonkeyPatch) -> None:
        machine = Machine.here()
        monkeypatch.setenv("LT_DEVICES", "7")
        assert "LT_DEVICES" not in machine.env

    @pytest.mark.usefixtures("two")
    def test_it_knows_registered_accelerators(self) -> None:
        assert "two" in Machine.here().available()


@pytest.mark.parametrize("strategy", ["single_device", "ddp", "dp"])
def test_a_precision_that_needs_an_engine_is_refused_elsewhere(strategy):
    with pytest.raises(ValueError, match="leaves the work to deepspeed.*precision='bf16-mixed'"):
        _Connector(accelerator="cpu", strategy=strategy, devices=1, plugins=DeepSpeedPrecision("bf16-mixed"))
