"""Names stand for strategies; the facts in the table are those of the classes."""

import subprocess
import sys
from typing import Any

import pytest

from lightning.fabric.strategies._table import STRATEGIES
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.parallel import ParallelStrategy
from lightning.fabric.strategies.registry import STRATEGY_REGISTRY, _StrategyRegistry, entry_of
from lightning.fabric.strategies.single_device import SingleDeviceStrategy
from lightning.fabric.strategies.strategy import Strategy
from lightning.fabric.utilities.exceptions import MisconfigurationException


@pytest.fixture
def registry() -> _StrategyRegistry:
    return _StrategyRegistry(STRATEGIES)


class TestBuiltIn:
    def test_the_names(self) -> None:
        ddp = ["ddp", "ddp_fork", "ddp_forkserver", "ddp_notebook", "ddp_spawn"]
        unused = [f"{name}_find_unused_parameters_true" for name in ddp]
        zero = [f"deepspeed_stage_{stage}" for stage in ("1", "2", "3", "1_offload", "2_offload", "3_offload")]
        sharded = ["fsdp", "fsdp_cpu_offload", "deepspeed", *zero, "deepspeed_stage_3_offload_nvme"]
        others = ["dp", "single_device", "xla", "xla_fsdp", "single_xla"]
        assert STRATEGY_REGISTRY.available_strategies() == sorted([*others, *sharded, *ddp, *unused])

    @pytest.mark.parametrize("name", STRATEGIES)
    def test_the_table_agrees_with_the_class(self, name: str) -> None:
        entry, strategy = STRATEGY_REGISTRY.entry(name), STRATEGY_REGISTRY.get(name)
        assert f"{type(strategy).__module__}:{type(strategy).__qualname__}" == entry.target
        assert strategy.runs_on == entry.runs_on
        assert strategy.start_method == entry.start_method
        assert isinstance(strategy, ParallelStrategy) == entry.many_devices
        assert entry.description

    @pytest.mark.parametrize("name", [name for name in STRATEGIES if name.startswith("ddp")])
    def test_ddp_may_leave_parameters_unused_if_its_name_says_so(self, name: str) -> None:
        strategy = STRATEGY_REGISTRY.get(name)
        assert strategy._ddp.options.get("find_unused_parameters", False) == name.endswith("_parameters_true")

    def test_each_get_makes_a_new_strategy(self) -> None:
        assert STRATEGY_REGISTRY.get("ddp") is not STRATEGY_REGISTRY.get("ddp")

    def test_the_names_are_known_without_torch(self) -> None:
        code = (
            "import sys; from lightning.fabric.strategies.registry import STRATEGY_REGISTRY\n"
            "STRATEGY_REGISTRY.available_strategies(); sys.exit('torch' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestRegister:
    def test_get_passes_the_registered_arguments(self, registry: _StrategyRegistry) -> None:
        registry.register("quick", DDPStrategy, description="for tests", start_method="fork", bucket_cap_mb=1)
        assert "quick" in registry
        assert "quick" in registry.available_strategies()
        strategy = registry.get("quick")
        assert strategy.start_method == "fork"
        assert strategy._ddp.options["bucket_cap_mb"] == 1
        assert registry.entry("quick").description == "for tests"

    def test_as_a_decorator(self, registry: _StrategyRegistry) -> None:
        @registry.register("mine")
        class Mine(SingleDeviceStrategy):
            pass

        assert type(registry.get("mine")) is Mine

    def test_a_taken_name_needs_override(self, registry: _StrategyRegistry) -> None:
        with pytest.raises(MisconfigurationException, match="'ddp' is already registered.*override=True"):
            registry.register("ddp", SingleDeviceStrategy)
        registry.register("ddp", SingleDeviceStrategy, override=True)
        assert isinstance(registry.get("ddp"), SingleDeviceStrategy)

    def test_the_name_must_be_a_string(self, registry: _StrategyRegistry) -> None:
        with pytest.raises(TypeError, match="must be a string, but got 3"):
            registry.register(3, DDPStrategy)  # type: ignore[arg-type]

    def test_remove_forgets(self, registry: _StrategyRegistry) -> None:
        count = len(registry)
        registry.remove("dp")
        assert "dp" not in registry
        assert len(registry) == count - 1
        assert "dp" in STRATEGY_REGISTRY

    @pytest.mark.parametrize("verb", ["get", "entry", "remove"])
    def test_an_unknown_name_raises_with_the_list(self, registry: _StrategyRegistry, verb: str) -> None:
        with pytest.raises(KeyError, match=r"Unknown strategy 'dpp'.*ddp, .*single_device"):
            getattr(registry, verb)("dpp")

    def test_a_class_may_register_itself(self, registry: _StrategyRegistry) -> None:
        class Mine(DDPStrategy):
            @classmethod
            def register_strategies(cls, strategy_registry: Any) -> None:
                strategy_registry.register("mine", cls, description=cls.__name__)

        Mine.register_strategies(registry)
        assert isinstance(registry.get("mine"), Mine)


class TestFactsOfAClass:
    def test_a_subclass_has_those_of_its_base(self) -> None:
        class Mine(DDPStrategy):
            pass

        entry = entry_of(Mine)
        assert (entry.target, entry.start_method, entry.multi_process) == (Mine, "popen", True)
        assert entry.runs_on == {"cpu", "cuda"}
        assert entry.kwargs == {}

    def test_a_registered_start_method_wins(self) -> None:
        assert entry_of(DDPStrategy, kwargs={"start_method": "spawn"}).start_method == "spawn"

    def test_a_subclass_may_run_elsewhere(self) -> None:
        class Mine(DDPStrategy):
            runs_on = frozenset({"mps"})

        assert entry_of(Mine).runs_on == {"mps"}

    def test_one_device_stays_one_device(self) -> None:
        class Mine(SingleDeviceStrategy):
            pass

        assert not entry_of(Mine).many_devices
        assert not entry_of(Mine).multi_process

    def test_nothing_is_forbidden_of_what_is_not_known(self) -> None:
        class Mine(Strategy):
            pass

        for unknown in (Mine, lambda: None):
            entry = entry_of(unknown)
            assert (entry.runs_on, entry.start_method) == (None, None)
            assert entry.many_devices
            assert entry.multi_process
