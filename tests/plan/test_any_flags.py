"""Whatever the flags and the machine: a complete plan, or one of the errors that users are promised."""

import pickle
import re
import subprocess
import sys
import warnings
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from lightning.fabric._plan import Flags, Machine, Plan, resolve
from lightning.fabric.plugins.precision._table import PRECISIONS
from lightning.fabric.strategies.registry import STRATEGY_REGISTRY
from lightning.fabric.utilities.exceptions import MisconfigurationException

_anything = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 5), st.floats(), st.text(), st.lists(st.integers(-2, 5)), st.just(object)
)
_sensible = {
    "accelerator": st.sampled_from(["auto", "auto", "cpu", "cuda", "gpu", "mps"]),
    "strategy": st.sampled_from(["auto", "auto", *STRATEGY_REGISTRY.available_strategies()]),
    "devices": st.sampled_from(["auto", "auto", 1, 2, "2", "0,1", "-1", "1,"]),
    "num_nodes": st.sampled_from([1, 1, 2]),
    "precision": st.sampled_from([None, 16, 32, *PRECISIONS]),
}
flags_to_honour = st.builds(Flags, **_sensible)
any_flags = flags_to_honour | st.builds(Flags, **{name: some | _anything for name, some in _sensible.items()})

_variables = {
    "LT_CLI_USED": st.sampled_from(["0", "1", ""]),
    "LT_ACCELERATOR": st.sampled_from(["cpu", "gpu", "?"]),
    "LT_STRATEGY": st.sampled_from(["ddp", "dp", "?"]),
    "LT_DEVICES": st.sampled_from(["1", "2", "0,1", "auto", "x", ""]),
    "LT_NUM_NODES": st.sampled_from(["1", "2", "-1", "x", "²"]),
    "LT_PRECISION": st.sampled_from(["16-mixed", "32", "?"]),
    "LOCAL_RANK": st.sampled_from(["0", "1"]),
    "LOCAL_WORLD_SIZE": st.sampled_from(["0", "1", "2", "x"]),
    "WORLD_SIZE": st.sampled_from(["1", "2", "4", "x"]),
    "TORCHELASTIC_RUN_ID": st.just("none"),
    "PL_DISABLE_FORK": st.sampled_from(["0", "1", "yes"]),
}
_no_variables: dict[str, str] = {}
machines = st.builds(
    Machine,
    cuda=st.sampled_from([0, 1, 2, 4, 4]),
    mps=st.sampled_from([False, False, False, True]),
    tpu=st.sampled_from([0, 0, 0, 8]),
    env=st.just(_no_variables) | st.fixed_dictionaries({}, optional=_variables),
    notebook=st.sampled_from([False, False, True]),
    fork=st.sampled_from([True, True, False]),
)


def _resolve(flags: Flags, machine: Machine) -> Plan | Exception:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the nudge to a longer precision
            return resolve(flags, machine)
    except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
        return error


def _check_is_complete(plan: Plan) -> None:
    assert plan.num_devices >= plan.num_processes >= 1
    assert plan.num_nodes.value >= 1
    assert len(str(plan).splitlines()) == 6 + len(plan.warnings)
    assert pickle.loads(pickle.dumps(plan)) == plan


@given(any_flags, machines)
def test_any_flags_give_a_complete_plan_or_a_promised_error(flags: Flags, machine: Machine) -> None:
    plan = _resolve(flags, machine)
    if not isinstance(plan, Exception):
        _check_is_complete(plan)


@given(flags_to_honour, st.integers(2, 4), st.booleans())
def test_sensible_flags_give_a_complete_plan_or_an_error_that_names_one(
    flags: Flags, cuda: int, notebook: bool
) -> None:
    plan = _resolve(flags, Machine(cuda=cuda, notebook=notebook))
    if isinstance(plan, Exception):
        assert re.search("(accelerator|strategy|devices|num_nodes|precision)=", str(plan))
    else:
        _check_is_complete(plan)


@given(st.sampled_from(["cpu", "cuda"]), st.integers(1, 4), st.sampled_from(["ddp", "ddp_fork"]))
def test_a_value_from_outside_means_what_it_means_as_an_argument(accelerator: str, count: int, strategy: str) -> None:
    inside = resolve(Flags(accelerator=accelerator, devices=count, strategy=strategy), Machine(cuda=4))
    env = {"LT_ACCELERATOR": accelerator, "LT_DEVICES": str(count), "LT_STRATEGY": strategy}
    outside = resolve(Flags(), Machine(cuda=4, env=env))

    def values(plan: Plan) -> list[Any]:
        return [plan.accelerator.value, plan.devices.value, plan.strategy.value]

    assert values(inside) == values(outside)


def test_resolving_needs_no_torch() -> None:
    code = (
        "import sys; from lightning.fabric._plan import Flags, Machine, resolve\n"
        "resolve(Flags(devices=2), Machine(cuda=2)); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
