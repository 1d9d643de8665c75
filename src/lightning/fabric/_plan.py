"""From flags and a machine to a plan: every decision that ``Fabric(...)`` takes, without effects.

Several sources may speak about a value (an argument, the command line, a plugin, the strategy object); if two of them
disagree, the error names both. Nothing here imports torch, a strategy or an accelerator.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from lightning.fabric.accelerators.registry import ACCELERATOR_REGISTRY
from lightning.fabric.plugins.environments._detection import detect_environment
from lightning.fabric.plugins.precision._table import PRECISIONS, canonical
from lightning.fabric.strategies._table import StrategyEntry
from lightning.fabric.strategies.registry import STRATEGY_REGISTRY
from lightning.fabric.utilities import device_parser
from lightning.fabric.utilities.text import did_you_mean

_AUTO_ORDER = ("tpu", "mps", "cuda", "cpu")  # the built-in accelerators, best first
_MULTIPROCESSING = ("spawn", "fork", "forkserver")


# ---- values and their reasons ------------------------------------------------------------------------------------


class Claim(NamedTuple):
    """What one source says about a value; ``value`` None: it says nothing."""

    source: str  # in the user's words: "precision='bf16-mixed'", "LT_PRECISION"
    value: Any


class Settled(NamedTuple):
    """A value, and the source it comes from."""

    value: Any
    because: str


def settle(flag: str, *claims: Claim, default: Settled) -> Settled:
    """Return what the claims agree on, or ``default`` if none says anything; two that differ raise ``ValueError``."""
    said = [claim for claim in claims if claim.value is not None]
    for claim in said[1:]:
        if claim.value != said[0].value:
            raise ValueError(
                f"{flag} is set twice: {said[0].source} says {said[0].value!r}, "
                f"{claim.source} says {claim.value!r}. Keep one of them."
            )
    return Settled(said[0].value, said[0].source) if said else default


# ---- what a plan is made from ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Part:
    """An object of the user's: a plugin, or what a strategy object carries. Two of a kind are never the same."""

    label: str
    kind: str | None = None  # "precision", "cluster environment", "checkpoint IO"; None: none of these

    def __repr__(self) -> str:
        return self.label


@dataclass(frozen=True, eq=False)
class Hardware:
    """What an accelerator says of itself: the answers of its static methods."""

    name: str
    available: Callable[[], bool]
    count: Callable[[], int]  # for devices="auto"
    parse: Callable[[Any], Any]
    spread: Callable[[Any], Sized]  # what `parse` returned -> one item per device
    label: str = ""

    def __repr__(self) -> str:
        return self.label or repr(self.name)

    @classmethod
    def of(cls, name: str, accelerator: Any, label: str = "") -> "Hardware":
        """Ask ``accelerator``, an object or a class."""
        return cls(
            name,
            available=accelerator.is_available,
            count=accelerator.auto_device_count,
            parse=accelerator.parse_devices,
            spread=accelerator.get_parallel_devices,
            label=label,
        )


@dataclass(frozen=True)
class StrategyObject:
    """A strategy that the user made: the facts of its class, and the parts and devices that it brings along."""

    label: str  # "DDPStrategy(...)"
    entry: StrategyEntry
    accelerator: Hardware | None = None
    devices: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()

    def __repr__(self) -> str:
        return self.label


@dataclass(frozen=True)
class Flags:
    """The arguments of ``Fabric``; objects are replaced by a Hardware, StrategyObject or Part."""

    accelerator: Any = "auto"
    strategy: Any = "auto"
    devices: Any = "auto"
    num_nodes: Any = 1
    precision: Any = None
    plugins: tuple[Part, ...] = ()


