"""Programs of torch.export (.pt2)."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import networks

import gdfq
from gdfq.quantized import QuantizedNetwork
from gdfq.recipes import Recipe


def test_program_runs_without_gdfq(small: QuantizedNetwork, tmp_path: Path) -> None:
    small.export(tmp_path / "q.pt2")
    x = networks.images(4)
    torch.save(x, tmp_path / "x.pt")
    program = (
        "import sys, torch; sys.modules['gdfq'] = None\n"
        f"run = torch.export.load({str(tmp_path / 'q.pt2')!r}).module()\n"
        f"x = torch.load({str(tmp_path / 'x.pt')!r})\n"
        f"torch.save(run(x), {str(tmp_path / 'y.pt')!r})"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), small(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["Residual", "Borders", "Tokens", "Transposed"])
def test_program_takes_images_of_any_memory_format(name: str, tiny: Recipe, tmp_path: Path) -> None:
    quantized = gdfq.quantize(networks.captured(name), networks.images(1), "w4a4", tiny)
    assert quantized.export(tmp_path / "q.pt2").inside.relative_error < 1e-5


def test_program_takes_any_batch_size(small: QuantizedNetwork, tmp_path: Path) -> None:
    small.export(tmp_path / "q.pt2")
    run = gdfq.deploy.runtimes.program_runner((tmp_path / "q.pt2").read_bytes())
    for count in (1, 5):
        x = networks.images(count)
        torch.testing.assert_close(run(x)[0], small(x), rtol=1e-4, atol=1e-4)
