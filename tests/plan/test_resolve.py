"""Flags and a machine, written by hand, give a plan: the table of what is decided, and of what is refused."""

import pickle
from typing import Any

import pytest

from lightning.fabric._plan import Flags, Hardware, Machine, Part, Plan, StrategyObject, resolve
from lightning.fabric.strategies.registry import STRATEGY_REGISTRY
from lightning.fabric.utilities.exceptions import MisconfigurationException

NPU = Hardware("npu", available=lambda: True, count=lambda: 3, parse=int, spread=range, label="NPU()")
NO_NPU = Hardware("npu", available=lambda: False, count=lambda: 0, parse=int, spread=range)

CPU = Machine()
GPU1 = Machine(cuda=1)
GPU4 = Machine(cuda=4)
MAC = Machine(mps=True)
TPU = Machine(tpu=8)
WITH_NPU = Machine(others={"npu": NPU})
NOTEBOOK = Machine(notebook=True)
NOTEBOOK_GPU4 = Machine(cuda=4, notebook=True)
NO_FORK = Machine(fork=False)


def fabric_run(**outside: str) -> Machine:
    return Machine(cuda=4, env={"LT_CLI_USED": "1", **{f"LT_{k.upper()}": v for k, v in outside.items()}})


def torchrun(per_node: int, nodes: int = 1, cuda: int = 0, **env: str) -> Machine:
    launcher = {
        "TORCHELASTIC_RUN_ID": "1",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": str(per_node),
        "WORLD_SIZE": str(per_node * nodes),
    }
    return Machine(cuda=cuda, env={**launcher, **env})


def strategy_object(name: str, **carried: Any) -> StrategyObject:
    return StrategyObject(f"<{name}>", STRATEGY_REGISTRY.entry(name), **carried)


PRECISION = Part("HalfPrecision", "precision")
ENVIRONMENT = Part("MyCluster", "cluster environment")
IO = Part("MyIO", "checkpoint IO")
CPU_OBJECT = Hardware("cpu", available=lambda: True, count=lambda: 1, parse=int, spread=range, label="CPUAccelerator()")


def plan(machine: Machine, **flags: Any) -> Plan:
    return resolve(Flags(**flags), machine)


