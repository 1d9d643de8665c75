"""States of the generators, as what can be in any file."""

import io
import random

import numpy as np
import pytest
import torch

from lightning.fabric.utilities.random_state import is_same, random_state, seed_for, set_random_state


def drawn():
    normal = [random.gauss(0, 1), np.random.randn(), torch.randn(3).tolist()]
    return [random.random(), np.random.rand(), torch.rand(3).tolist(), *normal]


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_what_is_drawn_next_is_in_the_state():
    random.gauss(0, 1), np.random.randn()  # there is a second one in store
    state = through_a_file(random_state())
    first = drawn()
    set_random_state(state, 0)
    assert drawn() == first
    set_random_state(state, 0)
    assert is_same(random_state(), state)


def test_another_generator_of_numpy_is_restored(monkeypatch):
    philox = np.random.RandomState(np.random.Philox(3))
    monkeypatch.setattr(np.random, "get_state", philox.get_state)
    monkeypatch.setattr(np.random, "set_state", philox.set_state)
    philox.randn()
    state = through_a_file(random_state())
    first = philox.randn(3).tolist()
    set_random_state(state, 0)
    assert philox.randn(3).tolist() == first


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("python", {"version": 3, "words": torch.tensor([1, 2]), "gauss": None}),
        ("numpy", {"bit_generator": "PCG64", "state": {}, "has_gauss": 0, "gauss": 0.0}),
        ("torch", torch.zeros(3, dtype=torch.uint8)),
        ("torch", torch.zeros(5056, dtype=torch.uint8)),
        ("numpy", "?"),
    ],
)
def test_what_is_no_state_is_named_and_changes_nothing(name, wrong):
    before = random_state()
    random.seed(5)
    other = {**before, "python": random_state()["python"], name: wrong}
    set_random_state(before, 0)
    with pytest.raises(RuntimeError, match=f"random state of rank 5 cannot be restored; that of {name} does not fit"):
        set_random_state(other, 5)
    assert is_same(random_state(), before)


def test_a_generator_that_does_not_take_the_state_is_named(monkeypatch):
    state = random_state()
    torch.rand(1)
    monkeypatch.setattr(np.random, "set_state", lambda state: None)
    np.random.rand(400)
    with pytest.raises(RuntimeError, match="that of numpy does not fit.*another one when it is read back"):
        set_random_state(state, 0)


def test_each_rank_and_step_has_seeds_of_its_own():
    found = []
    for seed, step, rank in [(1, 10, 2), (1, 10, 2), (1, 10, 3), (1, 11, 2), (2, 10, 2)]:
        seed_for(seed, step, rank)
        found.append(drawn()[:3])
    assert found[0] == found[1]
    assert all(len({str(each[number]) for each in found}) == 4 for number in range(3))


def test_states_without_cuda_devices_here_are_left_out_with_a_warning(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    state = {**random_state(include_cuda=False), "torch.cuda": {"states": [torch.zeros(16)], "current": 0}}
    with pytest.warns(UserWarning, match="random states of CUDA devices, and there is none here"):
        set_random_state(state, 0)


@pytest.mark.gpu
def test_cuda_is_restored():
    torch.rand(1, device="cuda")
    state = through_a_file(random_state())
    first = torch.rand(3, device="cuda").tolist()
    set_random_state(state, 0)
    assert torch.rand(3, device="cuda").tolist() == first
    elsewhere = [torch.zeros(16, dtype=torch.uint8), *state["torch.cuda"]["states"]]
    set_random_state({**state, "torch.cuda": {"states": elsewhere, "current": 1 + state["torch.cuda"]["current"]}}, 0)
    assert torch.rand(3, device="cuda").tolist() == first


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ({"a": [torch.ones(2)]}, {"a": [torch.ones(2)]}, True),
        ({"a": torch.ones(2)}, {"a": torch.zeros(2)}, False),
        ({"a": 1}, {"b": 1}, False),
        ([1, 2], [1], False),
        (torch.ones(1), 1, False),
    ],
)
def test_nestings_are_compared(first, second, same):
    assert is_same(first, second) is same
