"""Weights in checkpoints as training scripts save them."""

import argparse
import collections
import contextlib
import datetime
import functools
import io
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support import networks
from torch import Tensor, nn

from gdfq.errors import GdfqWarning, UsageError
from gdfq.models.registry import load_model
from gdfq.models.weights import load_weights_

State = dict[str, Tensor]


def network(classes: int = 2) -> nn.Module:
    torch.manual_seed(classes)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, classes))


STATE: State = dict(network().state_dict())
OTHER: State = {name: tensor + 1 for name, tensor in STATE.items()}


def prefixed(prefix: str, state: State = STATE) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def loaded(path: Path, content: object, key: str = "") -> State:
    """The weights that a network has after it loaded a file of this content."""
    torch.save(content, path)
    model = network(2)
    nn.init.zeros_(model.get_parameter("0.weight"))
    load_weights_(model, Path(f"{path}{key}"))
    return dict(model.state_dict())


def same(found: State, expected: State) -> bool:
    return all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def adam_state() -> dict[str, Any]:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    torch.stack([parameter.sum() for parameter in model.parameters()]).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


class Attributes(dict[str, Any]):
    """A dictionary of a training script."""


class Options:
    """A class of a training script."""

    def __init__(self) -> None:
        self.rate = 0.1


ENVELOPES: dict[str, Callable[[], object]] = {
    "plain": lambda: STATE,
    "state_dict": lambda: {"state_dict": STATE, "epoch": 3},
    "model": lambda: {"model": STATE, "optimizer": adam_state(), "epoch": 3},
    "net": lambda: {"net": STATE, "acc": np.float64(93.1), "loss": np.float32(1)},
    "params": lambda: {"params": STATE},
    "params_ema": lambda: {"params_ema": STATE},
    "deep": lambda: {"checkpoint": {"model": {"state_dict": STATE}}},
    "module": lambda: prefixed("module."),
    "compiled": lambda: prefixed("_orig_mod."),
    "both": lambda: {"model": prefixed("module._orig_mod.")},
    "compiled inside": lambda: {re.sub(r"^0\.", "0._orig_mod.", n): t for n, t in STATE.items()},
    "sharded": lambda: prefixed("_fsdp_wrapped_module."),
    "lightning": lambda: {
        "state_dict": prefixed("model.") | {"criterion.weight": torch.ones(2)},
        "hyper_parameters": {"path": Path("a/b"), "rate": np.float64(0.1)},
        "callbacks": {"ModelCheckpoint": {"best": torch.tensor(1.0)}},
    },
    "averaged": lambda: torch.optim.swa_utils.AveragedModel(network()).state_dict(),
    "namespace": lambda: {"model": STATE, "args": argparse.Namespace(rate=0.1, out=Path("x"))},
    "own class": lambda: {"model": STATE, "options": Options(), "kind": nn.Linear, "dtype": np.dtype("f4")},
    "arrays": lambda: {"model": STATE, "curve": np.arange(3.0), "random": np.random.default_rng(0)},
    "containers": lambda: {
        "model": STATE,
        "lists": collections.defaultdict(list, {"a": [1]}),
        "queue": collections.deque([1, 2]),
        "counts": collections.Counter("ab"),
        "options": Attributes(rate=0.1),
        "function": functools.partial(print, 1),
        "time": datetime.datetime(2026, 1, 1),
    },
    "optimizer itself": lambda: {
        "model": STATE,
        "optimizer": torch.optim.SGD(network().parameters(), 0.1),
    },
    "profiled": lambda: {**STATE, "total_ops": torch.zeros(1), "0.total_params": torch.zeros(1)},
    "with numbers": lambda: {**STATE, "epoch": 3, "best": 0.9},
    "without counters": lambda: {n: t for n, t in STATE.items() if "tracked" not in n},
    "with a smaller network": lambda: {"encoder": {"0.weight": torch.ones(1)}, "model": STATE},
    "same twice": lambda: {"model": STATE, "model_ema": {n: t.clone() for n, t in STATE.items()}},
}  # fmt: skip


@pytest.mark.parametrize("name", ENVELOPES)
def test_weights_are_found_in_their_envelope(tmp_path: Path, name: str) -> None:
    assert same(loaded(tmp_path / "w.pt", ENVELOPES[name]()), STATE)