@dataclass(frozen=True)
class Machine:
    """What this machine has, and the variables of this process. :meth:`here` alone looks; tests write it by hand."""

    cuda: int = 0
    mps: bool = False
    tpu: int = 0
    others: Mapping[str, Hardware] = field(default_factory=dict)  # accelerators that other packages registered
    env: Mapping[str, str] = field(default_factory=dict)
    notebook: bool = False
    fork: bool = True

    @classmethod
    def here(cls) -> "Machine":
        """Look at this machine, without initialising any of its devices."""
        names = ACCELERATOR_REGISTRY.available_accelerators()
        found = {name: Hardware.of(name, ACCELERATOR_REGISTRY.get_class(name)) for name in names}
        built_in = {name: hardware for name, hardware in found.items() if name in _AUTO_ORDER}
        count = {name: hardware.count() for name, hardware in built_in.items() if hardware.available()}
        return cls(
            cuda=count.get("cuda", 0),
            mps="mps" in count,
            tpu=count.get("tpu", 0),
            others={name: hardware for name, hardware in found.items() if name not in _AUTO_ORDER},
            env=dict(os.environ),
            notebook=hasattr(sys, "ps1"),
            fork=hasattr(os, "fork"),
        )

    def count(self, name: str) -> int:
        """Return how many devices of a built-in accelerator ``devices="auto"`` means; 0: there are none."""
        return {"cpu": 1, "cuda": self.cuda, "mps": int(self.mps), "tpu": self.tpu}[name]

    def available(self) -> list[str]:
        """Return the names of the accelerators that can be used here, the best built-in one first."""
        built_in = [name for name in _AUTO_ORDER if self.count(name)]
        return built_in + [name for name, hardware in self.others.items() if hardware.available()]

    def number(self, variable: str) -> int | None:
        """Return an environment variable that must be a whole number from 1; None if it is not set."""
        text = self.env.get(variable)
        if text is None:
            return None
        if not text.strip().isdecimal() or int(text) < 1:
            raise ValueError(f"The environment variable {variable} must be a whole number >= 1, but it is {text!r}.")
        return int(text)

    def switched_on(self, variable: str) -> bool:
        """Return whether an environment variable is set to something other than off."""
        return self.env.get(variable, "").strip().lower() not in ("", "0", "false", "off")

    @property
    def external(self) -> bool:
        """Whether somebody else has started this process as one of several."""
        return "LOCAL_RANK" in self.env


@dataclass(frozen=True)
class Plan:
    """What was decided, each value with its reason. ``print(plan)`` belongs in bug reports."""

    accelerator: Settled
    devices: Settled  # what the accelerator's `get_parallel_devices` takes, or the strategy object's own devices
    num_nodes: Settled
    strategy: Settled
    precision: Settled
    environment: Settled
    num_devices: int  # of this machine, as all counts here except num_nodes
    num_processes: int
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        settled = [(f.name, getattr(self, f.name)) for f in fields(self) if f.type is Settled]
        width = max(len(str(value)) for _, (value, _) in settled)
        page = [f"{name:<11}  {value!s:<{width}}  {because}" for name, (value, because) in settled]
        return "\n".join(page + [f"{'warning':<11}  {text}" for text in self.warnings])


# ---- the steps ---------------------------------------------------------------------------------------------------


def resolve(flags: Flags, machine: Machine) -> Plan:
    """Decide everything that can be known before processes exist.

    Raises ``ValueError`` or ``TypeError`` for flags that contradict each other or that no machine could honour,
    ``RuntimeError`` or ``MisconfigurationException`` for what this machine lacks.
    """
    asked = _asked_strategy(flags, machine)
    accelerator, hardware = _accelerator(flags, machine, asked.value)
    devices, num_devices = _devices(flags, machine, hardware, asked.value)
    num_nodes = _num_nodes(flags, machine)
    environment = _part("cluster environment", flags, asked.value, _detected(machine, accelerator.value))
    strategy, entry = _strategy(asked, machine, accelerator.value, num_devices, num_nodes.value)
    precision, warnings = _precision(flags, machine, asked.value, accelerator.value)
    _check_plugins(flags, asked.value)
    plan = Plan(
        accelerator,
        devices,
        num_nodes,
        strategy,
        precision,
        environment,
        num_devices=num_devices,
        num_processes=num_devices if entry.multi_process else 1,
        warnings=warnings,
    )
    _check_pairs(Pairing(plan, entry, machine))
    return plan


