"""Rows of results that are measured one by one."""

import json
from pathlib import Path

import pytest
from benchmarks.rows import Row, complete, read_rows


def test_missing_rows_alone_are_measured(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"seed": 1, "bits": "w4a4", "top1": 7}]))
    asked = []

    def measured(seed: int, bits: str) -> Row:
        asked.append((seed, bits))
        return {"seed": seed, "bits": bits, "top1": 10 * seed}

    wanted = [(0, "w4a4"), (1, "w4a4"), (1, "w8a8"), (0, "w4a4")]
    rows = complete(file, ("seed", "bits"), wanted, measured, ["top1"])
    assert asked == [(0, "w4a4"), (1, "w8a8")]
    assert [row["top1"] for row in rows] == [7, 0, 10]
    assert rows == read_rows(file)


def test_rows_before_a_failure_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"

    def measured(seed: int) -> Row:
        if seed == 2:
            raise RuntimeError
        return {"seed": seed}

    with pytest.raises(RuntimeError):
        complete(file, ["seed"], [(0,), (1,), (2,)], measured, [])
    assert file.read_text() == '[\n {\n  "seed": 0\n },\n {\n  "seed": 1\n }\n]\n'


def test_file_without_rows_has_none(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "rows.json") == []
