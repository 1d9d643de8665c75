"""An iteration over a loader goes on in another process as if it had not been interrupted."""

import copy
import io
import pickle
import random
import warnings
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    WeightedRandomSampler,
)

from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.fabric.utilities.loader_position import Recorder, _Recording
from lightning.fabric.utilities.random_state import is_same, random_state, set_random_state
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.fabric.wrappers import _FabricDataLoader

SAMPLES = 11
EPOCHS = 3


def drawn():
    return [random.randrange(1000), int(np.random.randint(1000)), int(torch.randint(1000, ()))]


class Noisy(Dataset):
    """Its samples have random numbers of all three libraries in them."""

    def __init__(self, samples=SAMPLES):
        self.samples = samples
        self.read = []

    def __len__(self):
        return self.samples

    def __getitem__(self, index):
        self.read.append(index)
        return torch.tensor([index, *drawn()])


class Shuffled(Sampler):
    """Draws as soon as it is asked for an iterator, from python's generator."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return self.samples

    def __iter__(self):
        order = list(range(self.samples))
        random.shuffle(order)
        return iter(order)


class Stream(IterableDataset):
    """Has its own order, each time it is begun; drawn from the generator of the process that it is in."""

    def __init__(self):
        self.samples = SAMPLES

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        mine = range(self.samples)[:: info.num_workers] if info else range(self.samples)
        order = torch.randperm(len(mine)).tolist()
        yield from (torch.tensor([mine[index]]) for index in order)


class StreamWithState(Stream):
    """Knows where it is."""

    def __init__(self):
        super().__init__()
        self.rest = None
        self.read = 0

    def __iter__(self):
        if self.rest is None:
            self.rest = torch.randperm(self.samples).tolist()
        while self.rest:
            self.read += 1
            yield torch.tensor([self.rest.pop(), *drawn()])
        self.rest = None

    def state_dict(self):
        return {"rest": copy.copy(self.rest)}

    def load_state_dict(self, state):
        self.rest = copy.copy(state["rest"])


class LoaderWithState(DataLoader):
    """Stands for loaders of other libraries, which know where they are."""

    passed = 0

    def __iter__(self):
        for number in range(self.passed, len(self)):
            self.passed = number + 1
            yield torch.stack([self.dataset[index] for index in range(2 * number, min(2 * number + 2, SAMPLES))])
        self.passed = 0

    def state_dict(self):
        return {"passed": self.passed}

    def load_state_dict(self, state):
        self.passed = state["passed"]


def generator():
    return torch.Generator().manual_seed(3)


def with_generator(**options):
    own = generator()
    return DataLoader(Noisy(), batch_size=2, sampler=RandomSampler(range(SAMPLES), generator=own, **options))


HERE = {
    "in order": lambda: DataLoader(Noisy(), batch_size=2),
    "shuffled": lambda: DataLoader(Noisy(), batch_size=2, shuffle=True),
    "without the last": lambda: DataLoader(Noisy(), batch_size=2, shuffle=True, drop_last=True),
    "generator of both": lambda: DataLoader(Noisy(), batch_size=2, shuffle=True, generator=generator()),
    "generator of the sampler": with_generator,
    "replacement": lambda: with_generator(replacement=True, num_samples=100),
    "weighted": lambda: DataLoader(Noisy(), batch_size=2, sampler=WeightedRandomSampler([1.0, 2.0] * 5, 9)),
    "single samples": lambda: DataLoader(Noisy(), batch_size=None, sampler=Shuffled(SAMPLES)),
    "python's generator": lambda: DataLoader(Noisy(), batch_size=2, sampler=Shuffled(SAMPLES)),
    "own batches": lambda: DataLoader(Noisy(), batch_sampler=BatchSampler(Shuffled(SAMPLES), 3, True)),
    "distributed": lambda: DataLoader(Noisy(), batch_size=2, sampler=DistributedSampler(range(SAMPLES), 2, 1)),
    "wrapped": lambda: DataLoader(
        Noisy(), batch_size=2, sampler=DistributedSamplerWrapper(Shuffled(SAMPLES), 2, 1, seed=4)
    ),
    "stream": lambda: DataLoader(Stream(), batch_size=2),
    "stream with state": lambda: DataLoader(StreamWithState(), batch_size=2),
    "loader with state": lambda: LoaderWithState(Noisy(), batch_size=2),
}


def with_workers(dataset, number=2, **options):
    return DataLoader(dataset, batch_size=2, num_workers=number, multiprocessing_context="fork", **options)


WORKERS = {
    "workers": lambda: with_workers(Noisy(), shuffle=True),
    "one worker, prefetching": lambda: with_workers(Noisy(), 1, shuffle=True, prefetch_factor=4),
    "workers that stay": lambda: with_workers(Noisy(), shuffle=True, persistent_workers=True),
    "workers, generator": lambda: with_workers(Noisy(), shuffle=True, generator=generator()),
    "workers, distributed": lambda: with_workers(Noisy(), sampler=DistributedSampler(range(SAMPLES), 2, 1)),
    "workers, stream": lambda: with_workers(Stream()),
}


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Training:
    """Draws between batches, as dropout does."""

    def __init__(self, make):
        self.make = make
        self.loader = _FabricDataLoader(make())

    def begin(self):
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(1)
        return self

    def states(self):
        return through_a_file({"loader": self.loader.state_dict(), "random": random_state()})

    def go_on(self, epochs, states=None, stop_at=None):
        """Return the batches, and the states after ``stop_at`` of them, or else those at the end."""
        batches = []
        if states is not None:
            self.loader.load_state_dict(states["loader"])
            set_random_state(states["random"], 0)
        for _ in range(epochs):
            for batch in self.loader:
                batches.append(batch.tolist())
                drawn()
                if len(batches) == stop_at:
                    return batches, self.states()
        return batches, self.states()


def interrupted(make, *stops):
    """Return the batches and the end of a run that goes on, after each of the numbers of batches, in a new loader."""
    training, batches, states = Training(make).begin(), [], None
    for stop in stops:
        more, states = training.go_on(EPOCHS, states, stop)
        batches += more
        training = Training(make)
        drawn()
    more, states = training.go_on(EPOCHS - states["loader"]["epoch"], states)
    return batches + more, states


def assert_same_run(make, *stops):
    batches, end = Training(make).begin().go_on(EPOCHS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        others, other_end = interrupted(make, *stops)
    assert others == batches
    assert is_same(other_end["random"], end["random"])
    assert is_same(other_end["loader"], end["loader"])


@pytest.mark.parametrize("kind", HERE)
def test_goes_on_with_the_same_batches_and_random_states(kind):
    length = len(Training(HERE[kind]).go_on(1)[0])
    for stop in (1, length - 1, length, length + 2, EPOCHS * length):
        assert_same_run(HERE[kind], stop)


@pytest.mark.parametrize("kind", WORKERS)
def test_goes_on_with_workers(kind):
    for stop in (1, 9) if kind in ("workers", "workers that stay") else (3,):
        assert_same_run(WORKERS[kind], stop)


@pytest.mark.parametrize("make", [HERE["shuffled"], WORKERS["workers that stay"]])
def test_goes_on_after_several_interruptions_of_one_epoch(make):
    assert_same_run(make, 3, 2, 4)


def test_what_workers_are_given_can_be_sent_to_a_new_process():
    loader = DataLoader(Noisy(), num_workers=2)
    recorder = Recorder(loader)
    sent = ForkingPickler.loads(ForkingPickler.dumps(_Recording(loader.collate_fn, recorder)))
    sent._memory.write(1)
    assert is_same(recorder._read(1, 1), random_state(include_cuda=False))


@pytest.mark.parametrize("epochs", [1, 2])
def test_goes_on_at_the_end_of_an_epoch(epochs):
    for make in (HERE["shuffled"], HERE["generator of both"], WORKERS["workers that stay"])[:: 1 if epochs == 1 else 2]:
        batches, end = Training(make).begin().go_on(EPOCHS)
        first, states = Training(make).begin().go_on(epochs)
        rest, other_end = Training(make).go_on(EPOCHS - epochs, states)
        assert first + rest == batches
        assert is_same(other_end, end)


def test_the_state_before_the_first_batch_is_that_of_a_new_loader():
    training = Training(HERE["shuffled"]).begin()
    states = training.states()
    batches, _ = training.go_on(EPOCHS)
    assert Training(HERE["shuffled"]).go_on(EPOCHS, states)[0] == batches


def test_the_state_of_a_loader_that_is_about_to_go_on_is_the_one_it_was_given():
    _, states = Training(HERE["shuffled"]).begin().go_on(EPOCHS, stop_at=2)
    loader = _FabricDataLoader(HERE["shuffled"]())
    loader.load_state_dict(states["loader"])
    assert is_same(loader.state_dict(), states["loader"])


def test_a_loop_that_was_left_goes_on():
    loader = _FabricDataLoader(DataLoader(range(8), batch_size=2))
    for batch in loader:
        if 3 in batch:
            break
    other = _FabricDataLoader(DataLoader(range(8), batch_size=2))
    other.load_state_dict(loader.state_dict())
    assert [batch.tolist() for batch in other] == [[4, 5], [6, 7]]
    assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3], [4, 5], [6, 7]]  # here, it is left


def test_samples_that_were_seen_are_not_read_again():
    _, states = Training(HERE["shuffled"]).begin().go_on(EPOCHS, stop_at=3)
    training = Training(HERE["shuffled"])
    training.go_on(1, states)
    assert len(training.loader.dataset.read) == SAMPLES - 6

    _, states = Training(HERE["stream with state"]).begin().go_on(EPOCHS, stop_at=3)
    training = Training(HERE["stream with state"])
    training.go_on(1, states)
    assert training.loader.dataset.read == SAMPLES - 6


def test_batches_that_workers_have_prepared_do_not_count():
    loader = _FabricDataLoader(with_workers(Noisy(), prefetch_factor=3))
    iterator = iter(loader)
    next(iterator)
    assert loader.state_dict()["yielded"] == 1


def test_loading_in_the_middle_of_an_iteration_leaves_its_workers():
    training = Training(WORKERS["workers that stay"]).begin()
    _, states = training.go_on(1, stop_at=3)
    rest, _ = training.go_on(1, states)
    assert rest == Training(WORKERS["workers that stay"]).go_on(1, states)[0]


def test_a_loader_that_knows_where_it_is_can_be_copied_and_pickled():
    training = Training(HERE["generator of both"]).begin()
    training.go_on(1, stop_at=3)
    for clone in (copy.deepcopy(training.loader), pickle.loads(pickle.dumps(training.loader))):
        assert is_same(clone.state_dict(), training.loader.state_dict())


# -- other ranks


@contextmanager
def as_rank(rank):
    before = rank_zero_only.rank
    rank_zero_only.rank = rank
    try:
        yield
    finally:
        rank_zero_only.rank = before


class World:
    """The loaders of several ranks, in one process."""

    def __init__(self, ranks, batch_size, shuffle=True, samples=SAMPLES, alone=None):
        self.loaders = []
        for rank in range(ranks):
            sampler = None if alone else DistributedSampler(range(samples), ranks, rank, shuffle=shuffle, seed=5)
            options = {"shuffle": shuffle} if alone else {"sampler": sampler}
            self.loaders.append(_FabricDataLoader(DataLoader(range(samples), batch_size=batch_size, **options)))

    def load(self, states):
        for rank, loader in enumerate(self.loaders):
            with as_rank(rank):
                loader.load_state_dict(states[min(rank, len(states) - 1)] if rank < len(states) else states[0])
        return self

    def seen(self, batches=None):
        """Return what all ranks see in as many batches or in the rest of an epoch, by rank; and their states then."""
        seen, states = [], []
        for rank, loader in enumerate(self.loaders):
            with as_rank(rank):
                mine = []
                iterator = iter(loader)
                while batches is None or len(mine) < batches:
                    batch = next(iterator, None)
                    if batch is None:
                        break
                    mine.append(batch.tolist())
                seen.append(mine)
                states.append(through_a_file(loader.state_dict()))
        return seen, states


def flat(seen):
    return sorted(index for mine in seen for batch in mine for index in batch)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("samples", [24, 23])
@pytest.mark.parametrize(("before", "after"), [((2, 2), (4, 2)), ((4, 2), (2, 2)), ((2, 2), (3, 1)), ((3, 2), (2, 5))])
def test_what_is_left_of_an_epoch_is_dealt_to_other_ranks(before, after, samples, shuffle):
    seen, states = World(*before, shuffle, samples).seen(2)
    rest, later = World(*after, shuffle, samples).load(states).seen(1)
    last, _ = World(*before, shuffle, samples).load(later).seen()
    all_seen = [*flat(seen), *flat(rest), *flat(last)]
    assert set(all_seen) == set(range(samples))
    assert len(all_seen) - samples < max(before[0], after[0])  # each as often as a sampler gives it at an epoch's end
    assert len({len(mine) for mine in last}) == 1
    again, _ = World(*after, shuffle, samples).load(later).seen()  # on as many ranks as have saved
    assert set(flat(seen)) | set(flat(rest)) | set(flat(again)) == set(range(samples))
    assert len(flat(seen)) + len(flat(rest)) + len(flat(again)) - samples < after[0]


def test_what_is_left_of_an_epoch_goes_to_a_single_rank():
    seen, states = World(2, 2).seen(2)
    single = World(1, 3, alone=True).load(states)
    rest, later = single.seen(1)
    last, _ = World(1, 3, alone=True).load(later).seen()
    assert sorted([*flat(seen), *flat(rest), *flat(last)]) == list(range(SAMPLES))
    assert [len(batch) for batch in single.seen()[0][0]] == [3, 3, 3, 2]  # the next epoch is whole


def test_another_batch_size_goes_on_after_the_same_sample():
    def make(size):
        return lambda: DataLoader(Noisy(), batch_size=size, shuffle=True)

    whole, _ = Training(make(1)).begin().go_on(1)
    torch.manual_seed(1)
    first, states = Training(make(3)).begin().go_on(1, stop_at=2)
    rest, _ = Training(make(1)).go_on(1, states)
    order = [batch[0][0] for batch in whole]
    assert [sample[0] for batch in (*first, *rest) for sample in batch] == order


# -- what cannot be


def test_another_data_set_begins_the_epoch_again():
    _, states = Training(HERE["shuffled"]).begin().go_on(1, stop_at=2)
    other = Training(lambda: DataLoader(Noisy(20), batch_size=2, shuffle=True))
    with pytest.warns(UserWarning, match="begins that epoch again.*its data set has 20 samples, and had 11"):
        assert len(other.go_on(1, states)[0]) == 10


def test_another_generator_begins_the_epoch_again():
    _, states = Training(HERE["generator of the sampler"]).begin().go_on(1, stop_at=2)
    other = Training(lambda: DataLoader(Noisy(), batch_size=2, sampler=RandomSampler(range(SAMPLES))))
    with pytest.warns(UserWarning, match="have 0 generators of their own, and had 1"):
        assert len(other.go_on(1, states)[0]) == 6


def test_workers_that_are_not_in_order_are_named():
    def make():
        return with_workers(Noisy(), in_order=False)

    _, states = Training(make).begin().go_on(1, stop_at=2)
    with pytest.warns(UserWarning, match="as they are ready"):
        assert len(Training(make).go_on(1, states)[0]) == 4


def test_a_rank_without_its_own_state_begins_the_epoch_again():
    _, states = Training(HERE["shuffled"]).begin().go_on(1, stop_at=2)
    states["loader"]["rank"] = 3
    with pytest.warns(UserWarning, match="each rank has an order of its own, and .* rank 3 alone.*`fabric.checkpoints"):
        assert len(Training(HERE["shuffled"]).go_on(1, states)[0]) == 6


def test_a_shuffled_loader_does_not_go_on_with_another_sampler():
    _, states = Training(HERE["shuffled"]).begin().go_on(1, stop_at=2)
    with pytest.warns(UserWarning, match="it has the samplers .*Distributed.*and had .*Random"):
        assert len(Training(HERE["distributed"]).go_on(1, states)[0]) == 3


def test_an_epoch_that_the_user_sets_is_begun():
    _, states = Training(HERE["distributed"]).begin().go_on(2, stop_at=4)
    loader = _FabricDataLoader(HERE["distributed"]())
    loader.load_state_dict(states["loader"])
    loader.sampler.set_epoch(7)
    with pytest.warns(UserWarning, match="was to go on in epoch 1, but `set_epoch` says 7"):
        assert len(list(loader)) == 3


def test_a_sampler_that_shares_the_generator_with_training_is_named():
    class Drawing(Shuffled):
        def __iter__(self):
            return (random.randrange(SAMPLES) for _ in range(SAMPLES))

    make = lambda: DataLoader(Noisy(), batch_size=None, sampler=Drawing(SAMPLES))
    batches, end = Training(make).begin().go_on(EPOCHS)
    with pytest.warns(UserWarning, match="Drawing draws random numbers all through the epoch"):
        others, other_end = interrupted(make, 5)
    assert others == batches  # it has no memory, so this one is exact nevertheless
    assert is_same(other_end, end)


def test_another_number_of_workers_is_named():
    _, states = Training(WORKERS["workers"]).begin().go_on(1, stop_at=4)
    with pytest.warns(UserWarning, match="there are 1 workers, and were 2"):
        rest, _ = Training(lambda: with_workers(Noisy(), 1, shuffle=True)).go_on(1, states)
    seen, _ = Training(WORKERS["workers"]).begin().go_on(1)
    assert [sample[0] for batch in rest for sample in batch] == [sample[0] for batch in seen[4:] for sample in batch]


def test_an_epoch_that_living_workers_did_not_finish_is_named():
    training = Training(WORKERS["workers that stay"]).begin()
    training.go_on(1, stop_at=2)
    _, states = training.go_on(1, stop_at=2)
    with pytest.warns(UserWarning, match="an epoch was left before its end, and `persistent_workers=True`"):
        Training(WORKERS["workers that stay"]).go_on(1, states)


class Counting(Shuffled):
    """An order by the number of the epoch, which nobody tells it."""

    epoch = 0

    def __iter__(self):
        self.epoch += 1
        return iter(random.Random(self.epoch).sample(range(self.samples), self.samples))

    def state_dict(self):
        return {"epoch": self.epoch}

    def load_state_dict(self, state):
        self.epoch = state["epoch"]


class CountingBatches(Counting):
    """The same of batches."""

    def __iter__(self):
        return iter([index] for index in super().__iter__())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "sampling",
    [
        lambda: {"sampler": Counting(SAMPLES)},
        lambda: {"batch_sampler": CountingBatches(SAMPLES)},
        lambda: {"batch_sampler": BatchSampler(Counting(SAMPLES), 2, False)},
    ],
    ids=["sampler", "batch sampler", "inside of one"],
)
def test_a_sampler_with_a_state_gets_that_back(sampling, workers):
    context = {"multiprocessing_context": "fork"} if workers else {}
    make = lambda: DataLoader(Noisy(), num_workers=workers, **context, **sampling())
    each = len(make())
    for stop in (1, each, each + 1, EPOCHS * each - 1):
        assert_same_run(make, stop)


def test_the_innermost_sampler_is_named():
    class Lazy(Shuffled):
        def __iter__(self):
            return (random.randrange(SAMPLES) for _ in range(SAMPLES))

    make = lambda: DataLoader(Noisy(), sampler=Lazy(SAMPLES), batch_size=2)
    with pytest.warns(UserWarning, match="Lazy draws random numbers.*Give it a generator of its own.$"):
        interrupted(make, 2)