def _asked_strategy(flags: Flags, machine: Machine) -> Settled:
    """What was asked for: a known name, a StrategyObject, or None for "auto"."""
    asked = settle(
        "strategy",
        Claim(f"strategy={flags.strategy!r}", _unless_auto(flags.strategy)),
        Claim("LT_STRATEGY", _unless_auto(machine.env.get("LT_STRATEGY"))),
        default=Settled(None, "auto"),
    )
    if asked.value is None or isinstance(asked.value, StrategyObject):
        return asked
    if not isinstance(asked.value, str):
        raise TypeError(f"`strategy` must be a name or a Strategy object, but got {asked.value!r}.")
    if asked.value not in STRATEGY_REGISTRY:
        raise ValueError(_unknown("strategy", asked.value, STRATEGY_REGISTRY.available_strategies()))
    return asked


def _accelerator(flags: Flags, machine: Machine, strategy: Any) -> tuple[Settled, Hardware]:
    claims = [
        Claim(f"accelerator={flags.accelerator!r}", _named_accelerator(flags.accelerator, machine)),
        Claim("LT_ACCELERATOR", _named_accelerator(machine.env.get("LT_ACCELERATOR"), machine)),
    ]
    if isinstance(strategy, StrategyObject):
        claims.append(Claim(f"strategy={strategy.label}", strategy.accelerator))
        device_type = _device_type(strategy)
        if not any(isinstance(claim.value, Hardware) for claim in claims):  # a custom one may use any device type
            claims.append(Claim(f"the devices of strategy={strategy.label}", device_type))
    best = Settled(machine.available()[0], "auto: first available")
    value, because = settle("accelerator", *claims, default=best)

    hardware = value if isinstance(value, Hardware) else _built_in(value, machine)
    if not hardware.available():
        has = ", ".join(map(repr, machine.available()))
        raise RuntimeError(f"{because} asks for {hardware.name}, which this machine does not have. It has: {has}.")
    return Settled(hardware.name, because), hardware


def _named_accelerator(given: Any, machine: Machine) -> str | Hardware | None:
    """A built-in accelerator as its name, any other as its Hardware, "auto" as None."""
    given = _unless_auto(given)
    if given is None or isinstance(given, Hardware):
        return given
    if not isinstance(given, str):
        raise TypeError(f"`accelerator` must be a name or an Accelerator object, but got {given!r}.")
    if given == "gpu":
        gpu = next((name for name in ("mps", "cuda") if machine.count(name)), None)
        if gpu is None:
            has = ", ".join(map(repr, machine.available()))
            raise RuntimeError(f"accelerator='gpu' needs a GPU, which this machine does not have. It has: {has}.")
        return gpu
    if given in _AUTO_ORDER:
        return given
    if given in machine.others:
        return machine.others[given]
    raise ValueError(_unknown("accelerator", given, sorted(["auto", "gpu", *_AUTO_ORDER, *machine.others])))


def _built_in(name: str, machine: Machine) -> Hardware:
    """A built-in accelerator with the devices that ``machine`` says it has."""
    count = machine.count(name)
    parse: Callable[[Any], Any] = {
        "cpu": device_parser.parse_cpu_devices,
        "cuda": lambda devices: tuple(device_parser.parse_gpu_devices(devices, available=count)),
        "mps": lambda devices: tuple(device_parser.parse_mps_devices(devices, available=count)),
        "tpu": lambda devices: device_parser.parse_tpu_devices(devices, available=count),
    }[name]
    spread: Callable[[Any], Sized] = lambda parsed: range(parsed) if isinstance(parsed, int) else parsed
    return Hardware(name, available=lambda: count > 0, count=lambda: count, parse=parse, spread=spread)


def _device_type(strategy: StrategyObject) -> str | None:
    """The built-in accelerator of the devices that a strategy object brings along, if they say one."""
    types = sorted({device.partition(":")[0] for device in strategy.devices})
    if len(types) > 1:
        raise ValueError(
            f"strategy={strategy.label} has devices of several types: {', '.join(types)}. Pass devices of one type."
        )
    names = ["tpu" if name == "xla" else name for name in types]
    return names[0] if names and names[0] in _AUTO_ORDER else None