# Each row: machine, flags, what is decided
DECIDED = [
    # accelerator
    (CPU, {}, {"accelerator": "cpu", "devices": 1, "strategy": "single_device"}),
    (GPU1, {}, {"accelerator": "cuda", "devices": (0,), "strategy": "single_device"}),
    (GPU4, {}, {"accelerator": "cuda", "devices": (0, 1, 2, 3), "strategy": "ddp"}),
    (MAC, {}, {"accelerator": "mps", "devices": (0,), "strategy": "single_device"}),
    (Machine(mps=True, cuda=2), {}, {"accelerator": "mps"}),
    (WITH_NPU, {}, {"accelerator": "cpu"}),
    (GPU4, {"accelerator": None, "strategy": None, "devices": None}, {"accelerator": "cuda", "devices": (0, 1, 2, 3)}),
    (GPU4, {"accelerator": "cpu"}, {"accelerator": "cpu", "devices": 1, "strategy": "single_device"}),
    (GPU4, {"accelerator": "gpu"}, {"accelerator": "cuda"}),
    (MAC, {"accelerator": "gpu"}, {"accelerator": "mps"}),
    (Machine(mps=True, cuda=2), {"accelerator": "cuda"}, {"accelerator": "cuda", "devices": (0, 1)}),
    (WITH_NPU, {"accelerator": "npu"}, {"accelerator": "npu", "devices": 3, "strategy": "ddp"}),
    (CPU, {"accelerator": NPU, "devices": 2}, {"accelerator": "npu", "devices": 2, "strategy": "ddp"}),
    (CPU, {"accelerator": CPU_OBJECT, "devices": 2}, {"accelerator": "cpu", "strategy": "ddp"}),
    # devices
    (CPU, {"devices": 3}, {"devices": 3, "strategy": "ddp"}),
    (CPU, {"devices": "3"}, {"devices": 3, "strategy": "ddp"}),
    (CPU, {"devices": "auto"}, {"devices": 1}),
    (GPU4, {"devices": 3}, {"devices": (0, 1, 2)}),
    (GPU4, {"devices": "3"}, {"devices": (0, 1, 2)}),
    (GPU4, {"devices": "3,"}, {"devices": (3,), "strategy": "single_device"}),
    (GPU4, {"devices": [1, 3]}, {"devices": (1, 3)}),
    (GPU4, {"devices": "1, 3"}, {"devices": (1, 3)}),
    (GPU4, {"devices": [0]}, {"devices": (0,), "strategy": "single_device"}),
    (GPU4, {"devices": -1}, {"devices": (0, 1, 2, 3)}),
    (GPU4, {"devices": "-1"}, {"devices": (0, 1, 2, 3)}),
    (GPU4, {"devices": [-1]}, {"devices": (0, 1, 2, 3)}),
    (MAC, {"devices": 1}, {"devices": (0,)}),
    (MAC, {"devices": "0,"}, {"devices": (0,)}),
    # strategy
    (CPU, {"num_nodes": 2}, {"strategy": "ddp", "num_nodes": 2}),
    (CPU, {"strategy": "ddp"}, {"strategy": "ddp", "devices": 1}),
    (CPU, {"strategy": "ddp_spawn", "devices": 2}, {"strategy": "ddp_spawn"}),
    (CPU, {"strategy": "ddp_fork_find_unused_parameters_true", "devices": 2}, {"devices": 2}),
    (CPU, {"strategy": "dp"}, {"strategy": "dp", "devices": 1}),
    (GPU4, {"strategy": "dp"}, {"strategy": "dp", "devices": (0, 1, 2, 3)}),
    (GPU4, {"strategy": "dp", "devices": 2}, {"strategy": "dp", "devices": (0, 1)}),
    (MAC, {"strategy": "single_device"}, {"strategy": "single_device"}),
    (CPU, {"strategy": "fsdp", "devices": 2}, {"strategy": "fsdp", "accelerator": "cpu", "devices": 2}),
    (GPU4, {"strategy": "fsdp", "num_nodes": 2}, {"strategy": "fsdp", "devices": (0, 1, 2, 3)}),
    (CPU, {"strategy": "deepspeed_stage_3", "devices": 2}, {"accelerator": "cpu", "devices": 2}),
    (TPU, {}, {"strategy": "xla", "accelerator": "tpu", "devices": 8, "environment": "xla"}),
    (TPU, {"devices": 1}, {"strategy": "single_xla", "devices": 1}),
    (TPU, {"strategy": "xla_fsdp"}, {"strategy": "xla_fsdp", "environment": "xla"}),
    (Machine(tpu=8, notebook=True), {}, {"strategy": "xla"}),
    (NOTEBOOK, {}, {"strategy": "single_device"}),
    (NOTEBOOK_GPU4, {}, {"strategy": "ddp_notebook"}),
    (NOTEBOOK, {"devices": 2}, {"strategy": "ddp_notebook"}),
    (NOTEBOOK, {"devices": 2, "strategy": "ddp_fork"}, {"strategy": "ddp_fork"}),
    (NOTEBOOK, {"devices": 1, "strategy": "ddp"}, {"strategy": "ddp"}),
    (NO_FORK, {"devices": 2, "strategy": "ddp_spawn"}, {"strategy": "ddp_spawn"}),
    (NO_FORK, {"devices": 2}, {"strategy": "ddp"}),
    (Machine(env={"PL_DISABLE_FORK": "0"}), {"strategy": "ddp_fork"}, {"strategy": "ddp_fork"}),
    (Machine(env={"PL_DISABLE_FORK": "1"}), {"strategy": "ddp_forkserver"}, {"strategy": "ddp_forkserver"}),
    # precision
    (CPU, {}, {"precision": "32-true"}),
    (CPU, {"precision": 32}, {"precision": "32-true"}),
    (CPU, {"precision": "64"}, {"precision": "64-true"}),
    (CPU, {"precision": "bf16-mixed"}, {"precision": "bf16-mixed"}),
    (CPU, {"precision": "16-true"}, {"precision": "16-true"}),
    (CPU, {"precision": "16-mixed"}, {"precision": "bf16-mixed"}),
    (GPU1, {"precision": "16-mixed"}, {"precision": "16-mixed"}),
    (GPU1, {"plugins": (PRECISION,)}, {"precision": "HalfPrecision"}),
    (GPU1, {"strategy": "fsdp", "precision": "64-true"}, {"precision": "64-true"}),
    (GPU1, {"strategy": "deepspeed", "precision": "16-mixed"}, {"precision": "16-mixed"}),
    (TPU, {"precision": "bf16-true"}, {"precision": "bf16-true"}),
    # the command line
    (fabric_run(devices="2"), {}, {"devices": (0, 1), "strategy": "ddp"}),
    (fabric_run(devices="2"), {"devices": 2}, {"devices": (0, 1)}),
    (fabric_run(devices="0,1"), {"devices": [0, 1]}, {"devices": (0, 1)}),
    (fabric_run(devices="auto"), {}, {"devices": (0, 1, 2, 3)}),
    (fabric_run(accelerator="cpu", devices="2"), {}, {"accelerator": "cpu", "devices": 2}),
    (fabric_run(accelerator="gpu"), {"accelerator": "cuda"}, {"accelerator": "cuda"}),
    (fabric_run(strategy="dp"), {}, {"strategy": "dp"}),
    (fabric_run(strategy="ddp"), {"strategy": "ddp"}, {"strategy": "ddp"}),
    (fabric_run(num_nodes="2"), {}, {"num_nodes": 2}),
    (fabric_run(num_nodes="2"), {"num_nodes": 2}, {"num_nodes": 2}),
    (fabric_run(precision="bf16-true"), {}, {"precision": "bf16-true"}),
    (fabric_run(precision="64"), {"precision": "64-true"}, {"precision": "64-true"}),
    (Machine(others={"npu": NPU}, env={"LT_ACCELERATOR": "npu"}), {"accelerator": "npu"}, {"accelerator": "npu"}),
    # torchrun
    (torchrun(1), {}, {"environment": "torchelastic", "strategy": "single_device"}),
    (torchrun(2), {}, {"environment": "torchelastic", "devices": 2, "strategy": "ddp", "num_nodes": 1}),
    (torchrun(2, nodes=3), {}, {"devices": 2, "num_nodes": 3, "strategy": "ddp"}),
    (torchrun(2, nodes=3), {"devices": 2, "num_nodes": 3}, {"num_nodes": 3}),
    (torchrun(2, nodes=3), {"devices": 2}, {"num_nodes": 3}),
    (torchrun(2, cuda=4), {}, {"devices": (0, 1)}),
    (torchrun(1, cuda=4), {"strategy": "dp", "devices": 4}, {"strategy": "dp", "devices": (0, 1, 2, 3)}),
    (torchrun(2, LT_DEVICES="2", LT_NUM_NODES="1"), {}, {"devices": 2, "num_nodes": 1}),
    (Machine(notebook=True, env={"LOCAL_RANK": "0"}), {"devices": 2}, {"strategy": "ddp"}),
    (Machine(env={"LOCAL_WORLD_SIZE": "8"}), {}, {"devices": 1, "environment": "lightning"}),
    # strategy objects
    (GPU4, {"strategy": strategy_object("ddp")}, {"strategy": "<ddp>", "devices": (0, 1, 2, 3)}),
    (GPU4, {"strategy": strategy_object("ddp", accelerator=CPU_OBJECT)}, {"accelerator": "cpu"}),
    (
        GPU4,
        {"strategy": strategy_object("ddp", devices=("cuda:1", "cuda:2"))},
        {"accelerator": "cuda", "devices": ("cuda:1", "cuda:2")},
    ),
    (GPU4, {"strategy": strategy_object("ddp", devices=("cpu", "cpu")), "devices": 2}, {"accelerator": "cpu"}),
    (GPU4, {"strategy": strategy_object("single_device", devices=("cuda:3",))}, {"accelerator": "cuda"}),
    (GPU4, {"strategy": strategy_object("single_device", devices=("cpu",))}, {"accelerator": "cpu"}),
    (CPU, {"strategy": strategy_object("ddp", devices=("cpu",), accelerator=NPU)}, {"accelerator": "npu"}),
    (CPU, {"strategy": strategy_object("ddp", parts=(PRECISION,))}, {"precision": "HalfPrecision"}),
    (CPU, {"strategy": strategy_object("ddp", parts=(ENVIRONMENT,))}, {"environment": "MyCluster"}),
    (torchrun(2), {"plugins": (ENVIRONMENT, IO), "devices": 4}, {"environment": "MyCluster", "devices": 4}),
]

