"""Trajectories as a source."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.denoisers import CLASSES, SHAPE, tiny_denoiser
from support.plain_scheduler import PlainConfig

from gdfq.diffusion.sampler import Sampler
from gdfq.diffusion.scheduler import SchedulerConfig
from gdfq.execution.context import Context
from gdfq.graph.capture import Captured
from gdfq.plan.denoiser import captured_denoiser
from gdfq.recipes import QUICK
from gdfq.sources.base import Batch
from gdfq.sources.trajectories import TrajectorySource, places_by_weight

SAMPLER = Sampler(PlainConfig(noise=0.1), SHAPE, 10, torch.arange(CLASSES))


@pytest.fixture(scope="module")
def teacher() -> Captured:
    return captured_denoiser(tiny_denoiser(CLASSES), SAMPLER)


def test_round_has_each_kept_point_of_each_trajectory_once(teacher: Captured) -> None:
    source = TrajectorySource(SAMPLER, batch=6, points=5)
    batches = list(source.stream(teacher, steps=5))
    assert [len(batch) for batch in batches] == [6] * 5
    # Ten calls at 100, 90 .. 10 have five parts of two calls: the second of each is kept.
    kept = [90, 70, 50, 30, 10]
    times = torch.stack([batch.inputs[1] for batch in batches])
    assert Counter(times.flatten().tolist()) == dict.fromkeys(kept, 6)
    for trajectory in range(6):
        assert sorted(times[:, trajectory].tolist(), reverse=True) == kept
        labels = {int(batch.inputs[2][trajectory]) for batch in batches}
        assert len(labels) == 1
    assert all(len(set(batch.inputs[1].tolist())) == 5 for batch in batches)


def test_points_are_those_of_a_trajectory(teacher: Captured) -> None:
    batches = list(TrajectorySource(SAMPLER, batch=3, points=10).stream(teacher, steps=10))
    for trajectory in range(3):
        points = {
            int(b.inputs[1][trajectory]): [x[trajectory : trajectory + 1] for x in b.inputs]
            for b in batches
        }
        state = None
        for time in range(100, 0, -10):
            x, t, label = points[time]
            if state is not None:  # up to the noise of the scheduler
                assert (2 * x - state).std() < 0.2
            with torch.no_grad():
                state = 2 * x - teacher.network(x, t, label) / 10


def test_few_steps_are_all_kept(teacher: Captured) -> None:
    source = TrajectorySource(SAMPLER, batch=2, points=64)
    times = [batch.inputs[1].tolist() for batch in source.stream(teacher, steps=10)]
    assert sorted(time for pair in times for time in pair) == sorted([*range(10, 101, 10)] * 2)


def same(a: Batch, b: Batch) -> bool:
    return all(map(torch.equal, a.inputs, b.inputs))


def test_stream_depends_on_the_seed_and_resumes_anywhere(teacher: Captured) -> None:
    source = TrajectorySource(SAMPLER, batch=4, points=3)
    expected = list(source.stream(teacher, steps=7, context=Context(seed=1)))
    assert same(expected[4], list(source.stream(teacher, steps=7, context=Context(seed=1)))[4])
    assert not same(expected[0], next(source.stream(teacher, steps=7, context=Context(seed=2))))
    assert not same(expected[0], expected[3])  # of another round
    stopped = source.stream(teacher, steps=7, context=Context(seed=1))
    for _ in range(4):
        next(stopped)
    resumed = source.stream(teacher, steps=7, context=Context(seed=1))
    resumed.load_state_dict(stopped.state_dict())
    assert all(same(a, b) for a, b in zip(resumed, expected[4:], strict=True))


def test_pool_holds_trajectories_in_place_of_images(teacher: Captured) -> None:
    pool = QUICK.source.on(TrajectorySource(SAMPLER, batch=4), 12)
    stream = pool.with_batch(4).stream(teacher, steps=6)
    batches = list(stream)
    first = {tuple(row.flatten().tolist()) for batch in batches[:3] for row in batch.inputs[0]}
    second = {tuple(row.flatten().tolist()) for batch in batches[3:] for row in batch.inputs[0]}
    assert first == second
    assert len(first) == 12


def test_equal_weights_keep_the_middles_of_equal_parts() -> None:
    assert places_by_weight(torch.ones(10), 5) == [1, 3, 5, 7, 9]
    assert places_by_weight(torch.ones(3), 16) == [0, 1, 2]


def test_places_are_denser_where_weights_are_large() -> None:
    # 4.5 in all: four parts of 1.125, whose middles are at 0.5625, 1.6875, 2.8125 and 3.9375.
    assert places_by_weight(torch.tensor([1, 1, 1, 0.6, 0.3, 0.3, 0.3]), 16) == [0, 1, 2, 5]
    assert places_by_weight(torch.tensor([1.0, 1e-3, 1e-3]), 16) == [0]


@given(
    st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=60),
    st.integers(1, 20),
)
def test_places_are_different_ones_in_their_order(weights: list[float], count: int) -> None:
    places = places_by_weight(torch.tensor(weights), count)
    assert 1 <= len(places) <= count
    assert places == sorted(set(places))
    assert 0 <= places[0] <= places[-1] < len(weights)


@pytest.mark.needs("diffusers")
def test_last_calls_whose_errors_hardly_matter_give_no_points() -> None:
    config = SchedulerConfig.of({"_class_name": "DDIMScheduler", "prediction_type": "epsilon"})
    sampler = Sampler(config, SHAPE, 20)
    source = TrajectorySource(sampler, batch=2)
    batches = source.stream(captured_denoiser(tiny_denoiser(), sampler), steps=16)
    times = sorted({float(time) for batch in batches for time in batch.inputs[1]})
    assert len(times) == 16
    assert min(times) > float(sampler.timesteps[-2])
