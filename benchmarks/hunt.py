"""Networks of libraries that the tests do not know, each in a process of its own: where does it fail?

    python -m benchmarks.hunt                   # every network that is not in the result file yet
    python -m benchmarks.hunt --only smp:       # those whose name contains this, again

Weights are random; three batches in training mode give the batch norms statistics of the network's
own. Each network is captured, quantized to w8a8 with a few steps (on noise where it has no batch
norms), saved, loaded, compared, and exported to ONNX. Each result is written to
benchmarks/results/hunt.json as soon as it is there, and the table in docs/networks.md at the end.
Needs timm, torchvision, transformers, segmentation_models_pytorch and ultralytics; networks of a
library that is absent are skipped.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from support.places import RESULTS, ROOT
from support.torchvision_shim import define_missing_operators
from support.unseen_networks import NETWORKS, Unseen

from gdfq.recipes import QUICK
from gdfq.sources.pool import ImagePool
from gdfq.sources.spectral import SpectralSource

FILE = RESULTS / "hunt.json"
PAGE, MARK, END = (
    ROOT / "docs" / "networks.md",
    "<!-- benchmarks/hunt.py -->",
    "<!-- end of benchmarks/hunt.py -->",
)
_MAX_SECONDS = 240
"""Seconds that one network may take."""
_CALIBRATION_BATCHES, _CALIBRATION_IMAGES, _STEPS = 3, 4, 4
_IMAGES = 16


def measured(name: str, unseen: Unseen) -> dict[str, Any]:
    """The results of one network, or the step and message of its failure."""
    import gdfq

    started = time.perf_counter()
    row: dict[str, Any] = {"network": name, "input": "x".join(map(str, unseen.shape))}
    step = "make"
    try:
        torch.manual_seed(0)
        model = unseen.make().train()
        with torch.no_grad():
            if any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in model.modules()):
                for _ in range(_CALIBRATION_BATCHES):
                    model(torch.randn(_CALIBRATION_IMAGES, *unseen.shape))
        model.eval()
        row["parameters"] = sum(p.numel() for p in model.parameters())
        images = torch.randn(8, *unseen.shape)
        step = "capture"
        teacher = gdfq.capture(model, images[:1], classifier=False)
        row["batch_norms"] = len(teacher.batch_norms)
        step = "quantize"
        pool = ImagePool(SpectralSource(batch=_IMAGES), images=_IMAGES, batch=4)
        recipe = replace(QUICK, source=pool, steps=_STEPS, calibration=2, warmup=2)
        data = None if teacher.batch_norms else images
        quantized = gdfq.quantize(
            teacher, None, "w8a8", "real" if data is not None else recipe,
            data=data, steps=_STEPS, placement="full",
        )  # fmt: skip
        step = "run"
        with torch.no_grad():
            expected, actual = (_flat(net(images)) for net in (teacher.network, quantized))
        row["error"] = float((actual - expected).norm() / expected.norm())
        with tempfile.TemporaryDirectory() as folder:
            step = "save"
            quantized.save(folder)
            step = "load"
            again = gdfq.load(folder)
            with torch.no_grad():
                if not torch.equal(_flat(again(images)), actual):
                    raise ValueError("the loaded network computes something else")
            step = "export"
            exported = quantized.export(Path(folder) / "student.onnx")
            row["kib"] = exported.bytes // 1024
            row["onnx_error"] = exported.inside.relative_error
            row["float"] = [note for note in exported.notes if "float" in note]
    except Exception as error:
        row |= {"failed": step, "why": f"{type(error).__name__}: {error}"[:600]}
    return row | {"seconds": round(time.perf_counter() - started, 1)}


def _flat(outputs: Any) -> torch.Tensor:
    """All numbers of a network's outputs, in order."""
    leaves, _ = torch.utils._pytree.tree_flatten(outputs)
    return torch.cat([x.flatten() for x in leaves if isinstance(x, torch.Tensor)])


def table(rows: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| network | input | parameters | batch norms | ONNX file, its error |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in sorted(rows.values(), key=lambda row: str(row["network"])):
        facts = [row["network"], row["input"], f"{row.get('parameters', 0):,}"]
        facts += [str(row.get("batch_norms", ""))]
        if "failed" in row:
            why = str(row["why"]).replace("|", "/").replace("\n", " ")
            facts += [f"{row['failed']}: {why[:200]}"]
        else:
            facts += [f"{row['kib']:,} KiB, {row['onnx_error']:.0e}"]
        lines.append(f"| {' | '.join(facts)} |")
    return "\n".join(lines)


def write_table(rows: dict[str, Any]) -> None:
    """Put the table between its marks in docs/networks.md."""
    before, mark, rest = PAGE.read_text().partition(MARK)
    _, end, after = rest.partition(END)
    assert mark, f"{PAGE} must have the line {MARK}"
    assert end, f"{PAGE} must have the line {END}"
    PAGE.write_text(f"{before}{mark}\n\n{table(rows)}\n\n{end}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="networks whose name contains this, measured again")
    parser.add_argument("--one", help="measure this network and print its result as JSON")
    parser.add_argument("--table", action="store_true", help="write the table alone")
    options = parser.parse_args()
    if options.one:
        warnings.simplefilter("ignore")  # the libraries' own
        kept = define_missing_operators()  # they are there while it lives
        row = measured(options.one, NETWORKS[options.one])
        print(f"\n{json.dumps(row)}", flush=True)
        del kept
        return
    rows = json.loads(FILE.read_text()) if FILE.exists() else {}
    for name, unseen in NETWORKS.items():
        if options.table or (options.only not in name if options.only else name in rows):
            continue
        row = {"network": name, "input": "x".join(map(str, unseen.shape)), "failed": "make"}
        try:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.hunt", "--one", name],
                capture_output=True, text=True, timeout=_MAX_SECONDS, check=False, env=os.environ,
            )  # fmt: skip
            row = json.loads(done.stdout.strip().splitlines()[-1])
        except subprocess.TimeoutExpired:
            row |= {"failed": "time", "why": f"longer than {_MAX_SECONDS // 60} minutes"}
        except (ValueError, IndexError):
            row |= {"why": f"the process ended: {done.stderr.strip()[-300:]}"}
        rows = json.loads(FILE.read_text()) if FILE.exists() else {}
        rows[name] = row
        FILE.write_text(json.dumps(rows, indent=1) + "\n")
        print(json.dumps(row), flush=True)
    write_table(rows)


if __name__ == "__main__":
    main()
