"""What every strategy promises, as checks to run on your own.

    from lightning.fabric.testing.contract import STRATEGY_CHECKS, check_strategy

    STRATEGY_REGISTRY.register("mine", MyStrategy)

    @pytest.mark.parametrize("check", STRATEGY_CHECKS, ids=lambda check: check.__name__)
    def test_my_strategy_keeps_its_promises(check):
        check_strategy("mine", checks=[check])

Each check uses the strategy through ``Fabric``, in one process and in several, and compares with plain PyTorch in one
process. It fails with a sentence that says which promise is broken. What a strategy cannot do it may refuse, with
``NotImplementedError``; what it does not refuse it has to do right.
"""

import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lightning.fabric.checkpoint.manifest import DamagedCheckpointError
from lightning.fabric.fabric import Fabric
from lightning.fabric.strategies._table import StrategyEntry
from lightning.fabric.strategies.registry import STRATEGY_REGISTRY, entry_of
from lightning.fabric.strategies.strategy import Strategy
from lightning.fabric.testing.ranks import on_ranks
from lightning.fabric.utilities.distributed import _distributed_is_initialized
from lightning.fabric.utilities.registry import class_of

MakeModel: TypeAlias = Callable[[], nn.Module]
MakeOptimizer: TypeAlias = Callable[[nn.Module], Optimizer]

_BATCH = 8  # over all ranks
_INPUTS = torch.linspace(-2, 2, 64).reshape(16, 4)  # what models are compared on


def contract_model() -> nn.Module:
    """Return the model of all checks, unless you give another: four features in, and a large gradient."""
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def sgd(model: nn.Module) -> Optimizer:
    """Return an optimizer that has state of its own."""
    return SGD(model.parameters(), lr=0.1, momentum=0.9)


def _batches(steps: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(_BATCH, 4, generator=generator) for _ in range(steps)]


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - 1).square().mean()


@dataclass(frozen=True)
class Trial:
    """What a check gets on each rank: a launched ``Fabric`` with the strategy, and ways to use it."""

    fabric: Fabric
    folder: Path  # the same one for all ranks, and empty at first
    make_model: MakeModel
    tolerance: float

    def model(self) -> nn.Module:
        """Return a new model, with the same weights each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make_model()

    def set_up(self, model: nn.Module | None = None, make: MakeOptimizer = sgd) -> tuple[Any, Any]:
        """Set up a model and its optimizer with one call or, where that is refused, one after the other."""
        model = self.model() if model is None else model
        try:
            return self.fabric.setup(model, make(model))
        except (NotImplementedError, RuntimeError) as refusal:
            if "setup_module" not in str(refusal):
                raise
        return self.set_up_separately(model, make)

    def set_up_separately(self, model: nn.Module, make: MakeOptimizer = sgd) -> tuple[Any, Any]:
        """Set up the model, then the optimizer that is made from it."""
        wrapped = self.fabric.setup_module(model)
        return wrapped, self.fabric.setup_optimizers(make(wrapped))

    def backward(self, model: Any, batch: Tensor) -> Tensor:
        """Compute gradients from this rank's part of the batch; return the loss of the part."""
        loss = _loss(model, self.share(batch))
        self.fabric.backward(loss, model=model)
        return loss.detach()

    def share(self, batch: Tensor) -> Tensor:
        """Return this rank's part of ``batch``, as a distributed sampler would deal it out."""
        sampler = self.fabric.strategy.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        return self.fabric.to_device(batch[sampler["rank"] :: sampler["num_replicas"]])

    def train(self, model: Any, optimizer: Any, batches: Iterable[Tensor] | None = None) -> Tensor:
        """Take a step for each batch; return their losses, each the mean over all ranks."""
        losses = []
        for batch in _batches() if batches is None else batches:
            optimizer.zero_grad()
            losses.append(self.fabric.all_reduce(self.backward(model, batch)))
            optimizer.step()
        return torch.stack(losses).cpu()

    def outputs(self, model: Any) -> Tensor:
        """Return what a model computes: that tells its weights, however they lie on the ranks."""
        with torch.no_grad():
            return model(self.fabric.to_device(_INPUTS)).cpu().clone()

    def agree(self, found: Tensor, expected: Tensor, what: str) -> None:
        """Fail unless the two are equal but for the tolerance; ``what`` begins the sentence."""
        promise(found.shape == expected.shape, f"{what} of shape {tuple(found.shape)}, not {tuple(expected.shape)}")
        difference = (found - expected).abs().max().item()
        promise(
            difference <= self.tolerance,
            f"{what} other than expected: the largest difference is {difference:.1e}, allowed is {self.tolerance:.0e}",
        )


