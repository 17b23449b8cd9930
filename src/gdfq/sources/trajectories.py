"""Trajectories of a diffusion model: the inputs that its sampler gives the denoiser."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from gdfq.diffusion.sampler import Sampler
from gdfq.diffusion.weights import MinSnr
from gdfq.execution.context import Context
from gdfq.execution.progress import Step
from gdfq.execution.seeding import stream as random_stream
from gdfq.files.plain_values import tagged
from gdfq.graph.capture import Captured
from gdfq.graph.memory import forward_images
from gdfq.graph.outputs import in_parts
from gdfq.sources.base import Batch, Source
from gdfq.sources.stream import Stream

_SEEDS = 2**62
"""Number of the seeds of trajectories."""


@tagged("TrajectorySource")
@dataclass(frozen=True)
class TrajectorySource(Source):
    """Images, time steps and conditions on the trajectories of the full-precision denoiser.

    A round runs `batch` trajectories and gives `points` batches. Each batch has one point of each
    of them: batch j has point (i + j) mod `points` of trajectory i. So every batch covers the
    calls of a trajectory, and no two batches of a round have a point in common.

    The points of a trajectory are denser where an error of the prediction changes the image more:
    they divide the Min-SNR weights of its calls evenly (`places_by_weight`). The inputs of the last
    calls, which are unlike all others and hardly matter, would widen grids that all calls share.

    Attributes:
        sampler: How the denoiser is called.
        batch: Trajectories of a round, and points of a batch.
        points: Points that are kept of each trajectory, at most.
    """

    sampler: Sampler
    batch: int
    points: int = 16

    def stream(self, teacher: Captured, *, steps: int, context: Context = Context()) -> Stream:
        """Yield `steps` batches."""
        calls = self.sampler.calls
        weights = MinSnr(self.sampler.scheduler).weights(self.sampler.timesteps)
        places = places_by_weight(weights, self.points)
        points = len(places)
        offsets = torch.arange(self.batch)
        rounds = -(-steps // points)
        at_once = forward_images(teacher.network.graph, context.memory, teacher.device)

        @lru_cache(maxsize=1)  # the batches of a round follow one another
        def of_round(number: int) -> tuple[Tensor, ...]:
            """Return the kept inputs of a round, a tensor [points, batch, *shape] for each."""
            draw = random_stream(context.seed, f"trajectories.{number}")
            seeds = torch.randint(_SEEDS, (self.batch,), generator=draw).tolist()
            kept: list[tuple[Tensor, ...]] = []

            def visit(call: int, inputs: tuple[Tensor, ...], _: Tensor) -> None:
                if call in places:
                    kept.append(inputs)
                context.listener(
                    Step("trajectories", number * calls + call + 1, rounds * calls, {})
                )

            def denoise(*inputs: Tensor) -> Tensor:
                found: Tensor = in_parts(teacher.network, inputs, at_once)
                return found

            self.sampler.run(denoise, seeds, teacher.device, visit)
            found = tuple(torch.stack(tensors) for tensors in zip(*kept, strict=True))
            context.group.broadcast_(found)  # devices round differently; processes must agree
            return found

        def make(step: int) -> Batch:
            number, turn = divmod(step, points)
            return Batch(
                tuple(tensor[(offsets + turn) % points, offsets] for tensor in of_round(number)),
                None,
                None,
            )

        return Stream(make, steps, [])


def places_by_weight(weights: Tensor, count: int) -> list[int]:
    """Return at most `count` different places, in the middle of parts of equal weight.

    There are so many that no part weighs less than one place: then no place is there twice.

    Args:
        weights: Of each place, positive, [P].
        count: At least 1.
    """
    weights = weights.double()
    most = int(weights.sum() / weights.max() + 1e-9)  # equal weights may sum to a little less
    parts = max(1, min(count, most))
    middles = (torch.arange(parts, dtype=torch.float64) + 0.5) / parts
    found = torch.searchsorted(weights.cumsum(0), middles * weights.sum(), right=True)
    return found.clamp_max(len(weights) - 1).tolist()