# Each row: machine, flags, error, words of its message
REFUSED = [
    # accelerator
    (CPU, {"accelerator": "cdua"}, ValueError, "Unknown accelerator 'cdua'. Did you mean 'cuda'. Known: auto, cpu,"),
    (WITH_NPU, {"accelerator": "?"}, ValueError, "npu"),
    (CPU, {"accelerator": 1}, TypeError, "`accelerator` must be a name or an Accelerator object, but got 1"),
    (CPU, {"accelerator": "cuda"}, RuntimeError, "accelerator='cuda'.* does not have. It has: 'cpu'"),
    (GPU4, {"accelerator": "mps"}, RuntimeError, "It has: 'cuda', 'cpu'"),
    (GPU4, {"accelerator": "tpu"}, RuntimeError, "It has: 'cuda', 'cpu'"),
    (CPU, {"accelerator": "gpu"}, RuntimeError, "accelerator='gpu' needs a GPU"),
    (CPU, {"accelerator": NO_NPU}, RuntimeError, "asks for npu, which this machine does not have"),
    (GPU4, {"accelerator": "cuda", "strategy": "xla"}, ValueError, "cannot run on accelerator='cuda'"),
    (MAC, {"strategy": "fsdp"}, ValueError, "strategy='fsdp' cannot run on accelerator='mps'"),
    (TPU, {"strategy": "single_xla"}, ValueError, "strategy='single_xla' uses one device, but 8 were asked for"),
    (NOTEBOOK, {"strategy": "fsdp", "devices": 2}, RuntimeError, "Use strategy='ddp_notebook'"),
    # precision and strategy
    (GPU1, {"strategy": "deepspeed", "precision": 64}, ValueError, "deepspeed' cannot compute in precision='64-true'"),
    (GPU1, {"strategy": "fsdp", "precision": "transformer-engine"}, ValueError, "It can in: '64-true', '32-true',"),
    (TPU, {"precision": "bf16-mixed"}, ValueError, "It can in: '32-true', '16-true', 'bf16-true'"),
    # devices
    (CPU, {"devices": 0}, ValueError, "at least one device, but got devices=0"),
    (GPU4, {"devices": 0}, ValueError, "devices=0"),
    (GPU4, {"devices": "0"}, ValueError, "devices='0'"),
    (GPU4, {"devices": []}, ValueError, r"devices=\[\]"),
    (CPU, {"devices": []}, ValueError, r"devices=\[\]"),
    (CPU, {"devices": [0]}, TypeError, "devices"),
    (CPU, {"devices": [0, 1]}, TypeError, "devices"),
    (CPU, {"devices": -1}, ValueError, "devices=-1"),
    (CPU, {"devices": True}, TypeError, "True"),
    (GPU4, {"devices": False}, TypeError, "False"),
    (GPU4, {"devices": 1.0}, TypeError, "1.0"),
    (GPU4, {"devices": [0, "1"]}, (TypeError, MisconfigurationException), "devices"),
    (GPU4, {"devices": 5}, MisconfigurationException, "devices=5 asks for more than the 4 CUDA"),
    (GPU4, {"devices": [4]}, MisconfigurationException, "4"),
    (GPU4, {"devices": [1, 1]}, MisconfigurationException, "twice"),
    (GPU4, {"devices": "many"}, MisconfigurationException, "many"),
    (MAC, {"devices": 2}, MisconfigurationException, "devices=2"),
    (MAC, {"devices": [1]}, MisconfigurationException, "1"),
    # nodes
    (CPU, {"num_nodes": 0}, ValueError, "num_nodes=0"),
    (CPU, {"num_nodes": -1}, ValueError, "num_nodes=-1"),
    (CPU, {"num_nodes": True}, TypeError, "True"),
    (CPU, {"num_nodes": "2"}, TypeError, "'2'"),
    (GPU4, {"num_nodes": 2, "strategy": "dp"}, ValueError, "strategy='dp' is one process, .* num_nodes=2"),
    (CPU, {"num_nodes": 2, "strategy": "single_device"}, ValueError, "Use strategy='ddp'"),
    # strategy
    (CPU, {"strategy": "dpp"}, ValueError, "Unknown strategy 'dpp'. Did you mean 'd.*p'. Known: ddp, ddp_find"),
    (CPU, {"strategy": 5}, TypeError, "`strategy` must be a name or a Strategy object, but got 5"),
    (
        MAC,
        {"strategy": "ddp"},
        ValueError,
        "strategy='ddp' cannot run on accelerator='mps'. Use strategy='single_device'",
    ),
    (MAC, {"strategy": "ddp_spawn"}, ValueError, "'mps'"),
    (MAC, {"strategy": "dp"}, ValueError, "'mps'"),
    (MAC, {"strategy": strategy_object("ddp")}, ValueError, "strategy=<ddp> cannot run on accelerator='mps'"),
    (MAC, {"num_nodes": 2}, ValueError, "strategy='ddp' cannot run on accelerator='mps'"),
    (CPU, {"strategy": "dp", "devices": 2}, ValueError, "strategy='dp' splits .* on the CPU .* Use strategy='ddp'"),
    (GPU4, {"strategy": "single_device"}, ValueError, "uses one device, but 4 were asked for"),
    (CPU, {"strategy": "single_device", "devices": 2}, ValueError, "uses one device, but 2 were asked for"),
    (
        NOTEBOOK,
        {"strategy": "ddp", "devices": 2},
        RuntimeError,
        "strategy='ddp' .*notebook.* Use strategy='ddp_notebook'",
    ),
    (NOTEBOOK, {"strategy": "ddp_spawn", "devices": 2}, RuntimeError, "Use strategy='ddp_notebook'"),
    (NOTEBOOK_GPU4, {"strategy": strategy_object("ddp")}, RuntimeError, "cannot start 4 processes from a notebook"),
    (NO_FORK, {"strategy": "ddp_fork"}, ValueError, "strategy='ddp_fork' needs .* forked"),
    (NO_FORK, {"strategy": "ddp_forkserver"}, ValueError, "forked"),
    (NO_FORK, {"strategy": "ddp_notebook_find_unused_parameters_true"}, ValueError, "forked"),
    (Machine(fork=False, notebook=True), {"devices": 2}, ValueError, "forked"),
    (Machine(env={"PL_DISABLE_FORK": "1"}), {"strategy": "ddp_fork"}, ValueError, "PL_DISABLE_FORK"),
    (fabric_run(), {"strategy": "ddp_spawn"}, RuntimeError, "`fabric run`.* has started them"),
    (fabric_run(), {"strategy": "ddp_notebook"}, RuntimeError, "`fabric run`"),
    (torchrun(2), {"strategy": "ddp_fork"}, RuntimeError, "torchrun"),
    # precision
    (CPU, {"precision": "16-mix"}, ValueError, "Unknown precision '16-mix'. Did you mean '16-mixed'"),
    (CPU, {"precision": 8}, ValueError, "8"),
    (MAC, {"precision": "64-true"}, ValueError, "precision='64-true' needs 64-bit floats"),
    (
        GPU1,
        {"precision": "16-true", "plugins": (PRECISION,)},
        ValueError,
        "precision is set twice: precision='16-true'",
    ),
    # plugins
    (CPU, {"plugins": (Part("'io'"),)}, TypeError, "Precision, ClusterEnvironment or CheckpointIO, but got 'io'"),
    (CPU, {"plugins": (PRECISION, Part("Other", "precision"))}, ValueError, "precision is set twice"),
    (CPU, {"plugins": (IO, Part("MyIO", "checkpoint IO"))}, ValueError, "checkpoint IO is set twice"),
    (CPU, {"plugins": (ENVIRONMENT, Part("E", "cluster environment"))}, ValueError, "environment is set twice"),
    # strategy objects
    (
        CPU,
        {"accelerator": "cpu", "strategy": strategy_object("ddp", accelerator=CPU_OBJECT)},
        ValueError,
        r"accelerator is set twice: accelerator='cpu' says 'cpu', strategy=<ddp> says CPUAccelerator\(\)",
    ),
    (
        CPU,
        {"precision": 32, "strategy": strategy_object("ddp", parts=(PRECISION,))},
        ValueError,
        "precision is set twice",
    ),
    (CPU, {"plugins": (IO,), "strategy": strategy_object("ddp", parts=(Part("IO", IO.kind),))}, ValueError, "<ddp>"),
    (
        CPU,
        {"plugins": (ENVIRONMENT,), "strategy": strategy_object("ddp", parts=(Part("E", ENVIRONMENT.kind),))},
        ValueError,
        "cluster environment is set twice",
    ),
    (CPU, {"strategy": strategy_object("ddp", devices=("cpu", "cuda:0"))}, ValueError, "several types: cpu, cuda"),
    (
        GPU4,
        {"accelerator": "cuda", "strategy": strategy_object("ddp", devices=("cpu", "cpu"))},
        ValueError,
        "accelerator is set twice: accelerator='cuda' .* the devices of strategy=<ddp> says 'cpu'",
    ),
    (
        CPU,
        {"devices": 3, "strategy": strategy_object("ddp", devices=("cpu",) * 2)},
        ValueError,
        "devices=3 says 3, .* 2",
    ),
    (CPU, {"strategy": strategy_object("ddp", devices=("cuda:0",))}, RuntimeError, "asks for cuda"),
    (fabric_run(strategy="ddp"), {"strategy": strategy_object("ddp")}, ValueError, "LT_STRATEGY says 'ddp'"),
    # the command line
    (fabric_run(accelerator="cuda"), {"accelerator": "cpu"}, ValueError, "accelerator='cpu' .* LT_ACCELERATOR"),
    (fabric_run(strategy="ddp"), {"strategy": "dp"}, ValueError, "strategy='dp' says 'dp', LT_STRATEGY says 'ddp'"),
    (fabric_run(devices="2"), {"devices": 3}, ValueError, "devices=3 .* LT_DEVICES"),
    (fabric_run(num_nodes="2"), {"num_nodes": 3}, ValueError, "num_nodes=3 says 3, LT_NUM_NODES says 2"),
    (
        fabric_run(precision="bf16-true"),
        {"precision": "16-true"},
        ValueError,
        "precision is set twice: precision='16-true' says '16-true', LT_PRECISION says 'bf16-true'. Keep one of them",
    ),
    (fabric_run(num_nodes="two"), {}, ValueError, "LT_NUM_NODES must be a whole number >= 1, but it is 'two'"),
    (fabric_run(strategy="dpd"), {}, ValueError, "Unknown strategy 'dpd'"),
    # torchrun
    (torchrun(4), {"devices": 2}, ValueError, "devices=2 and num_nodes=1 .* 2 process.* WORLD_SIZE=4"),
    (torchrun(2), {"devices": 2, "num_nodes": 2}, ValueError, "ask for 4 process.*WORLD_SIZE=2"),
    (torchrun(2), {"strategy": "single_device", "devices": 1}, ValueError, "WORLD_SIZE=2"),
    (torchrun(2, cuda=4), {"strategy": "dp", "devices": 4}, ValueError, "ask for 1 process.*WORLD_SIZE=2"),
    (torchrun(3, cuda=2), {}, MisconfigurationException, "more than the 2 CUDA"),
    (torchrun(2, WORLD_SIZE="many"), {}, ValueError, "WORLD_SIZE must be a whole number"),
]


