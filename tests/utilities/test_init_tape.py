"""What is recorded on the meta device and played back is, to the bit, what making it for real gives."""

import copy
import gc
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning.fabric.utilities import init_tape
from lightning.fabric.utilities.init_tape import (
    fill_from_recordings,
    forget_what_is_gone,
    is_recorded,
    recorded_source,
    recording_init,
)

Make = Callable[[], nn.Module]


class Holder(nn.Module):
    """A module of whatever ``build`` puts on it."""

    def __init__(self, build: Callable[["Holder"], object]) -> None:
        super().__init__()
        build(self)


@pytest.fixture(autouse=True)
def _no_recordings() -> Iterator[None]:
    init_tape._RECORDINGS.clear()
    yield
    init_tape._RECORDINGS.clear()


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """By name; a tied one under each of its names."""
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return dict(named)


def _filled(*modules: nn.Module) -> list[dict[str, Tensor]]:
    """The values of the modules; real tensors as they are."""
    values: dict[Tensor, Tensor] = {}
    meta = {tensor for module in modules for tensor in _tensors(module).values() if tensor.is_meta}
    left = fill_from_recordings({tensor: (lambda value, t=tensor: values.update({t: value})) for tensor in meta}, "cpu")
    assert not left
    assert values.keys() == meta
    return [{name: values.get(t, t).detach() for name, t in _tensors(module).items()} for module in modules]


def _assert_same(values: dict[str, Tensor], module: nn.Module) -> None:
    expected = _tensors(module)
    assert values.keys() == expected.keys()
    for name, tensor in expected.items():
        assert values[name].dtype == tensor.dtype, name
        if tensor.clone().stride() == tensor.stride():  # a copy on the meta device has no gaps and overlaps
            assert values[name].stride() == tensor.stride(), name
        assert torch.equal(values[name], tensor.detach()), name


def _check(make: Make, all_on_meta: bool = True) -> None:
    torch.manual_seed(3)
    torch.randn(3)  # a state in the middle of things
    start = torch.get_rng_state()
    for_real = make()
    end = torch.get_rng_state()
    torch.set_rng_state(start)
    with recording_init():
        recorded = make()
    if all_on_meta:
        assert all(tensor.is_meta for tensor in _tensors(recorded).values())
    (values,) = _filled(recorded)
    _assert_same(values, for_real)
    assert torch.equal(torch.get_rng_state(), end)


# ---- modules of torch ------------------------------------------------------------------------------------------------

MODULES: dict[str, Make] = {
    "linear": lambda: nn.Linear(30, 20),
    "no bias": lambda: nn.Linear(3, 2, bias=False),
    "attention": lambda: nn.MultiheadAttention(8, 2),
    "lstm": lambda: nn.LSTM(4, 8, 2, bidirectional=True),
    "batch norm": lambda: nn.BatchNorm2d(4),
    "embedding": lambda: nn.Embedding(10, 4, padding_idx=2),
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 3),
    "convolutions": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(3, 4, 2), nn.PReLU()),
    "channels last": lambda: nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last),
    "bilinear": lambda: nn.Sequential(nn.Bilinear(3, 4, 5), nn.EmbeddingBag(10, 3), nn.GroupNorm(2, 4)),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2)),
    "orthogonal": lambda: nn.utils.parametrizations.orthogonal(nn.Linear(3, 3)),
    "tall orthogonal": lambda: nn.utils.parametrizations.orthogonal(nn.Linear(3, 5)),
    "half": lambda: nn.Linear(20, 3).half(),
    "deep copy": lambda: nn.ModuleList([copy.deepcopy(layer) for layer in [nn.Linear(3, 3)] * 2]),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_of_torch(name: str) -> None:
    _check(MODULES[name])


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_a_whole_transformer() -> None:
    _check(lambda: nn.Transformer(16, 2, 2, 2, 32))