def _devices(flags: Flags, machine: Machine, hardware: Hardware, strategy: Any) -> tuple[Settled, int]:
    """The devices in the accelerator's own form, and their number."""
    said = settle(
        "devices",
        Claim(f"devices={flags.devices!r}", _parsed(flags.devices, hardware)),
        Claim("LT_DEVICES", _parsed(machine.env.get("LT_DEVICES"), hardware)),
        default=Settled(None, "auto"),
    )
    if isinstance(strategy, StrategyObject) and strategy.devices:
        count = None if said.value is None else len(hardware.spread(said.value))
        own = Claim(f"the devices of strategy={strategy.label}", len(strategy.devices))
        settle("The number of devices", Claim(said.because, count), own, default=said)
        return Settled(strategy.devices, own.source), len(strategy.devices)
    if said.value is None:
        said = _auto_devices(machine, hardware)
    return said, len(hardware.spread(said.value))


def _parsed(devices: Any, hardware: Hardware) -> Any:
    devices = _unless_auto(devices)
    if devices is None:
        return None
    if isinstance(devices, (int, str, list, tuple)) and str(devices).strip() in ("0", "", "[]", "()"):
        raise ValueError(f"`devices` must ask for at least one device, but got devices={devices!r}.")
    return hardware.parse(devices)


def _auto_devices(machine: Machine, hardware: Hardware) -> Settled:
    started = machine.number("LOCAL_WORLD_SIZE") if machine.external else None
    if started is not None:
        return Settled(hardware.parse(started), f"auto: LOCAL_WORLD_SIZE={started}")
    count = hardware.count()
    because = "auto: one process" if hardware.name == "cpu" else f"auto: all {count} {hardware.name} device(s)"
    return Settled(hardware.parse(count), because)


