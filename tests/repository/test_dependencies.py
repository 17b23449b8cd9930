"""Locked and minimum versions are the declared ones, and have no known vulnerability."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]


def declared() -> dict[str, Any]:
    """Requirements of the package and its tests by name, but for torch, whose build is chosen."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    texts = [*project["dependencies"], *extras["demo"], *extras["test"], *extras["dev"]]
    found = {requirement.name: requirement for requirement in map(Requirement, texts)}
    return {name: found[name] for name in found if name not in ("torch", "gdfq")}


def pinned(name: str) -> Iterator[tuple[str, str]]:
    """Versions of a file of constraints, each where its marker holds."""
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    requirements = [Requirement(line) for line in lines if not line.startswith("#")]
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate():
            (version,) = requirement.specifier
            assert version.operator == "=="
            yield requirement.name, version.version


def test_lock_has_every_declared_requirement() -> None:
    lock = dict(pinned("test.lock"))
    for name, requirement in declared().items():
        assert requirement.specifier.contains(lock[name]), name


def test_minimum_versions_are_the_declared_ones() -> None:
    for name, requirement in declared().items():
        (bound,) = requirement.specifier
        assert bound.operator == ">="
        lowest = dict(pinned("minimum.txt"))[name]
        assert requirement.specifier.contains(lowest)
        assert lowest.startswith(bound.version), name


def test_requirements_name_no_index_or_path() -> None:
    for path in (ROOT / "requirements").iterdir():
        lines = path.read_text().splitlines()
        assert all(re.fullmatch(r"#.*|[\w-]+==[\w.]+( ; .*)?", line) for line in lines), path


@pytest.mark.check
def test_locked_versions_have_no_known_vulnerability() -> None:
    """Asks the index of Python packages, and so needs a network and pip-audit."""
    if shutil.which("pip-audit", path=Path(sys.executable).parent) is None:
        pytest.skip("needs the optional program pip-audit")
    call = ["-m", "pip_audit", "--no-deps", "--disable-pip", "--format", "json"]
    done = subprocess.run(
        [sys.executable, *call, "--timeout", "10", "-r", ROOT / "requirements" / "test.lock"],
        capture_output=True,
        text=True,
    )
    if not done.stdout:
        pytest.skip(f"pip-audit needs a network: {done.stderr.strip().splitlines()[-1]}")
    packages = json.loads(done.stdout)["dependencies"]
    asked = [package for package in packages if "skip_reason" not in package]
    if not asked:
        pytest.skip("pip-audit needs a network: it found none of the packages")
    assert not [package for package in asked if package["vulns"]]