Check: TypeAlias = Callable[[Trial], None]


def promise(is_kept: bool, sentence: str) -> None:
    """Fail with the sentence unless the promise is kept."""
    if not is_kept:
        raise AssertionError(sentence)


@contextmanager
def refused(errors: type[Exception] | tuple[type[Exception], ...], sentence: str) -> Any:
    """Fail with the sentence unless one of the errors is raised inside."""
    try:
        yield
    except errors:
        return
    raise AssertionError(sentence)


def _trained_by_torch(
    model: nn.Module, make: MakeOptimizer = sgd, batches: Iterable[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Train ``model`` in this process; return the losses, and what it then computes."""
    optimizer, losses = make(model), []
    for batch in _batches() if batches is None else batches:
        optimizer.zero_grad()
        loss = _loss(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), _computed_by(model)


def _computed_by(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(_INPUTS)


# ---- the checks: set-up and training -----------------------------------------------------------------------------


def trains_like_torch(trial: Trial) -> None:
    """Steps on shares of batches give the losses and the weights of steps on the whole batches."""
    model, optimizer = trial.set_up()
    losses, outputs = _trained_by_torch(trial.model())
    trial.agree(trial.train(model, optimizer), losses, "training has losses")
    computed = trial.outputs(model)
    trial.agree(computed, outputs, "the trained model computes outputs")
    everywhere = trial.fabric.all_gather(trial.fabric.to_device(computed)).cpu().reshape(-1, *computed.shape)
    promise(all(torch.equal(one, computed) for one in everywhere), "after training the ranks have different weights")


def sets_up_jointly_and_separately_alike(trial: Trial) -> None:
    """Either order of set-up trains the same, bit by bit; or it is refused, naming the one that works."""
    outputs = []
    for way, other in (("setup(model, optimizer)", "setup_module"), ("setup_module, setup_optimizers", "setup(")):
        try:
            model = trial.model()
            pair = trial.fabric.setup(model, sgd(model)) if other == "setup_module" else trial.set_up_separately(model)
        except (NotImplementedError, RuntimeError) as refusal:
            promise(other in str(refusal), f"{way} is refused without naming `{other}`, which would work: {refusal!r}")
            continue
        trial.train(*pair)
        outputs.append(trial.outputs(pair[0]))
    promise(bool(outputs), "a model and its optimizer can be set up neither jointly nor separately")
    promise(torch.equal(outputs[0], outputs[-1]), "training depends on whether set-up was joint or separate")


def refuses_to_set_up_twice(trial: Trial) -> None:
    """What is set up already raises ``ValueError``, rather than being wrapped twice."""
    model, optimizer = trial.set_up()
    for what, again in {
        "a model": lambda: trial.fabric.setup(model),
        "a model with its optimizer": lambda: trial.fabric.setup(model, optimizer),
        "an optimizer": lambda: trial.fabric.setup_optimizers(optimizer),
    }.items():
        with refused(ValueError, f"{what} can be set up twice, which should raise ValueError"):
            again()


def keeps_the_names_of_the_model(trial: Trial) -> None:
    """Parameters, and entries of state dicts, have the names and shapes that they have in the user's model."""
    expected = {name: value.shape for name, value in trial.model().state_dict().items()}
    model, _ = trial.set_up()
    names = [name for name, _ in model.named_parameters()]
    promise(names == [name for name, _ in trial.model().named_parameters()], f"parameters get other names: {names}")
    for what, state in {
        "`state_dict`": model.state_dict(),
        "`get_module_state_dict`": trial.fabric.strategy.get_module_state_dict(model.module),
    }.items():
        shapes = {name: value.shape for name, value in state.items()}
        gathered_elsewhere = not shapes and not trial.fabric.is_global_zero
        promise(
            gathered_elsewhere or (list(shapes) == list(expected) and shapes == expected),
            f"{what} has other names or shapes: {shapes}, not {expected}",
        )


def the_optimizer_goes_on_updating_the_model(trial: Trial) -> None:
    """Groups and their options survive set-up, and are those that a step follows."""
    model, optimizer = trial.set_up(make=_two_groups)
    reference = trial.model()
    _, outputs = _trained_by_torch(reference, _two_groups)
    rates = [group["lr"] for group in optimizer.param_groups]
    promise(rates == [0.1, 0.0], f"the learning rates of the optimizer's groups are {rates} after set-up, not [0.1, 0]")
    trial.train(model, optimizer)
    trial.agree(trial.outputs(model), outputs, "a model trained with two groups of parameters computes outputs")

    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = trial.outputs(model)
    trial.train(model, optimizer)
    promise(torch.equal(trial.outputs(model), before), "a learning rate that is set to 0 after set-up has no effect")


def _two_groups(model: nn.Module) -> Optimizer:
    first, *others = model.parameters()
    groups: list[dict[str, Any]] = [{"params": [first]}, {"params": others, "lr": 0.0}]
    return SGD(groups, lr=0.1, momentum=0.9)


def made_inside_init_module_is_where_it_belongs(trial: Trial) -> None:
    """Modules made inside ``init_module``, and tensors inside ``init_tensor``, train like others."""
    with trial.fabric.init_tensor():
        device = torch.ones(1).device
    promise(device == trial.fabric.device, f"`init_tensor` makes tensors on {device}, not on {trial.fabric.device}")
    with trial.fabric.init_module():
        model = trial.model()
    _, outputs = _trained_by_torch(trial.model())
    wrapped, optimizer = trial.set_up(model)
    trial.train(wrapped, optimizer)
    trial.agree(trial.outputs(wrapped), outputs, "a model made inside `init_module` computes outputs after training")


# ---- the checks: the step ----------------------------------------------------------------------------------------


def accumulates_gradients(trial: Trial) -> None:
    """Micro-batches, the first ones inside ``no_backward_sync``, add up to the gradient of them all."""
    model, optimizer = trial.set_up()
    reference, batches = trial.model(), _batches()
    reference_optimizer = sgd(reference)
    for _ in range(2):
        for number, batch in enumerate(batches, start=1):
            with trial.fabric.no_backward_sync(model, enabled=number < len(batches)):
                trial.backward(model, batch)
            _loss(reference, batch).backward()
        for each in (optimizer, reference_optimizer):
            each.step()
            each.zero_grad()
    trial.agree(trial.outputs(model), _computed_by(reference), "after accumulation it computes outputs")


def clips_by_norm_like_torch(trial: Trial) -> None:
    """``clip_gradients(max_norm=...)`` returns and bounds the norm of all gradients, wherever they lie."""
    for norm_type in (2.0, 1.0, math.inf):
        model, optimizer = trial.set_up()
        reference = trial.model()
        reference_optimizer = sgd(reference)
        trial.backward(model, _batches()[0])
        _loss(reference, _batches()[0]).backward()
        try:
            norm = trial.fabric.clip_gradients(model, optimizer, max_norm=0.01, norm_type=norm_type)
        except NotImplementedError:
            return
        expected = nn.utils.clip_grad_norm_(reference.parameters(), 0.01, norm_type)
        assert type(norm) is Tensor, f"clipping by norm returns {norm!r}, not a plain tensor"
        trial.agree(norm.cpu(), expected, f"clipping by the {norm_type:g}-norm returns norms")
        optimizer.step()
        reference_optimizer.step()
        trial.agree(trial.outputs(model), _computed_by(reference), "after a clipped step it computes outputs")


def tells_of_a_norm_that_is_not_finite(trial: Trial) -> None:
    """A norm that is not finite on one rank raises ``RuntimeError`` on all, unless it is asked to be let through."""
    model, optimizer = trial.set_up()
    batch = trial.share(_batches()[0])
    factor = math.inf if trial.fabric.is_global_zero else 1.0
    trial.fabric.backward(model(batch).sum() * factor, model=model)
    with refused(
        (RuntimeError, NotImplementedError), "a norm that is not finite is let through by `error_if_nonfinite=True`"
    ):
        trial.fabric.clip_gradients(model, optimizer, max_norm=1.0)


def clips_by_value_like_torch(trial: Trial) -> None:
    """``clip_gradients(clip_val=...)`` bounds each entry of each gradient."""
    model, optimizer = trial.set_up()
    reference = trial.model()
    reference_optimizer = sgd(reference)
    trial.backward(model, _batches()[0])
    _loss(reference, _batches()[0]).backward()
    try:
        trial.fabric.clip_gradients(model, optimizer, clip_val=0.01)
    except NotImplementedError:
        return
    nn.utils.clip_grad_value_(reference.parameters(), 0.01)
    optimizer.step()
    reference_optimizer.step()
    trial.agree(trial.outputs(model), _computed_by(reference), "after a bounded step it computes outputs")


# ---- the checks: other ranks -------------------------------------------------------------------------------------


def collectives_combine_all_ranks(trial: Trial) -> None:
    """``all_reduce``, ``all_gather``, ``broadcast`` and votes say the same on every rank, and the right thing."""
    strategy, rank, size = trial.fabric.strategy, trial.fabric.global_rank, trial.fabric.world_size
    mine = trial.fabric.to_device(torch.tensor([float(rank), 1.0]))
    total = torch.tensor([size * (size - 1) / 2, float(size)])
    for op, expected in (("sum", total), ("mean", total / size), ("avg", total / size)):
        trial.agree(strategy.all_reduce(mine.clone(), reduce_op=op).cpu(), expected, f"`all_reduce` by {op!r} gives")
    promise(strategy.all_reduce("text") == "text", "`all_reduce` changes what is no tensor")

    everyone = torch.stack([torch.tensor([float(other), 1.0]) for other in range(size)])
    gathered = strategy.all_gather(mine).cpu()
    trial.agree(gathered.reshape(size, 2), everyone, "`all_gather` gives tensors")
    last = {"from": rank}
    found = strategy.broadcast(last, src=size - 1)
    promise(found == {"from": size - 1}, f"`broadcast` from rank {size - 1} gives {found}")
    promise(found is last or rank < size - 1, "`broadcast` copies the object on the rank that it is from")
    first = rank == 0
    promise(strategy.reduce_boolean_decision(first) == (size == 1), "one rank's yes is taken for that of all")
    promise(strategy.reduce_boolean_decision(first, all=False) is True, "one rank's yes is not heard by the others")
    promise(strategy.is_global_zero == first, "`is_global_zero` is not rank 0")
    strategy.barrier("here")


def gradients_flow_through_all_gather(trial: Trial) -> None:
    """With ``sync_grads=True`` each rank's tensor gets the gradients from all ranks."""
    size = trial.fabric.world_size
    leaf = trial.fabric.to_device(torch.tensor([1.0])).requires_grad_()
    weight = trial.fabric.global_rank + 1.0
    (trial.fabric.strategy.all_gather(leaf, sync_grads=True) * weight).sum().backward()
    assert leaf.grad is not None, "no gradient flows through `all_gather(sync_grads=True)`"
    trial.agree(leaf.grad.cpu(), torch.tensor([size * (size + 1) / 2]), "`all_gather(sync_grads=True)` gives gradients")


def ranks_share_out_the_data(trial: Trial) -> None:
    """``distributed_sampler_kwargs`` deal every part of the data to equally many ranks."""
    sampler = trial.fabric.strategy.distributed_sampler_kwargs
    if sampler is None:
        promise(trial.fabric.world_size == 1, "every rank gets all of the data: `distributed_sampler_kwargs` is None")
        return
    dealt = trial.fabric.all_gather(sampler["rank"]).reshape(-1).tolist()
    copies, rest = divmod(trial.fabric.world_size, sampler["num_replicas"])
    promise(
        not rest and sorted(dealt) == sorted([*range(sampler["num_replicas"])] * copies),
        f"the data is cut into {sampler['num_replicas']} parts, of which the ranks get {dealt}",
    )


def a_failure_is_raised_on_all_ranks(trial: Trial) -> None:
    """``raise_on_all`` raises everywhere if one rank has an error, and nowhere if none has."""
    strategy, last = trial.fabric.strategy, trial.fabric.global_rank == trial.fabric.world_size - 1
    strategy.raise_on_all(None, "testing")
    with refused(ValueError if last else RuntimeError, "a rank does not hear of an error that another rank has"):
        strategy.raise_on_all(ValueError("mine") if last else None, "testing")


# ---- the checks: files -------------------------------------------------------------------------------------------


def goes_on_from_a_checkpoint(trial: Trial) -> None:
    """Training that is saved and loaded ends as training that goes on, bit by bit; values come back too."""
    first, *others = _batches()
    model, optimizer = trial.set_up()
    trial.train(model, optimizer, [first])
    path = trial.folder / "below" / "checkpoint"
    trial.fabric.save(path, {"model": model, "optimizer": optimizer, "step": 7, "rank": trial.fabric.global_rank})
    trial.train(model, optimizer, others)

    state: dict[str, Any] = dict(zip(("model", "optimizer"), trial.set_up(_zeroed(trial.model())), strict=True))
    state["step"] = 0
    rest = trial.fabric.load(path, state)
    promise(state["step"] == 7, f"a value of the state is {state['step']!r} after loading, not the 7 that was saved")
    promise(rest.get("rank") == 0, f"what the state does not ask for is not returned as rank 0 saved it: {rest}")
    trial.train(state["model"], state["optimizer"], others)
    promise(
        torch.equal(trial.outputs(state["model"]), trial.outputs(model)),
        "training that was loaded from a checkpoint ends with other weights than training that went on",
    )


def _zeroed(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def loads_into_a_model_that_was_made_empty(trial: Trial) -> None:
    """A model made inside ``init_module(empty_init=True)`` gets all of its weights from a checkpoint."""
    model, optimizer = trial.set_up()
    trial.train(model, optimizer)
    trial.fabric.save(trial.folder / "checkpoint", {"model": model})
    with trial.fabric.init_module(empty_init=True):
        empty = trial.make_model()
    state = {"model": trial.set_up(empty)[0]}
    trial.fabric.load(trial.folder / "checkpoint", state)
    promise(
        torch.equal(trial.outputs(state["model"]), trial.outputs(model)),
        "a model made with `empty_init=True` has other weights than the checkpoint that it was loaded from",
    )


def saves_while_training_goes_on(trial: Trial) -> None:
    """``save(blocking=False)`` writes what was there when it was called, or refuses."""
    model, optimizer = trial.set_up()
    trial.train(model, optimizer)
    before = trial.outputs(model)
    try:
        trial.fabric.save(trial.folder / "checkpoint", {"model": model}, blocking=False)
    except (NotImplementedError, TypeError):  # as an argument that is not taken
        return
    trial.train(model, optimizer)
    state = {"model": trial.set_up(_zeroed(trial.model()))[0]}
    trial.fabric.load(trial.folder / "checkpoint", state)
    promise(
        torch.equal(trial.outputs(state["model"]), before),
        "what was saved with `blocking=False` is not what was there when `save` was called",
    )


def refuses_a_checkpoint_that_is_damaged(trial: Trial) -> None:
    """A checkpoint of which a byte has changed is refused by every rank."""
    model, _ = trial.set_up()
    trial.fabric.save(trial.folder / "checkpoint", {"model": model, "mark": "a text that is in no other place"})
    if trial.fabric.global_rank == 0:
        _flip_a_byte(trial.folder / "checkpoint", b"a text that is in no other place")
    trial.fabric.barrier()
    with refused(DamagedCheckpointError, "a checkpoint of which a byte has changed is loaded"):
        trial.fabric.load(trial.folder / "checkpoint", {"model": model, "mark": ""})


def _flip_a_byte(path: Path, mark: bytes) -> None:
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    for file in files:
        content = bytearray(file.read_bytes())
        if (position := content.find(mark)) >= 0:
            content[position] ^= 1
            file.write_bytes(content)


def misses_a_key_that_is_not_in_the_checkpoint(trial: Trial) -> None:
    """Loading a state with a name that the checkpoint has not raises ``KeyError``, unless ``strict=False``."""
    model, _ = trial.set_up()
    trial.fabric.save(trial.folder / "checkpoint", {"model": model, "there": 1})
    with refused(KeyError, "a name that is not in the checkpoint is passed over by `load(strict=True)`"):
        trial.fabric.load(trial.folder / "checkpoint", {"model": model, "not there": 1})
    trial.fabric.load(trial.folder / "checkpoint", {"model": model, "not there": 1}, strict=False)


def a_filter_leaves_entries_out(trial: Trial) -> None:
    """``save(filter=...)`` writes only the entries that the filter picks, and the other names of the state whole."""
    model, _ = trial.set_up()
    path, picked = trial.folder / "checkpoint", list(trial.model().state_dict())[::2]
    try:
        trial.fabric.save(path, {"model": model, "step": 1}, filter={"model": lambda name, _: name in picked})
    except (NotImplementedError, TypeError):  # as an argument that is not taken
        return
    state: dict[str, Any] = {"model": trial.set_up(_zeroed(trial.model()))[0], "step": 0}
    with refused(RuntimeError, "what a filter leaves out is not missed by `load(strict=True)`"):
        trial.fabric.load(path, state)
    trial.fabric.load(path, state, strict=False)
    expected = trial.model()
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            parameter.mul_(name in picked)
    trial.agree(trial.outputs(state["model"]), _computed_by(expected), "loaded with a filter it computes outputs")
    promise(state["step"] == 1, "a filter for one name of the state changes the others")


STRATEGY_CHECKS: tuple[Check, ...] = (
    trains_like_torch,
    sets_up_jointly_and_separately_alike,
    refuses_to_set_up_twice,
    keeps_the_names_of_the_model,
    the_optimizer_goes_on_updating_the_model,
    made_inside_init_module_is_where_it_belongs,
    accumulates_gradients,
    clips_by_norm_like_torch,
    tells_of_a_norm_that_is_not_finite,
    clips_by_value_like_torch,
    collectives_combine_all_ranks,
    gradients_flow_through_all_gather,
    ranks_share_out_the_data,
    a_failure_is_raised_on_all_ranks,
    goes_on_from_a_checkpoint,
    saves_while_training_goes_on,
    refuses_a_checkpoint_that_is_damaged,
    loads_into_a_model_that_was_made_empty,
    misses_a_key_that_is_not_in_the_checkpoint,
    a_filter_leaves_entries_out,
)
"""The promises, each a function that takes a :class:`Trial`; all ranks run it. Yours may be added for a run."""


# ---- running them ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Named:
    """A registered strategy, with what makes it: another process may not have registered it."""

    name: str
    entry: StrategyEntry

    @property
    def multi_process(self) -> bool:
        return self.entry.multi_process

    def __call__(self) -> str:
        if self.name not in STRATEGY_REGISTRY:
            STRATEGY_REGISTRY.register(self.name, class_of(self.entry), self.entry.description, **self.entry.kwargs)
        return self.name


def check_strategy(
    strategy: str | Callable[[], Strategy],
    processes: int = 2,
    *,
    checks: Sequence[Check] = STRATEGY_CHECKS,
    alone: bool = True,
    accelerator: str = "cpu",
    make_model: MakeModel = contract_model,
    tolerance: float = 1e-6,
    tolerance_alone: float = 0.0,
    timeout: float = 60.0,
) -> None:
    """Run checks on a strategy, in one process and in ``processes``; the first promise that is broken raises.

    Args:
        strategy: a registered name; or what makes the strategy, a class or a function from the top level of a module.
        processes: how many processes, besides the run in one: 2, 4 or 8. A strategy that is always one process is
            checked in one alone.
        checks: some of :data:`STRATEGY_CHECKS`, or of your own: functions from the top level of a module.
        alone: ``False`` leaves the run in one process out, for a strategy that cannot be one.
        accelerator: where it runs; ``processes`` devices have to be there.
        make_model: returns the model to train, with four features in; a function from the top level of a module.
        tolerance: largest difference from plain PyTorch that is allowed on several processes.
        tolerance_alone: the same in one process.
        timeout: seconds that one run may take.

    Raises:
        RankError: with the sentence that says what is wrong.

    """
    if _BATCH % processes:
        raise ValueError(f"processes={processes} cannot share out batches of {_BATCH}. Use 2, 4 or {_BATCH}.")
    source = _Named(strategy, STRATEGY_REGISTRY.entry(strategy)) if isinstance(strategy, str) else strategy
    several = source.multi_process if isinstance(source, _Named) else entry_of(type(source())).multi_process
    worlds = [*([(1, tolerance_alone)] if alone else []), *([(processes, tolerance)] if several else [])]
    for size, allowed in worlds:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            trial_of = (accelerator, size, Path(folder), make_model, allowed)
            on_ranks(size, _run_checks, source, tuple(checks), *trial_of, timeout=timeout)


def _run_checks(
    source: Callable[[], str | Strategy],
    checks: tuple[Check, ...],
    accelerator: str,
    processes: int,
    folder: Path,
    make_model: MakeModel,
    tolerance: float,
) -> None:
    """On each rank: the checks one after the other, with one strategy; then its end."""
    fabric = Fabric(accelerator=accelerator, devices=processes, strategy=source())
    fabric._join()  # the processes are there already, however the strategy would have started them
    who = f"{type(fabric.strategy).__name__} on rank {fabric.global_rank} of {processes}"
    for check in checks:
        own_folder = folder / check.__name__
        own_folder.mkdir(exist_ok=True)
        try:
            check(Trial(fabric, own_folder, make_model, tolerance))
        except AssertionError as error:
            raise AssertionError(f"{who} breaks a promise, {check.__name__}: {error}.") from error
    _end(fabric.strategy, who)


def _end(strategy: Strategy, who: str) -> None:
    strategy.teardown()
    promise(not _distributed_is_initialized(), f"{who} leaves its process group behind at `teardown`.")
    strategy.teardown()  # again: does nothing