def _num_nodes(flags: Flags, machine: Machine) -> Settled:
    if isinstance(flags.num_nodes, bool) or not isinstance(flags.num_nodes, int):
        raise TypeError(f"`num_nodes` must be a whole number, but got {flags.num_nodes!r}.")
    if flags.num_nodes < 1:
        raise ValueError(f"`num_nodes` must be at least 1, but got num_nodes={flags.num_nodes!r}.")
    default = Settled(1, "default")
    if machine.external:
        world, local = machine.number("WORLD_SIZE"), machine.number("LOCAL_WORLD_SIZE")
        if world is not None and local is not None:
            default = Settled(max(1, world // local), f"WORLD_SIZE={world} / LOCAL_WORLD_SIZE={local}")
    return settle(
        "num_nodes",
        Claim(f"num_nodes={flags.num_nodes}", None if flags.num_nodes == 1 else flags.num_nodes),
        Claim("LT_NUM_NODES", machine.number("LT_NUM_NODES")),
        default=default,
    )


def _strategy(
    asked: Settled, machine: Machine, accelerator: str, num_devices: int, num_nodes: int
) -> tuple[Settled, StrategyEntry]:
    if isinstance(asked.value, StrategyObject):
        return Settled(asked.value.label, asked.because), asked.value.entry
    if asked.value is None:
        asked = _auto_strategy(machine, accelerator, num_devices, num_nodes)
    return asked, STRATEGY_REGISTRY.entry(asked.value)


def _detected(machine: Machine, accelerator: str) -> Settled:
    """The environment, unless the user brings one."""
    if accelerator == "tpu":
        return Settled("xla", "accelerator='tpu'")
    return Settled(*detect_environment(machine.env))


def _auto_strategy(machine: Machine, accelerator: str, num_devices: int, num_nodes: int) -> Settled:
    if accelerator == "tpu":
        one = num_devices * num_nodes == 1
        return Settled("single_xla", "auto: one tpu core") if one else Settled("xla", "auto: tpu")
    if num_devices * num_nodes == 1:
        return Settled("single_device", "auto: one process")
    if machine.notebook and num_devices > 1 and not machine.external:
        return Settled("ddp_notebook", f"auto: {num_devices} devices in a notebook")
    return Settled("ddp", f"auto: {num_devices * num_nodes} processes")


def _precision(flags: Flags, machine: Machine, strategy: Any, accelerator: str) -> tuple[Settled, tuple[str, ...]]:
    """The canonical name or the label of the plugin, and what to warn of."""
    claims = [
        Claim(source, None if given is None else canonical(given))
        for source, given in (
            (f"precision={flags.precision!r}", flags.precision),
            ("LT_PRECISION", machine.env.get("LT_PRECISION")),
        )
    ]
    settled = _part("precision", flags, strategy, Settled("32-true", "default"), *claims)
    if settled.value != "16-mixed" or accelerator != "cpu":
        return settled, ()
    warning = f"{settled.because} is not possible on the CPU, so precision='bf16-mixed' is used. Pass that to agree."
    return Settled("bf16-mixed", f"{settled.because}, on the CPU"), (warning,)


def _part(kind: str, flags: Flags, strategy: Any, default: Settled, *claims: Claim) -> Settled:
    """Settle who supplies a part of the strategy: ``claims``, a plugin, the strategy object, or nobody."""
    carried = strategy.parts if isinstance(strategy, StrategyObject) else ()
    value, because = settle(
        kind,
        *claims,
        *(Claim(f"plugins=[{part.label}]", part) for part in flags.plugins if part.kind == kind),
        *(Claim(f"strategy={strategy.label}", part) for part in carried if part.kind == kind),
        default=default,
    )
    return Settled(value.label if isinstance(value, Part) else value, because)


def _check_plugins(flags: Flags, strategy: Any) -> None:
    for plugin in flags.plugins:
        if plugin.kind is None:
            raise TypeError(
                "`plugins` takes objects of type Precision, ClusterEnvironment or CheckpointIO, "
                f"but got {plugin.label}."
            )
    _part("checkpoint IO", flags, strategy, Settled(None, "default"))  # its default is the strategy's business


def _unless_auto(given: Any) -> Any:
    return None if isinstance(given, str) and given == "auto" else given


def _unknown(flag: str, given: str, known: list[str]) -> str:
    return f"Unknown {flag} {given!r}.{did_you_mean(given, known)} Known: {', '.join(known)}."


# ---- pairs of values that exclude each other ---------------------------------------------------------------------


@dataclass(frozen=True)
class Pairing:
    """All that a rule about two values may look at; its message may quote it as ``{p.name}``."""

    plan: Plan
    entry: StrategyEntry
    machine: Machine

    @property
    def strategy(self) -> str:
        name = self.plan.strategy.value
        return f"strategy={name!r}" if name in STRATEGY_REGISTRY else f"strategy={name}"

    @property
    def accelerator(self) -> str:
        return str(self.plan.accelerator.value)

    @property
    def devices(self) -> int:
        return self.plan.num_devices

    @property
    def nodes(self) -> int:
        return int(self.plan.num_nodes.value)

    @property
    def processes(self) -> int:
        return self.nodes * self.plan.num_processes

    @property
    def torchrun(self) -> bool:
        return bool(self.plan.environment.value == "torchelastic")

    @property
    def world_size(self) -> int | None:
        return self.machine.number("WORLD_SIZE")

    @property
    def starts(self) -> str | None:
        """How processes would have to be started on this machine; None: they need not."""
        return None if self.devices == 1 or self.machine.external else self.entry.start_method

    @property
    def precision(self) -> str:
        return str(self.plan.precision.value)

    @property
    def precisions(self) -> str:
        """What the strategy can compute in, for a message."""
        return ", ".join(repr(name) for name in PRECISIONS if name in (self.entry.precisions or PRECISIONS))

    @property
    def low_precision(self) -> str:
        """A precision of 16 bits that the accelerator can compute in."""
        return "bf16-true" if self.accelerator == "tpu" else "bf16-mixed"

    @property
    def instead(self) -> str:
        """A strategy that does run on the accelerator."""
        if self.accelerator == "tpu":
            return "strategy='xla', or strategy='single_xla' and one device"
        ddp = STRATEGY_REGISTRY.entry("ddp").runs_on or ()
        return "strategy='ddp'" if self.accelerator in ddp else "strategy='single_device' and one device"


class Rule(NamedTuple):
    """Raise ``error(message)`` if ``breaks`` is true of the pairing."""

    breaks: Callable[[Pairing], bool]
    error: type[Exception]
    message: str


_RULES = (
    Rule(
        # Of accelerators that are not ours the table knows nothing
        lambda p: p.accelerator in _AUTO_ORDER and p.accelerator not in (p.entry.runs_on or _AUTO_ORDER),
        ValueError,
        "{p.strategy} cannot run on accelerator={p.accelerator!r}. Use {p.instead}.",
    ),
    Rule(
        lambda p: p.devices > 1 and not p.entry.many_devices,
        ValueError,
        "{p.strategy} uses one device, but {p.devices} were asked for. Use strategy='ddp', or devices=1.",
    ),
    Rule(
        lambda p: p.devices > 1 and not p.entry.multi_process and p.accelerator == "cpu",
        ValueError,
        "{p.strategy} splits batches over GPUs, so on the CPU it cannot use {p.devices} devices. "
        "Use strategy='ddp', or devices=1.",
    ),
    Rule(
        lambda p: p.nodes > 1 and not p.entry.multi_process,
        ValueError,
        "{p.strategy} is one process, so it cannot use num_nodes={p.nodes}. Use strategy='ddp'.",
    ),
    Rule(
        lambda p: (
            (p.entry.start_method in _MULTIPROCESSING and (p.torchrun or p.machine.switched_on("LT_CLI_USED")))
            or (p.entry.start_method == "xla" and p.torchrun)
        ),
        RuntimeError,
        "{p.strategy} starts processes itself, but `fabric run` or torchrun has started them already. "
        "Use strategy='ddp'.",
    ),
    Rule(
        lambda p: p.torchrun and p.world_size not in (None, p.processes),
        ValueError,
        "devices={p.devices} and num_nodes={p.nodes} with {p.strategy} ask for {p.processes} process(es), but "
        "torchrun has started WORLD_SIZE={p.world_size}. Make `--nproc-per-node` and `--nnodes` agree with them.",
    ),
    Rule(
        lambda p: p.entry.start_method in ("fork", "forkserver") and not p.machine.fork,
        ValueError,
        "{p.strategy} needs processes that can be forked, which this platform does not have. "
        "Use strategy='ddp_spawn', or strategy='ddp' in a script.",
    ),
    Rule(
        lambda p: p.entry.start_method == "fork" and p.machine.switched_on("PL_DISABLE_FORK"),
        ValueError,
        "{p.strategy} forks, which the environment variable PL_DISABLE_FORK forbids. "
        "Unset it, or use strategy='ddp_spawn' or strategy='ddp' in a script.",
    ),
    Rule(
        lambda p: p.machine.notebook and p.starts not in (None, "fork", "xla"),
        RuntimeError,
        "{p.strategy} cannot start {p.devices} processes from a notebook or an interactive session. "
        "Use strategy='ddp_notebook', or devices=1.",
    ),
    Rule(
        lambda p: p.precision.startswith("transformer-engine") and p.accelerator != "cuda",
        ValueError,
        "precision={p.precision!r} computes in 8-bit floats on NVIDIA GPUs, but the accelerator is {p.accelerator!r}. "
        "Use accelerator='cuda', or precision={p.low_precision!r}.",
    ),
    Rule(
        lambda p: p.precision in PRECISIONS and p.precision not in (p.entry.precisions or PRECISIONS),
        ValueError,
        "{p.strategy} cannot compute in precision={p.precision!r}. It can in: {p.precisions}.",
    ),
    Rule(
        lambda p: p.accelerator == "mps" and p.precision == "float8",
        ValueError,
        "precision='float8' needs 8-bit floats, which accelerator='mps' does not have. "
        "Use precision='bf16-mixed', or accelerator='cpu'.",
    ),
    Rule(
        lambda p: p.accelerator == "mps" and p.precision == "64-true",
        ValueError,
        "precision='64-true' needs 64-bit floats, which accelerator='mps' does not have. "
        "Use precision='32-true', or accelerator='cpu'.",
    ),
)


def _check_pairs(pairing: Pairing) -> None:
    for rule in _RULES:
        if rule.breaks(pairing):
            raise rule.error(rule.message.format(p=pairing))