INITS: dict[str, Callable[[Tensor], object]] = {
    "uniform": nn.init.uniform_,
    "normal": nn.init.normal_,
    "truncated": lambda t: nn.init.trunc_normal_(t, std=0.02, a=-0.03, b=0.03),
    "truncated far out": lambda t: nn.init.trunc_normal_(t, a=2, b=3),
    "constant": lambda t: nn.init.constant_(t, 0.3),
    "ones": nn.init.ones_,
    "eye": nn.init.eye_,
    "xavier uniform": nn.init.xavier_uniform_,
    "xavier normal": nn.init.xavier_normal_,
    "kaiming uniform": nn.init.kaiming_uniform_,
    "kaiming normal": nn.init.kaiming_normal_,
    "orthogonal": lambda t: nn.init.orthogonal_(t, gain=2.0),
    "sparse": lambda t: nn.init.sparse_(t, 0.3),
    "exponential": lambda t: t.detach().exponential_(),
    "bernoulli": lambda t: t.detach().bernoulli_(0.3),
    "integers": lambda t: t.detach().random_(0, 10),
    "data": lambda t: t.data.normal_().clamp_(-0.5, 0.5),
    "rows": lambda t: t.data[1:].uniform_(),
    "from numpy": lambda t: t.data.copy_(torch.from_numpy(np.arange(t.numel()).reshape(t.shape))),
    "assigned": lambda t: t.data.__setitem__((slice(None), 0), 5.0),
    "masked": lambda t: t.data.normal_().masked_fill_(t.data > 0, 1.0),
    "normalised": lambda t: t.data.normal_().div_(t.data.norm()),
}


@pytest.mark.parametrize("shape", [(7, 9), (9, 7), (40, 3)])
@pytest.mark.parametrize("name", INITS)
def test_ways_to_initialise(name: str, shape: tuple[int, int]) -> None:
    def build(module: Holder) -> None:
        module.before = nn.Linear(2, 2)
        module.weight = nn.Parameter(torch.zeros(shape))
        with torch.no_grad():
            INITS[name](module.weight)
        module.after = nn.Linear(2, 2)

    _check(lambda: Holder(build))


def test_dirac() -> None:
    _check(lambda: Holder(lambda m: setattr(m, "w", nn.Parameter(nn.init.dirac_(torch.empty(4, 2, 3))))))


# ---- buffers and values ----------------------------------------------------------------------------------------------


def _sinusoids(module: Holder) -> None:
    position = torch.arange(10).unsqueeze(1)
    step = torch.exp(torch.arange(0, 6, 2) * (-math.log(10000.0) / 6))
    table = torch.zeros(10, 6)
    table[:, 0::2] = torch.sin(position * step)
    table[:, 1::2] = torch.cos(position * step)
    module.register_buffer("table", table)


def _constants(module: Holder) -> None:
    module.register_buffer("list", torch.tensor([1.0, 2.0]))
    module.register_buffer("scalar", torch.tensor(3))
    module.register_buffer("array", torch.as_tensor(np.arange(3.0)))
    module.register_buffer("same", torch.asarray([True, False]))
    module.register_buffer("typed", torch.ones(2, dtype=torch.float64).new_tensor([3, 4]))
    module.register_buffer("mixed", torch.ones(3) + torch.from_numpy(np.arange(3, dtype=np.float32)))
    module.weight = nn.Parameter(torch.tensor([0.1, 0.2]))
    module.leaf = nn.Parameter(torch.tensor([0.1], requires_grad=True))


def _computed(module: Holder) -> None:
    module.register_buffer("mask", torch.tril(torch.ones(4, 4)).bool())
    module.register_buffer("frequencies", 1.0 / (10000 ** (torch.arange(0, 8, 2).float() / 8)))
    module.register_buffer("complex", torch.polar(torch.ones(3), torch.arange(3.0)))
    module.register_buffer("conjugate", torch.polar(torch.ones(3), torch.arange(3.0)).conj())
    module.register_buffer("wide", torch.arange(3).expand(2, -1))
    module.register_buffer("slice", torch.arange(12.0).reshape(3, 4)[1:, ::2])
    module.weight = nn.Parameter(torch.randn(5, 5) * 0.02)
    module.product = nn.Parameter(module.weight.data.t() @ module.weight.data)
    module.resized = nn.Parameter(torch.empty(2).resize_(4).fill_(1))