@pytest.mark.parametrize("legacy", [False, True])
def test_note_says_what_was_taken(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "w.pt"
    torch.save({"model": prefixed("module.")}, path, _use_new_zipfile_serialization=not legacy)
    assert load_weights_(network(), path) == f"{path}, 'model' behind the prefix 'module.'"


@pytest.mark.parametrize(
    ("average", "plain"),
    [("model_ema", "model"), ("ema", "state_dict"), ("params_ema", "params"), ("swa", "net")],
)
def test_averaged_weights_are_taken_with_a_warning(
    tmp_path: Path, average: str, plain: str
) -> None:
    content = {plain: STATE, average: OTHER}
    path = tmp_path / "w.pt"
    with pytest.warns(GdfqWarning, match=f"(?s){average}', are taken.*#{plain}"):
        assert same(loaded(path, content), OTHER)
    assert same(loaded(path, content, f"#{plain}"), STATE)
    assert same(loaded(path, content, f"#{average}"), OTHER)
    with pytest.raises(UsageError, match="under 'other'; it has"):
        loaded(path, content, "#other")


def test_several_equal_candidates_ask(tmp_path: Path) -> None:
    content = {"student": STATE, "teacher": OTHER}
    with pytest.raises(
        UsageError, match=r"several do: 'student', 'teacher'\. Choose one as .*#stu"
    ):
        loaded(tmp_path / "w.pt", content)
    with pytest.raises(UsageError, match=r"several do"):
        loaded(tmp_path / "w.pt", prefixed("student.") | prefixed("teacher.", OTHER))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            dict(network(7).state_dict()),
            r"of another shape: 3\.weight \[7, 4\] for \[2, 4\].*with 7",
        ),
        ({"model": {**STATE, "4.bias": torch.ones(1)}}, r", 'model' some are surplus: 4\.bias"),
        ({n: t for n, t in STATE.items() if n != "0.bias"}, r"missing: 0\.bias"),
        (
            prefixed("module.", dict(list(STATE.items())[1:])),
            r"'module\.' some are missing: 0\.wei",
        ),
        ({"a": torch.ones(1)}, r"missing: 0\.weight, 0\.bias, .* and 3 more; surplus: a"),
        ({"optimizer": adam_state()}, "ordinary tensors by name"),
        ([STATE], "holds a list of something else"),
    ],
)
def test_weights_that_do_not_fit_are_refused_shortly(
    tmp_path: Path, state: object, message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        loaded(tmp_path / "w.pt", state)
    assert len(str(caught.value)) < 500 + len(str(tmp_path))


def test_whole_pickled_module_is_named_and_runs_no_code(tmp_path: Path) -> None:
    whole = networks.make("Residual")
    for content, taken in ((whole, r"False\)\.state"), ({"model": whole}, r"\['model'\]\.state")):
        with pytest.raises(UsageError, match=rf"whole pickled module .*Residual.*{taken}"):
            loaded(tmp_path / "w.pt", content)


def test_torchscript_is_named(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(network().eval(), torch.zeros(1, 3, 3, 3)).save(tmp_path / "w.pt")
    with pytest.raises(UsageError, match=r"TorchScript archive: torch\.save\(torch\.jit\.load"):
        load_weights_(network(), tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.h5", b"\x89HDF\r\n\x1a\n", "HDF5"),
        ("w.onnx", b"\x08\x07", "ONNX"),
        ("w.tflite", b"\x1c\0\0\0TFL3", "LiteRT"),
        ("saved_model.pb", b"\x08", "TensorFlow graph"),
        ("w.safetensors", b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        ("w.pt", b"<!DOCTYPE HTML>", "web page"),
        ("w.gguf", b"GGUF\3", "GGUF"),
        ("w.npy", b"\x93NUMPY", "NumPy array"),
    ],
)
def test_files_of_other_kinds_are_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=f"is neither: it is .*{message}"):
        load_weights_(network(), tmp_path / name)


def test_folder_of_tensorflow_and_npz_are_named(tmp_path: Path) -> None:
    (tmp_path / "saved_model.pb").write_bytes(b"")
    with pytest.raises(UsageError, match="SavedModel"):
        load_weights_(network(), tmp_path)
    np.savez(tmp_path / "w.npz", a=np.zeros(1))
    with pytest.raises(UsageError, match=r"\.npz file"):
        load_weights_(network(), tmp_path / "w.npz")


def test_weights_given_as_the_model_are_named(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "w.pth")
    with pytest.raises(UsageError, match=r"holds weights alone.*--weights .*w\.pth"):
        load_model(str(tmp_path / "w.pth"))
    (tmp_path / "w.keras").write_bytes(b"")
    with pytest.raises(UsageError, match=r"MODEL must be the code of a network; .* Keras"):
        load_model(str(tmp_path / "w.keras"))


def test_safetensors_of_any_name_are_read(tmp_path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in STATE.items()}, tmp_path / "w.bin")
    model = network(2)
    load_weights_(model, tmp_path / "w.bin")
    assert same(dict(model.state_dict()), STATE)


class _Trap:
    def __init__(self, call: Any, *arguments: object) -> None:
        self.made = call, arguments

    def __reduce__(self) -> Any:
        return self.made


@pytest.mark.parametrize("call", [open, eval, exec, pickle.loads, io.FileIO])
def test_objects_beside_the_weights_run_no_code(tmp_path: Path, call: Any) -> None:
    """They are placeholders, or the file is refused; nothing is called."""
    trap = tmp_path / "trap"
    words = f"open({str(trap)!r}, 'w')"
    arguments = {open: (str(trap), "w"), io.FileIO: (str(trap), "w"), pickle.loads: (b"",)}
    content = {"model": STATE, "x": _Trap(call, *arguments.get(call, (words,)))}
    with contextlib.suppress(UsageError):
        assert same(loaded(tmp_path / "w.pt", content), STATE)
    assert not trap.exists()


def test_reading_leaves_no_placeholder_in_torch(tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    loaded(tmp_path / "w.pt", {"model": STATE, "options": Options()})
    assert set(torch.serialization.get_safe_globals()) == before


def test_later_pickle_protocol_is_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "w.pt", pickle_protocol=4)
    with pytest.raises(UsageError, match=r"pickle protocol, 2.*Save model\.state_dict\(\) again"):
        load_weights_(network(), tmp_path / "w.pt")
