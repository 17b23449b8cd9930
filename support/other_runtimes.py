"""Runtimes that `make check` installs beside the project, each run in a process of its own.

A folder such as `.venv/runtimes/onnxruntime==1.16.3` holds one runtime, which cannot be imported
together with the installed version.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

FOLDER = Path(os.environ.get("GDFQ_RUNTIMES", Path(sys.prefix) / "runtimes"))
"""Where `make check` installs them."""
_ONNX_RUNTIME = """
import sys, numpy, onnxruntime
onnxruntime.set_default_logger_severity(4)
options = onnxruntime.SessionOptions()
options.add_session_config_entry("session.x64quantprecision", "1")  # saturates on no processor
try:
    session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
except Exception as error:
    sys.exit(f"does not load: {error}")
(name,) = [value.name for value in session.get_inputs()]
numpy.save(sys.argv[3], session.run(None, {name: numpy.load(sys.argv[2])})[0])
"""
_TRACT = """
import sys, numpy, tract
x = numpy.load(sys.argv[2])
runnable = tract.onnx().load(sys.argv[1]).into_model().into_runnable()
numpy.save(sys.argv[3], runnable.run([x])[0].to_numpy())
"""
_TVM = """
import sys, numpy, onnx, tvm
from tvm import relax
from tvm.relax.frontend.onnx import from_onnx
x, model = numpy.load(sys.argv[2]), onnx.load(sys.argv[1])
module = from_onnx(model, shape_dict={model.graph.input[0].name: x.shape})
module = relax.transform.LegalizeOps()(relax.transform.DecomposeOpsForInference()(module))
machine = relax.VirtualMachine(tvm.compile(module, "llvm"), tvm.cpu())
found = machine["main"](tvm.runtime.tensor(x))
numpy.save(sys.argv[3], (found if hasattr(found, "numpy") else found[0]).numpy())
"""
_SCRIPTS = {"onnxruntime": _ONNX_RUNTIME, "tract": _TRACT, "apache-tvm": _TVM}


def first_output(runtime: str, file: Path, x: Tensor) -> Tensor | None:
    """Return the first output of an ONNX file in another runtime; None if it does not load there.

    Args:
        runtime: Name of its folder, such as `onnxruntime==1.16.3`.
        file: The file.
        x: Its one input.
    """
    folder = FOLDER / runtime
    if not folder.is_dir():
        pytest.skip(f"needs {runtime} in {FOLDER}, where make check installs it")
    script = _SCRIPTS[runtime.partition("==")[0]]
    with tempfile.TemporaryDirectory() as place:
        given, found = Path(place) / "x.npy", Path(place) / "y.npy"
        np.save(given, x.numpy())
        done = subprocess.run(
            [sys.executable, "-c", script, file, given, found],
            env={**os.environ, "PYTHONPATH": str(folder)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode and "does not load" in done.stderr:
            return None
        assert done.returncode == 0, done.stderr
        return torch.from_numpy(np.load(found))