def _asked_for(module: Holder) -> None:
    rates = [rate.item() for rate in torch.linspace(0, 0.1, 5)]
    module.rate = nn.Parameter(torch.full((3,), rates[2]))
    drawn = torch.randn(3)
    module.drawn = nn.Parameter(torch.full((2,), float(drawn[0])))
    module.listed = nn.Parameter(torch.tensor(drawn.tolist()))
    module.array = nn.Parameter(torch.tensor(drawn.numpy() * 2))
    if bool((drawn > -10).all()) and torch.equal(drawn, drawn) and torch.allclose(drawn, drawn):
        module.branch = nn.Parameter(torch.randn(2))
    module.register_buffer("where", torch.tensor([1, 0, 1]).nonzero())
    module.register_buffer("kept", drawn[drawn > -10])
    module.after = nn.Linear(2, 2)


@pytest.mark.parametrize("build", [_sinusoids, _constants, _computed, _asked_for])
def test_buffers_and_values(build: Callable[[Holder], None]) -> None:
    _check(lambda: Holder(build))


def test_the_default_dtype_is_that_of_the_moment() -> None:
    def make() -> nn.Module:
        torch.set_default_dtype(torch.bfloat16)
        try:
            return Holder(
                lambda m: (setattr(m, "layer", nn.Linear(20, 3)), m.register_buffer("thirds", torch.arange(3) / 3))
            )
        finally:
            torch.set_default_dtype(torch.float32)

    _check(make)
    assert torch.get_default_dtype() == torch.float32


def test_what_was_never_written_is_zero() -> None:
    with recording_init():
        module = Holder(lambda m: setattr(m, "weight", nn.Parameter(torch.empty(3, 2))))
        module.weight.data[1] = 1.0
        module.other = nn.Parameter(torch.empty(2))
    (values,) = _filled(module)
    assert values["weight"].tolist() == [[0, 0], [1, 1], [0, 0]]
    assert values["other"].tolist() == [0, 0]


def test_a_real_tensor_may_be_changed_after_it_was_used() -> None:
    source = torch.ones(3)
    with recording_init():
        module = Holder(lambda m: setattr(m, "weight", nn.Parameter(torch.empty(3))))
        module.weight.data.copy_(source)
    source.zero_()
    assert _filled(module)[0]["weight"].tolist() == [1, 1, 1]


def test_values_may_be_copied_out_of_a_recording() -> None:
    def build(module: Holder) -> None:
        module.weight = nn.Parameter(torch.randn(3))
        module.real = np.zeros(3, dtype=np.float32)
        torch.from_numpy(module.real).copy_(module.weight.detach())
        module.copied = nn.Parameter(torch.tensor(module.real))

    _check(lambda: Holder(build))


# ---- random numbers --------------------------------------------------------------------------------------------------


def _drawn_for_real(module: Holder) -> None:
    module.first = nn.Linear(3, 4)
    module.real = nn.Parameter(torch.Tensor(3, 4).normal_())
    module.second = nn.Linear(3, 4)
    module.also_real = nn.Parameter(torch.randn(3, device="cpu"))
    module.real_again = nn.Parameter(torch.normal(0.0, 1.0, size=(3,)))
    module.third = nn.Linear(3, 4)


def test_real_draws_come_in_their_turn() -> None:
    _check(lambda: Holder(_drawn_for_real), all_on_meta=False)


