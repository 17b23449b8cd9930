"""Networks from programs of torch.export."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import networks, torchvision_shim
from torch import Tensor, nn

from gdfq.errors import UsageError
from gdfq.graph.capture import capture
from gdfq.models.registry import load_model

_OPERATORS = torchvision_shim.define_missing_operators()  # they are there while this lives


def _program(path: Path, network: nn.Module, batch: Any = torch.export.Dim.DYNAMIC) -> str:
    shapes = ({0: batch},) if batch else None
    example = torch.zeros(2, *networks.SHAPE)
    torch.export.save(torch.export.export(network, (example,), dynamic_shapes=shapes), path)
    return str(path)


def test_program_equals_the_exported_network(tmp_path: Path, residual: nn.Module) -> None:
    loaded = load_model(_program(tmp_path / "net.pt2", residual))
    assert (loaded.input_shape, loaded.preprocessing) == (networks.SHAPE, None)
    images = networks.images(3)
    captured = capture(loaded.module, images[:1])
    assert len(captured.batch_norms) == 2
    with torch.no_grad():
        torch.testing.assert_close(captured.network(images), residual(images))


def test_program_keeps_a_dictionary_of_outputs(tmp_path: Path, residual: nn.Module) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": residual(x), "twice": 2 * x}

    images = networks.images(2)
    output = load_model(_program(tmp_path / "net.pt2", Two().eval())).module(images)
    assert torch.equal(output["twice"], 2 * images)


def test_unusable_programs_are_refused(tmp_path: Path, residual: nn.Module) -> None:
    with pytest.raises(UsageError, match="takes 2 alone"):
        load_model(_program(tmp_path / "fixed.pt2", residual, batch=None))
    with pytest.raises(UsageError, match=r"model\.eval\(\)"):
        load_model(_program(tmp_path / "training.pt2", networks.Residual().train()))
    (tmp_path / "not.pt2").write_bytes(b"no zip")
    with pytest.raises(UsageError, match=r"torch\.export\.save"):
        load_model(str(tmp_path / "not.pt2"))
    with pytest.raises(UsageError, match=r"there is none at absent\.pt2"):
        load_model("absent.pt2")
