"""The layers of the package, and who may know what (docs/architecture.md)."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import gdfq

PACKAGE = Path(gdfq.__file__).parent
LAYERS = """errors version files optim execution functional data graph diffusion models generation quantizers student
    equalizers sources tuning effort recipes demo deploy analysis quantized plan runs report stages pipeline api
    cli""".split()  # noqa: SIM905 (it is read as an order)
"""A module imports from layers before its own, and from its own."""
MODULES = {
    ".".join(("gdfq", *path.relative_to(PACKAGE).with_suffix("").parts)): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}
RUN_FILES = [
    "config.json",
    "metrics.json",
    "history.jsonl",
    "evidence.json",
    "evidence.npz",
    "report.html",
]


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def imports_of(module: str) -> Iterator[str]:
    """Everything that a module imports, as dotted names, also inside functions."""
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules_imported_by(module: str) -> set[str]:
    """The modules of this package that a module imports."""
    found = set()
    for name in imports_of(module):
        parent = name.rpartition(".")[0]
        found |= {candidate for candidate in (name, parent) if candidate in MODULES}
    return found - {module}


def layer_of(module: str) -> str:
    return module.split(".")[1]


def strings_of(module: str) -> Iterator[str]:
    """All string constants of a module, apart from docstrings and texts below a constant."""
    tree = tree_of(module)
    texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            yield node.value


def test_module_has_a_layer() -> None:
    assert {layer_of(module) for module in MODULES} - {"__main__"} == set(LAYERS)


def test_architecture_page_has_all_layers_in_order() -> None:
    page = (PACKAGE.parents[1] / "docs" / "architecture.md").read_text()
    table = page.partition("| layer |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.M) == LAYERS


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_from_earlier_layers_only(module: str) -> None:
    if layer_of(module) == "__main__":
        return
    allowed = LAYERS[: LAYERS.index(layer_of(module)) + 1]
    wrong = [name for name in modules_imported_by(module) if layer_of(name) not in allowed]
    assert not wrong, f"{module} imports from a later layer: {wrong}"


def test_imports_have_no_circle() -> None:
    TopologicalSorter({module: modules_imported_by(module) for module in MODULES}).prepare()


@pytest.mark.parametrize(
    ("libraries", "layers"),
    [
        ("onnx onnxruntime onnx_ir onnxscript openvino executorch ml_dtypes", "deploy"),
        ("matplotlib jinja2", "report"),
        ("click", "cli"),
        ("yaml", "runs"),
        ("timm torchvision transformers pytorchcv", "models"),
        ("sklearn", "demo"),
        ("diffusers", "diffusion generation"),
    ],
)
def test_library_is_imported_in_its_layers_only(libraries: str, layers: str) -> None:
    users = {
        module
        for module in MODULES
        for name in imports_of(module)
        if name.split(".")[0] in libraries.split()
    }
    assert {layer_of(module) for module in users} <= set(layers.split()), sorted(users)


def test_report_does_not_import_torch() -> None:
    users = [m for m in MODULES if any(name.split(".")[0] == "torch" for name in imports_of(m))]
    assert not [module for module in users if layer_of(module) == "report"]


def test_operator_names_are_in_one_module() -> None:
    spelled = re.compile(r"(aten|gdfq)\.[a-z_0-9]+\.?[A-Za-z_]*")
    operators = {"gdfq.fake_quantize", "gdfq.dequantize", "gdfq.dequantize_bias"}
    for module in MODULES:
        if module == "gdfq.graph.operators":
            continue
        found = [
            text
            for text in strings_of(module)
            if text in operators or (spelled.fullmatch(text) and text.startswith("aten."))
        ]
        assert not found, f"{module} spells {found}"


def test_only_the_command_line_prints() -> None:
    """Progress is printed by a listener, on the stream that it was given."""
    printing = {
        module
        for module in MODULES
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    }
    assert {m for m in printing if layer_of(m) != "cli"} <= {"gdfq.execution.listeners"}


def test_only_run_modules_know_file_names() -> None:
    for module in MODULES:
        if layer_of(module) not in {"runs", "report", "cli"}:
            assert not set(RUN_FILES) & set(strings_of(module)), module


def test_module_does_not_test_the_kind_of_a_method() -> None:
    """Sources, tunings and quantizer families have behaviour; nobody asks for their types."""
    methods = {
        node.name
        for module in MODULES
        if layer_of(module) in {"sources", "tuning"}
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.ClassDef)
        and any("Source" in ast.dump(b) or "Tuning" in ast.dump(b) for b in node.bases)
    }
    assert "SpectralSource" in methods
    for module in MODULES:
        for node in ast.walk(tree_of(module)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                asked = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
                assert not asked & methods, f"{module}:{node.lineno}"


def test_public_names_are_those_of_the_reference_page() -> None:
    page = PACKAGE.parents[1] / "docs" / "reference" / "python.md"
    documented = {
        line.rpartition(".")[2] for line in re.findall(r"^::: (\S+)", page.read_text(), re.M)
    }
    assert documented == set(gdfq.__all__) - {"__version__"}
    assert set(gdfq.__all__) <= set(dir(gdfq))
    for name in gdfq.__all__:
        assert getattr(gdfq, name) is not None