def _set_by_program(module: Holder) -> None:
    module.first = nn.Linear(3, 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module.second = nn.Linear(3, 4)
    module.third = nn.Linear(3, 4)
    state = torch.get_rng_state()
    module.fourth = nn.Linear(3, 4)
    torch.set_rng_state(state)
    module.same_as_fourth = nn.Linear(3, 4)
    torch.manual_seed(9)
    module.fifth = nn.Linear(3, 4)


def test_the_program_may_set_the_state() -> None:
    _check(lambda: Holder(_set_by_program))


def test_a_state_set_at_the_end_is_the_end() -> None:
    def build(module: Holder) -> None:
        module.first = nn.Linear(3, 4)
        with torch.random.fork_rng(devices=[]):
            module.second = nn.Linear(3, 4)

    _check(lambda: Holder(build))


def test_a_generator_of_ones_own() -> None:
    generators = []

    def build(module: Holder) -> None:
        generator = torch.Generator().manual_seed(5)
        module.first = nn.Parameter(torch.randn(3, generator=generator))
        module.second = nn.Parameter(torch.empty(3).normal_(generator=generator))
        module.third = nn.Linear(2, 2)
        module.fourth = nn.Parameter(nn.init.trunc_normal_(torch.empty(3, 3), generator=generator))
        generators.append(generator)

    _check(lambda: Holder(build))
    for_real, recorded = generators
    assert torch.equal(for_real.get_state(), recorded.get_state())


def test_a_draw_whose_length_depends_on_values() -> None:
    def build(module: Holder) -> None:
        module.weights = nn.Parameter(torch.rand(50))
        module.register_buffer("chosen", torch.multinomial(module.weights.detach(), 20))
        module.register_buffer("counts", torch.poisson(module.weights.detach() * 20))
        module.last = nn.Linear(2, 2)

    _check(lambda: Holder(build))


# ---- several recordings ----------------------------------------------------------------------------------------------


def _two_for_real() -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(7)
    first, second = MODULES["encoder"](), MODULES["lstm"]()
    return first, second, torch.get_rng_state()


def _two_recorded(together: bool = False) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(7)
    if together:
        with recording_init():
            return MODULES["encoder"](), MODULES["lstm"]()
    with recording_init():
        first = MODULES["encoder"]()
    with recording_init():
        return first, MODULES["lstm"]()


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_models_in_any_order(order: tuple[int, int], together: bool) -> None:
    """As two that were made for real, one after the other."""
    *for_real, end = _two_for_real()
    recorded = _two_recorded(together)
    for number in order:
        (values,) = _filled(recorded[number])
        _assert_same(values, for_real[number])
    assert torch.equal(torch.get_rng_state(), end)


def test_two_models_at_once() -> None:
    first, second, end = _two_for_real()
    values = _filled(*_two_recorded())
    _assert_same(values[0], first)
    _assert_same(values[1], second)
    assert torch.equal(torch.get_rng_state(), end)


def test_the_second_does_not_need_the_first_to_be_there() -> None:
    _, for_real, _ = _two_for_real()
    torch.manual_seed(7)
    with recording_init():
        MODULES["encoder"]()
    gc.collect()
    with recording_init():
        second = MODULES["lstm"]()
    _assert_same(_filled(second)[0], for_real)


def test_a_second_may_be_a_copy_of_the_first() -> None:
    torch.manual_seed(1)
    with recording_init():
        first = nn.Linear(3, 3)
    with recording_init():
        second = nn.Linear(3, 3)
        second.load_state_dict(first.state_dict())
    torch.manual_seed(1)
    for_real = nn.Linear(3, 3)
    _assert_same(_filled(second)[0], for_real)
    _assert_same(_filled(first)[0], for_real)


def test_layer_by_layer() -> None:
    torch.manual_seed(1)
    for_real = nn.Sequential(*[nn.Linear(3, 3) for _ in range(40)])
    torch.manual_seed(1)
    recorded = nn.Sequential()
    for _ in range(40):
        with recording_init():
            recorded.append(nn.Linear(3, 3))
    _assert_same(_filled(recorded)[0], for_real)


def test_one_after_the_first_was_filled() -> None:
    first_for_real, second_for_real, end = _two_for_real()
    torch.manual_seed(7)
    with recording_init():
        first = MODULES["encoder"]()
    _assert_same(_filled(first)[0], first_for_real)
    with recording_init():
        second = MODULES["lstm"]()
    _assert_same(_filled(second)[0], second_for_real)
    assert torch.equal(torch.get_rng_state(), end)


def test_a_second_of_the_same_seed_does_not_go_on_from_the_first() -> None:
    torch.manual_seed(1)
    for_real = nn.Linear(4, 4)
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        with recording_init():
            models.append(nn.Linear(4, 4))
    for model in models:
        _assert_same(_filled(model)[0], for_real)


def test_a_second_after_other_draws_from_the_same_seed_goes_on_from_these() -> None:
    torch.manual_seed(1)
    with recording_init():
        first = nn.Linear(4, 4, bias=False)
    for drawn in range(6):
        torch.manual_seed(1)
        torch.rand(drawn)
        for_real = nn.Linear(4, 4)
        torch.manual_seed(1)
        torch.rand(drawn)
        with recording_init():
            second = nn.Linear(4, 4)
        _assert_same(_filled(second)[0], for_real)
    assert is_recorded(first.weight)


def test_what_was_drawn_since_stays_drawn() -> None:
    """Filling neither repeats nor skips the numbers that the program draws."""
    torch.manual_seed(1)
    with recording_init():
        module = nn.Linear(4, 4)
    torch.manual_seed(2)
    torch.rand(3)
    before = torch.get_rng_state()
    _filled(module)
    assert torch.equal(torch.get_rng_state(), before)


def test_recordings_may_be_nested() -> None:
    def make() -> nn.Module:
        with recording_init():
            inner = nn.Linear(2, 3)
        return nn.Sequential(inner, nn.Linear(3, 2))

    torch.manual_seed(3)
    for_real = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    torch.manual_seed(3)
    with recording_init():
        recorded = make()
    _assert_same(_filled(recorded)[0], for_real)
    assert len(init_tape._RECORDINGS) == 1


def test_a_thread_has_a_recording_of_its_own() -> None:
    """And makes its modules for real, if it is not inside."""
    others: list[nn.Module] = []

    def make() -> None:
        others.append(nn.Linear(2, 2))
        with recording_init():
            others.append(nn.Linear(2, 2))

    with recording_init():
        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        mine = nn.Linear(2, 2)
    assert not others[0].weight.is_meta
    assert len(init_tape._RECORDINGS) == 2
    assert init_tape._RECORDINGS[0].knows(mine.weight)
    assert init_tape._RECORDINGS[1].knows(others[1].weight)


def test_an_error_inside_ends_the_recording() -> None:
    with pytest.raises(ZeroDivisionError), recording_init():
        nn.Linear(2, 2)
        _ = 1 / 0
    assert not nn.Linear(2, 2).weight.is_meta
    assert not torch.empty(1).is_meta


def test_callbacks_run_as_outside() -> None:
    """With the modes and the default dtype of the caller; only gradients are off."""
    with recording_init():
        module = nn.Linear(2, 2).double()
        torch.set_default_dtype(torch.float64)
        module.weight.data.fill_(1 / 3)
    torch.set_default_dtype(torch.float16)
    seen: list[Tensor] = []
    with FlopCounterMode(display=False) as counter:
        fill_from_recordings({module.weight: lambda value: seen.append(value.half() @ torch.ones(2, 2))}, "cpu")
    assert seen[0].dtype == torch.float16
    assert counter.get_total_flops() == 16
    assert not seen[0].requires_grad


def test_an_error_of_a_callback_leaves_the_generator_as_it_was() -> None:
    with recording_init():
        module = nn.Linear(2, 2)
    before = torch.get_rng_state()

    def fail(value: Tensor) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fill_from_recordings({module.weight: fail}, "cpu")
    assert torch.equal(torch.get_rng_state(), before)


def _agreements(build: Callable[[Holder], None], seed: int) -> list[Tensor]:
    """What rank 0 would send."""
    sent: list[Tensor] = []
    torch.manual_seed(seed)
    with recording_init():
        module = Holder(build)

    def send(own: Tensor) -> Tensor:
        sent.append(own.clone())
        return own

    fill_from_recordings({next(iter(_tensors(module).values())): lambda value: None}, "cpu", send)
    return sent


def test_ranks_agree_on_the_states_in_one_go() -> None:
    """The other rank's numbers are used, and one's own are kept for later. Rank 0's seed is one that is set inside."""
    torch.manual_seed(1)
    for_real = Holder(_set_by_program)
    sent = _agreements(_set_by_program, seed=1)
    torch.manual_seed(2)
    with recording_init():
        second = Holder(_set_by_program)
    before = torch.get_rng_state()
    values = {}
    wanted = {tensor: (lambda value, n=name: values.update({n: value})) for name, tensor in _tensors(second).items()}
    left = sent.copy()
    fill_from_recordings(wanted, "cpu", lambda own: left.pop(0))
    _assert_same(values, for_real)
    assert len(sent) == 2  # sizes, and states
    assert not left
    assert torch.equal(torch.get_rng_state(), before)


def _of_values_asked_for(holder: Holder) -> None:
    """Torch has no such operation on the meta device, so what comes out is a constant of the recording."""
    holder.register_buffer("base", torch.from_numpy(torch.randn(3, 2).numpy() * 2) + torch.zeros(3, 2))
    holder.register_buffer("order", torch.randn(5).sort().indices[torch.rand(5) > 2])
    holder.register_buffer("flag", torch.tensor(torch.rand(()).item() > 0.5))


def test_ranks_agree_on_values_that_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning.fabric.utilities.init_tape._BUCKET_BYTES", 10)
    torch.manual_seed(1)
    for_real = Holder(_of_values_asked_for)
    sent = _agreements(_of_values_asked_for, seed=1)
    torch.manual_seed(2)
    with recording_init():
        second = Holder(_of_values_asked_for)
    values = {}
    wanted = {tensor: (lambda value, n=name: values.update({n: value})) for name, tensor in _tensors(second).items()}
    fill_from_recordings(wanted, "cpu", lambda own: sent.pop(0))
    assert not sent
    _assert_same(values, for_real)


def test_ranks_that_took_other_steps_are_told_so() -> None:
    def other(holder: Holder) -> None:
        for _ in range(2):
            _of_values_asked_for(holder)

    sent = _agreements(_of_values_asked_for, seed=1)
    with recording_init():
        second = Holder(other)
    with pytest.raises(RuntimeError, match="not initialised as that of rank 0.*seed_everything"):
        fill_from_recordings({second.base: lambda value: None}, "cpu", lambda own: sent.pop(0))
    assert not sent  # the others do not wait


# ---- what there is a recording of ------------------------------------------------------------------------------------


def test_others_are_returned() -> None:
    with torch.device("meta"):
        plain = nn.Linear(2, 2)
    with recording_init():
        recorded = nn.Linear(2, 2)
    real = nn.Parameter(torch.ones(2))
    seen: list[Tensor] = []
    wanted = {plain.weight: seen.append, recorded.weight: seen.append, real: seen.append}
    assert fill_from_recordings(wanted, "cpu") == {plain.weight, real}
    assert len(seen) == 1
    assert is_recorded(recorded.bias)
    assert not is_recorded(plain.bias)


def test_what_depends_on_others_is_not_recorded() -> None:
    outside, never_seen = torch.empty(2, device="meta"), torch.empty((), device="meta")
    with recording_init():
        module = Holder(lambda m: setattr(m, "weight", nn.Parameter(outside + 1)))
        module.other = nn.Parameter(torch.ones(2))
        with pytest.raises(RuntimeError, match="meta"):
            outside.sum().item()
        with pytest.raises(RuntimeError, match="meta"):
            never_seen.item()
    assert not is_recorded(module.weight)
    assert is_recorded(module.other)


def test_views_are_known_by_their_memory() -> None:
    with recording_init():
        module = nn.Linear(3, 2)
    seen: list[Tensor] = []
    fill_from_recordings({module.weight.data[1]: seen.append, module.weight: seen.append}, "cpu")
    row, whole = sorted(seen, key=Tensor.dim)
    assert torch.equal(row, whole[1])


def test_the_tensor_before_a_conversion_is_remembered() -> None:
    with recording_init():
        module = nn.BatchNorm1d(2)
    made = module.weight.data
    module.to(torch.bfloat16)
    assert not is_recorded(module.weight)
    source = recorded_source(module, "weight")
    assert source is not None
    assert source.data_ptr() == made.data_ptr()
    assert source.dtype == torch.float32
    assert recorded_source(module, "running_mean") is not None
    assert recorded_source(module, "absent") is None
    assert recorded_source(nn.Linear(2, 2), "weight") is None


# ---- memory ----------------------------------------------------------------------------------------------------------


def _handed_over(make: Make) -> list[tuple[str, int]]:
    """For each tensor, in the order of being handed over: its name, and how many others are in memory."""
    with recording_init():
        module = make()
    alive: list[Any] = []
    players: list[Any] = []
    original = init_tape._Player.__init__

    def remember(self: Any, *args: Any) -> None:
        original(self, *args)
        players.append(self)

    init_tape._Player.__init__ = remember  # type: ignore[method-assign]
    try:
        fill_from_recordings(
            {
                tensor: (lambda value, n=name: alive.append((n, len(players[-1]._real))))
                for name, tensor in module.named_parameters()
            },
            "cpu",
        )
    finally:
        init_tape._Player.__init__ = original  # type: ignore[method-assign]
    return alive


def test_a_tensor_is_handed_over_before_the_next_is_made() -> None:
    handed = _handed_over(lambda: nn.Sequential(*[nn.Linear(4, 4) for _ in range(5)]))
    assert [name for name, _ in handed] == [f"{layer}.{name}" for layer in range(5) for name in ("weight", "bias")]
    assert {others for _, others in handed} == {0}


def test_a_second_round_of_initialisation_needs_no_memory_for_the_first() -> None:
    def again(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight)
            nn.init.zeros_(module.bias)

    handed = _handed_over(lambda: nn.Sequential(*[nn.Linear(4, 4) for _ in range(5)]).apply(again))
    assert len(handed) == 10
    assert {others for _, others in handed} == {0}


def test_a_recording_goes_with_its_tensors() -> None:
    with recording_init():
        module = nn.Linear(2, 2)
    _filled(module)
    forget_what_is_gone()
    assert len(init_tape._RECORDINGS) == 1  # the tensors might be wanted again
    assert is_recorded(module.weight)
    del module
    gc.collect()
    forget_what_is_gone()
    assert not init_tape._RECORDINGS
    assert not init_tape._MADE


def test_of_tensors_that_are_gone_only_draws_stay() -> None:
    """For the random numbers of the next ones."""

    def make() -> nn.Module:
        return Holder(lambda m: (_constants(m), setattr(m, "w", nn.Parameter(torch.randn(3) * 0.02))))

    torch.manual_seed(1)
    for _ in range(100):
        make()
    for_real = make()
    torch.manual_seed(1)
    for _ in range(100):
        with recording_init():
            make()
        gc.collect(0)
    with recording_init():
        recorded = make()
    (recording,) = init_tape._RECORDINGS
    assert sum(step.draw is not None for step in recording.steps) == 101
    assert len(recording.steps) < 450
    assert len(recording.memories) < 700
    _assert_same(_filled(recorded)[0], for_real)


# ---- any model -------------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[], nn.Module]] = {
    **{name: make for name, make in MODULES.items() if name not in ("encoder", "spectral norm")},
    **{f"init {name}": (lambda fill=fill: Holder(lambda m: _parameter(m, fill))) for name, fill in INITS.items()},
    **{build.__name__: (lambda build=build: Holder(build)) for build in (_sinusoids, _constants, _computed)},
    "asked": lambda: Holder(_asked_for),
    "set": lambda: Holder(_set_by_program),
    "real": lambda: Holder(_drawn_for_real),
}


def _parameter(module: Holder, fill: Callable[[Tensor], object]) -> None:
    module.weight = nn.Parameter(torch.zeros(6, 5))
    with torch.no_grad():
        fill(module.weight)


def _reinitialise(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        if parameter.dim() > 1 and parameter.is_floating_point():
            nn.init.xavier_uniform_(parameter)


@settings(max_examples=60, deadline=None)
@given(
    names=st.lists(st.sampled_from(sorted(PARTS)), min_size=1, max_size=6),
    again=st.booleans(),
    copied=st.booleans(),
    tied=st.booleans(),
)
def test_any_model(names: list[str], again: bool, copied: bool, tied: bool) -> None:
    def make() -> nn.Module:
        model = nn.ModuleList(PARTS[name]() for name in names)
        if copied:
            model.append(copy.deepcopy(model[0]))
        if tied:
            model.append(model[0])
        return model.apply(_reinitialise) if again else model

    _check(make, all_on_meta=False)
