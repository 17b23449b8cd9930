"""Trajectories of a diffusion model: the inputs that its sampler gives the denoiser."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from gdfq.diffusion.sampler import Sampler
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
    calls of a trajectory evenly, and no two batches of a round have a point in common.

    Attributes:
        sampler: How the denoiser is called.
        batch: Trajectories of a round, and points of a batch.
        points: Points that are kept of each trajectory, evenly spaced over its calls, at most.
    """

    sampler: Sampler
    batch: int
    points: int = 16

    def stream(self, teacher: Captured, *, steps: int, context: Context = Context()) -> Stream:
        """Yield `steps` batches."""
        calls = self.sampler.calls
        points = min(self.points, calls)
        # In the middle of equal parts of the calls.
        places = [(2 * part + 1) * calls // (2 * points) for part in range(points)]
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
