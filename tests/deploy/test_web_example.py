"""The page in examples/web, in a headless browser: its classes are those of ONNX Runtime."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import networks
from support.places import ROOT
from support.small_runs import quantized_by_fast

from gdfq.deploy.runtimes import onnx_runner

PAGE = ROOT / "examples" / "web"
MODULES = Path(os.environ.get("GDFQ_WEB", Path(sys.prefix) / "web")) / "node_modules"
"""Where `make check` installs onnxruntime-web."""
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
_SECONDS = 120
_HARNESS = """<!doctype html><iframe id="page" src="index.html"></iframe><script type="module">
const send = (value) => fetch("/found", { method: "POST", body: JSON.stringify(value) });
try {
  const { load, classify } = await import("./classify.mjs");
  const picture = await (await fetch("picture.png")).blob();
  const network = await load("student.onnx", "classes.txt");
  const canvas = document.createElement("canvas");
  const { outputs } = await classify(network, await createImageBitmap(picture), canvas);
  const frame = document.getElementById("page");
  const until = async (ready) => { while (!ready()) await new Promise((r) => setTimeout(r, 20)); };
  const inside = (id) => frame.contentDocument?.getElementById(id);
  await until(() => inside("picture") && !inside("picture").disabled);
  const chosen = new frame.contentWindow.DataTransfer();
  chosen.items.add(new frame.contentWindow.File([picture], "picture.png"));
  inside("picture").files = chosen.files;
  inside("picture").dispatchEvent(new frame.contentWindow.Event("change"));
  await until(() => inside("classes").rows.length || inside("state").textContent.includes("cannot"));
  const rows = [...inside("classes").rows].map((row) => [...row.cells].map((c) => c.textContent));
  let refusal = "";
  await load("float.onnx", "classes.txt").catch((error) => { refusal = error.message; });
  await send({ outputs: [...outputs], rows, state: inside("state").textContent, refusal });
} catch (error) { await send({ error: String(error.stack ?? error) }); }
</script>"""


class _Handler(SimpleHTTPRequestHandler):
    """Serves a folder, and puts what the page sends into a queue."""

    extensions_map = {**SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}  # noqa: RUF012

    def __init__(self, found: Queue[Any], *args: Any, **others: Any) -> None:
        self.found = found
        super().__init__(*args, **others)

    def do_POST(self) -> None:
        self.found.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        return


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, Queue[Any]]]:
    """Serve a folder; yield its address and what is sent to it."""
    found: Queue[Any] = Queue()
    handler = partial(_Handler, found, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", found
        server.shutdown()


def result_of(address: str, found: Queue[Any], profile: Path) -> dict[str, Any]:
    """Open the harness in a browser and return what it sends."""
    assert CHROMIUM is not None
    options = ("--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}")
    process = subprocess.Popen(
        [CHROMIUM, *options, f"{address}/harness.html"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        result: dict[str, Any] = found.get(timeout=_SECONDS)
    except Empty:
        pytest.fail(f"the page sent nothing in {_SECONDS} seconds")
    finally:
        process.kill()
        process.wait()
    return result


def test_web_example_names_the_version_that_is_installed() -> None:
    wanted = json.loads((PAGE / "package.json").read_text())["dependencies"]["onnxruntime-web"]
    assert f"onnxruntime-web {wanted}" in (PAGE / "README.md").read_text()
    assert "examples/web/package.json" in (ROOT / "Makefile").read_text()


@pytest.mark.check
@pytest.mark.parametrize("bits", ["w8a8", "w4a4", "w2a4"])
def test_page_classifies_a_picture_as_onnx_runtime_does(bits: str, tmp_path: Path) -> None:
    if CHROMIUM is None:
        pytest.skip("needs a browser: chromium or chromium-browser in PATH")
    if not (MODULES / "onnxruntime-web").is_dir():
        pytest.skip(f"needs onnxruntime-web in {MODULES}, where make check installs it with npm")
    folder = tmp_path / "page"
    shutil.copytree(PAGE, folder, ignore=shutil.ignore_patterns("node_modules"))
    (folder / "node_modules").symlink_to(MODULES)
    quantized = quantized_by_fast(networks.captured("Residual"), bits)
    quantized.export(folder / "student.onnx", raw_input=True)
    quantized.export(folder / "float.onnx")
    (folder / "harness.html").write_text(_HARNESS)
    names = [f"the <b>{index}</b>" for index in range(networks.CLASSES)]
    (folder / "classes.txt").write_text("\n".join(names))
    _, height, width = networks.SHAPE
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    with served(folder) as (address, found):
        result = result_of(address, found, tmp_path / "profile")
    assert "error" not in result, result
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()
    (logits,) = onnx_runner((folder / "student.onnx").read_bytes())(images)
    assert result["outputs"] == logits[0].tolist()
    chances, order = logits[0].double().softmax(0).sort(descending=True)
    expected = [[names[i], f"{100 * p:.1f} %"] for p, i in zip(chances, order, strict=True)]
    assert [name for name, _ in result["rows"]] == [name for name, _ in expected]
    shown = [float(text.split()[0]) for _, text in result["rows"]]
    assert shown == pytest.approx([100 * float(p) for p in chances], abs=0.051)
    assert result["state"].endswith(" ms")
    assert "Write it with: gdfq export DIR --raw-input" in result["refusal"]
