"""A listener that writes TensorBoard event files."""

from importlib.util import find_spec
from pathlib import Path

from gdfq.errors import UsageError
from gdfq.execution.progress import Step, is_due

_MAX_POINTS = 500
"""Approximate number of steps of a stage that are written."""


def require_tensorboard() -> None:
    """Raise UsageError if TensorBoard is not installed."""
    if find_spec("tensorboard") is None:
        raise UsageError(
            "event files need the tensorboard package, which is not installed. "
            "Install it with: pip install 'gdfq[tensorboard]', or remove --tensorboard."
        )


class TensorBoard:
    """Writes losses, learning rates and ranges of each stage into `folder`/tensorboard."""

    def __init__(self, folder: Path) -> None:
        require_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def __call__(self, step: Step) -> None:
        if not is_due(step.index, step.total, _MAX_POINTS) and not step.ranges:
            return
        scalars = {name: float(value) for name, value in step.losses.items()}
        if step.rate is not None:
            scalars["rate"] = step.rate
        scalars |= {f"range/{name}": value for name, value in step.ranges.items()}
        for name, value in scalars.items():
            self._writer.add_scalar(f"{step.stage}/{name}", value, step.index)

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.close()