def _id(row: Any) -> str:
    return str(row[1])


@pytest.mark.parametrize(("machine", "flags", "expected"), DECIDED, ids=map(_id, DECIDED))
def test_flags_on_a_machine_decide(machine: Machine, flags: dict[str, Any], expected: dict[str, Any]) -> None:
    decided = plan(machine, **flags)
    assert {name: getattr(decided, name).value for name in expected} == expected


@pytest.mark.parametrize(("machine", "flags", "error", "words"), REFUSED, ids=map(_id, REFUSED))
def test_flags_on_a_machine_are_refused(machine: Machine, flags: dict[str, Any], error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        plan(machine, **flags)


@pytest.mark.parametrize(("machine", "flags", "_"), DECIDED, ids=map(_id, DECIDED))
def test_the_page_shows_every_value_with_its_reason_and_survives_pickling(
    machine: Machine, flags: dict[str, Any], _: Any
) -> None:
    decided = plan(machine, **flags)
    lines = str(decided).splitlines()
    names = ["accelerator", "devices", "num_nodes", "strategy", "precision", "environment"]
    for name, line in zip(names, lines, strict=False):
        value, because = getattr(decided, name)
        assert line.split(maxsplit=1)[0] == name
        assert str(value) in line
        assert because
        assert line.endswith(because)
    assert pickle.loads(pickle.dumps(decided)) == decided


def test_the_page_is_aligned() -> None:
    assert str(plan(GPU4, precision="bf16-true", strategy="ddp_spawn")).startswith(
        "accelerator  cuda          auto: first available\n"
        "devices      (0, 1, 2, 3)  auto: all 4 cuda device(s)\n"
        "num_nodes    1             default\n"
        "strategy     ddp_spawn     strategy='ddp_spawn'\n"
        "precision    bf16-true     precision='bf16-true'\n"
        "environment  lightning     "
    )


@pytest.mark.parametrize(
    ("machine", "flags", "name", "because"),
    [
        (CPU, {}, "devices", "auto: one process"),
        (GPU1, {}, "strategy", "auto: one process"),
        (GPU4, {"num_nodes": 2}, "strategy", "auto: 8 processes"),
        (GPU4, {"num_nodes": 2}, "num_nodes", "num_nodes=2"),
        (NOTEBOOK_GPU4, {}, "strategy", "auto: 4 devices in a notebook"),
        (fabric_run(devices="2"), {}, "devices", "LT_DEVICES"),
        (torchrun(2), {}, "devices", "auto: LOCAL_WORLD_SIZE=2"),
        (torchrun(2, nodes=2), {}, "num_nodes", "WORLD_SIZE=4 / LOCAL_WORLD_SIZE=2"),
        (torchrun(2), {}, "environment", "detected from TORCHELASTIC_RUN_ID"),
        (CPU, {"plugins": (PRECISION,)}, "precision", "plugins=[HalfPrecision]"),
        (CPU, {"strategy": strategy_object("ddp", parts=(PRECISION,))}, "precision", "strategy=<ddp>"),
        (CPU, {"strategy": strategy_object("ddp", devices=("cpu",))}, "devices", "the devices of strategy=<ddp>"),
    ],
)
def test_reasons_name_the_source(machine: Machine, flags: dict[str, Any], name: str, because: str) -> None:
    assert getattr(plan(machine, **flags), name).because == because


def test_half_precision_autocast_on_the_cpu_is_replaced_with_a_warning() -> None:
    decided = plan(CPU, precision="16-mixed")
    assert decided.precision == ("bf16-mixed", "precision='16-mixed', on the CPU")
    (warning,) = decided.warnings
    assert "precision='16-mixed'" in warning
    assert "precision='bf16-mixed'" in warning
    assert warning in str(decided)


def test_nothing_to_warn_of_elsewhere() -> None:
    assert plan(GPU1, precision="16-mixed").warnings == ()


@pytest.mark.parametrize("short", [16, "16", "bf16"])
def test_a_short_precision_is_taken_with_a_nudge(short: Any) -> None:
    with pytest.warns(UserWarning, match="-mixed"):
        assert plan(GPU1, precision=short).precision.value in ("16-mixed", "bf16-mixed")


@pytest.mark.parametrize(
    ("flags", "processes"), [({}, 4), ({"devices": 2}, 2), ({"strategy": "dp"}, 1), ({"devices": 1}, 1)]
)
def test_processes_are_counted_per_machine(flags: dict[str, Any], processes: int) -> None:
    assert plan(GPU4, num_nodes=1, **flags).num_processes == processes
