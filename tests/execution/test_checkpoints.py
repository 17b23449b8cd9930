"""Checkpoints are complete, and only the run that wrote them resumes from them."""

import errno
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from support.narrowing import present

from gdfq.errors import GdfqWarning, UsageError
from gdfq.execution.checkpointer import NullCheckpointer
from gdfq.execution.checkpoints import Checkpoints
from gdfq.execution.progress import Step
from gdfq.files import atomic
from gdfq.files.states import Frozen, Results, differences

RUN, AROUND = {"bits": "w4a4", "recipe": {"steps": 4}}, {"threads": 1}


STEP = Step("tune", 1, 2, {})


class Time:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def opened(
    folder: Path,
    part: Any = None,
    clock: Time | None = None,
    run: dict[str, Any] = RUN,
    **options: Any,
) -> tuple[Checkpoints, Any]:
    checkpoints = Checkpoints(folder, clock=clock or Time(), **options)
    checkpoints.begin(run, AROUND)
    part = checkpoints.register("part", Results() if part is None else part)
    return checkpoints, part


def names(folder: Path, kind: str = "checkpoint") -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(kind))


def test_checkpoint_is_written_after_the_interval(tmp_path: Path) -> None:
    clock = Time()
    checkpoints, part = opened(tmp_path, clock=clock, interval=60)
    heard = checkpoints.listening(lambda step: None)
    part["x"] = 1
    for now, written in ((59, 0), (60, 1), (119, 1), (121, 2), (182, 2)):
        clock.now = now
        heard(STEP)
        assert len(names(tmp_path)) == written  # two are kept
    _, again = opened(tmp_path)
    assert again == {"x": 1}


def test_last_step_of_a_stage_leaves_the_checkpoint_to_the_end_of_the_stage(
    tmp_path: Path,
) -> None:
    clock = Time()
    checkpoints, _ = opened(tmp_path, clock=clock, interval=60)
    heard = checkpoints.listening(lambda step: None)
    clock.now = 100
    heard(Step("tune", 2, 2, {}))
    assert not tmp_path.exists() or names(tmp_path) == []
    checkpoints.stage_ends()
    assert len(names(tmp_path)) == 1


def test_checkpoint_that_takes_long_is_written_less_often(tmp_path: Path) -> None:
    """Checkpoints take at most 2 % of the time: after one of 3 seconds, none follows for 150 s."""
    clock = Time()

    class Slow(Results):
        def state_dict(self) -> dict[str, Any]:
            clock.now += 3
            return {}

    checkpoints, _ = opened(tmp_path, Slow(), clock, interval=0)
    heard = checkpoints.listening(lambda step: None)
    heard(STEP)
    assert clock.now == 3
    for wait, expected in ((149, 152), (0.5, 152.5), (0.5, 156)):
        clock.now += wait
        (checkpoints.stage_ends if wait == 149 else lambda: heard(STEP))()
        assert clock.now == expected


def test_checkpoint_interval_ignores_the_wall_clock() -> None:
    import time

    assert present(Checkpoints.__init__.__kwdefaults__)["clock"] is time.monotonic


def test_checkpoint_is_written_before_a_listener_raises(tmp_path: Path) -> None:
    checkpoints, part = opened(tmp_path, interval=1e9)
    part["x"] = 5

    def stop(step: Step) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.listening(stop)(STEP)
    assert opened(tmp_path)[1] == {"x": 5}


def test_frozen_part_is_written_once(tmp_path: Path) -> None:
    checkpoints, part = opened(tmp_path)
    part["images"] = Frozen({"a": torch.arange(1000)})
    checkpoints.save()
    (piece,) = names(tmp_path, "piece")
    before = (tmp_path / piece).stat().st_mtime_ns
    for count in range(3):
        part["count"] = count
        checkpoints.save()
    assert names(tmp_path, "piece") == [piece]
    assert (tmp_path / piece).stat().st_mtime_ns == before
    checkpoints, part = opened(tmp_path)
    assert part["images"].value["a"].tolist() == list(range(1000))
    checkpoints.save()
    assert (tmp_path / piece).stat().st_mtime_ns == before
    del part["images"]
    checkpoints.save()
    assert names(tmp_path, "piece") == [piece]  # the checkpoint before needs it
    checkpoints.save()
    assert names(tmp_path, "piece") == []


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each file that is written."""
    sizes: list[int] = []
    write = atomic.write_checked

    def counted(path: Path, data: bytes, check: Any) -> Any:
        sizes.append(len(data))
        return write(path, data, check)

    monkeypatch.setattr(atomic, "write_checked", counted)
    return sizes


def noise(count: int = 2**16, seed: int = 0) -> torch.Tensor:
    """Random bytes, which cannot be compressed, as numbers: 4 `count` bytes."""
    draw = torch.Generator().manual_seed(seed)
    numbers = torch.randint(1, 255, (4 * count,), generator=draw).byte().view(torch.float32)
    return torch.where(numbers.isfinite(), numbers, 1.0)


OVERHEAD = 2_000
"""More than the bytes of a checkpoint without tensors, and less than those of a tensor."""


def test_unchanged_tensor_is_written_once(tmp_path: Path, written: list[int]) -> None:
    checkpoints, part = opened(tmp_path)
    part["still"], part["moving"] = noise(), noise(seed=1)
    checkpoints.save()
    assert 2 * 2**18 <= sum(written) <= 2 * 2**18 + 2 * OVERHEAD
    assert checkpoints.written == sum(written)
    for step in range(3):
        written.clear()
        part["moving"][7] = float(step)
        checkpoints.save()
        assert 2**18 <= sum(written) <= 2**18 + 2 * OVERHEAD
    written.clear()
    checkpoints.save()
    assert sum(written) <= OVERHEAD
    written.clear()
    checkpoints, again = opened(tmp_path)
    assert torch.equal(again["still"], noise())
    assert torch.equal(again["moving"], part["moving"])
    checkpoints.save()  # also after a stop
    assert sum(written) <= OVERHEAD


def test_folder_holds_no_more_than_two_checkpoints_of_a_changing_tensor(tmp_path: Path) -> None:
    checkpoints, part = opened(tmp_path)
    for step in range(5):
        part["x"] = noise(seed=step)
        checkpoints.save()
    sizes = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert 2 * 2**18 <= sizes <= 2 * 2**18 + 4 * OVERHEAD
    assert torch.equal(opened(tmp_path)[1]["x"], noise(seed=4))


def test_tensors_that_were_equal_once_are_restored_apart(tmp_path: Path) -> None:
    checkpoints, part = opened(tmp_path)
    part["a"], part["b"] = torch.zeros(2**16), torch.zeros(2**16)
    checkpoints.save()
    _, again = opened(tmp_path)
    again["a"].add_(1)
    assert again["b"].eq(0).all()


def test_equal_numbers_in_another_order_of_memory_are_another_tensor(tmp_path: Path) -> None:
    checkpoints, part = opened(tmp_path)
    part["x"] = torch.zeros(4, 8, 64, 64)
    checkpoints.save()
    part["x"] = torch.zeros(4, 8, 64, 64).contiguous(memory_format=torch.channels_last)
    checkpoints.save()
    assert opened(tmp_path)[1]["x"].stride() == part["x"].stride()


def test_tensors_that_were_not_written_are_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, part = opened(tmp_path)
    part["x"] = noise()
    with monkeypatch.context() as patch:
        patch.setattr("gdfq.execution.pieces.write_atomically", full_disk)
        with pytest.warns(GdfqWarning, match="No space left on device"):
            checkpoints.save()
    checkpoints.save()
    assert torch.equal(opened(tmp_path)[1]["x"], noise())


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_large_checkpoint_delays_the_next_one(tmp_path: Path) -> None:
    """On average 200 kB a second: 16 MiB delay it by 84 s; frozen parts, written once, by none."""
    clock = Time()
    checkpoints, part = opened(tmp_path, clock=clock, interval=10)
    heard = checkpoints.listening(lambda step: None)
    part["frozen"] = Frozen(noise(2**24))
    clock.now = 10
    heard(STEP)
    for seed, (now, count) in enumerate([(21, 2), (30, 2), (104, 2), (106, 3), (188, 3), (191, 4)]):
        part["x"] = noise(2**22, seed)
        clock.now = now
        heard(STEP)
        assert int(names(tmp_path)[-1].split("-")[1]) == count
    part["x"] = noise(2**22, 99)
    checkpoints.stage_ends()  # the end of a stage is worth a checkpoint
    assert int(names(tmp_path)[-1].split("-")[1]) == 5


def test_huge_checkpoint_delays_the_next_one_by_ten_minutes(tmp_path: Path) -> None:
    clock = Time()
    checkpoints, _ = opened(tmp_path, clock=clock)
    checkpoints._bytes = 2**40
    heard = checkpoints.listening(lambda step: None)
    for now, count in ((599, 0), (601, 1)):
        clock.now = now
        heard(STEP)
        assert len(names(tmp_path)) == count if tmp_path.exists() else not count


def test_parts_that_are_not_registered_yet_stay_in_the_checkpoint(tmp_path: Path) -> None:
    checkpoints, part = opened(tmp_path)
    part["x"] = 1
    checkpoints.save()
    again = Checkpoints(tmp_path)
    again.begin(RUN, AROUND)
    again.register("other", Results(y=2))
    again.save()
    assert opened(tmp_path)[1] == {"x": 1}


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    changed = {
        "truncated": data[: len(data) // 2],
        "empty": b"",
        "altered": data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
        "longer": data + b"\0",
    }
    path.write_bytes(changed[how])


@pytest.mark.parametrize("how", ["truncated", "empty", "altered", "longer"])
@pytest.mark.parametrize("kind", ["checkpoint", "frozen part", "tensor"])
def test_damaged_checkpoint_is_replaced_by_the_previous_one(
    tmp_path: Path, how: str, kind: str
) -> None:
    checkpoints, part = opened(tmp_path)
    for number in (1, 2):
        tensor = noise(seed=number)
        part["x"], part["t"] = number, tensor if kind == "tensor" else Frozen(tensor)
        checkpoints.save()
    newest = names(tmp_path)[-1]
    if kind != "checkpoint":
        used = checkpoints._kept[-1][1]
        newest = f"piece-{used.pop()}.safetensors"
    damage(tmp_path / newest, how)
    with pytest.warns(GdfqWarning, match="from the checkpoint before.*truncated or was changed"):
        checkpoints, part = opened(tmp_path)
    assert part["x"] == 1
    checkpoints.save()
    assert opened(tmp_path)[1]["x"] == 1  # the damaged one is gone, without another warning
    part["x"], part["t"] = 2, noise(seed=2)
    checkpoints.save()  # the same piece again
    assert opened(tmp_path)[1]["x"] == 2


def test_damaged_checkpoints_alone_load_nothing(tmp_path: Path) -> None:
    checkpoints, _ = opened(tmp_path)
    checkpoints.save()
    checkpoints.save()
    for name in names(tmp_path):
        damage(tmp_path / name, "truncated")
    with pytest.raises(UsageError, match=r"none is.*Remove the folder"):
        opened(tmp_path)


def test_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    opened(tmp_path)[0].save()
    for run, message in (
        ({**RUN, "bits": "w3a3"}, "bits was 'w4a4' and is 'w3a3'"),
        ({**RUN, "recipe": {"steps": 5}}, "recipe.steps was 4 and is 5"),
    ):
        with pytest.raises(UsageError, match=message):
            opened(tmp_path, run=run)
    with pytest.warns(GdfqWarning, match="threads was 1 and is 2"):
        Checkpoints(tmp_path).begin(RUN, {"threads": 2})
    assert differences({"a": {"b": 1}}, {"a": {"b": 1, "c": 2}}) == {"a.c": (None, 2)}


def test_state_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    opened(tmp_path, torch.nn.Linear(2, 2))[0].save()
    with pytest.raises(UsageError, match="the part does not fit"):
        opened(tmp_path, torch.nn.Linear(3, 2))


def test_piece_outside_the_folder_is_refused(tmp_path: Path) -> None:
    checkpoints, part = opened(tmp_path / "a")
    part["x"] = Frozen(torch.ones(2))
    checkpoints._pieces._names[part["x"]] = "../" + "0" * 29
    (tmp_path / "a" / f"piece-../{'0' * 29}.safetensors").parent.mkdir(exist_ok=True)
    (tmp_path / "a" / f"piece-../{'0' * 29}.safetensors").write_bytes(b"")
    checkpoints.save()
    with pytest.raises(UsageError, match="cannot have the name"):
        opened(tmp_path / "a")


def test_full_disk_does_not_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, part = opened(tmp_path)
    part["x"] = 1
    checkpoints.save()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    part["x"] = 2
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.warns(GdfqWarning, match="No space left on device"):
            checkpoints.save()
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".partial")]
    assert opened(tmp_path)[1] == {"x": 1}
    checkpoints.save()
    assert opened(tmp_path)[1] == {"x": 2}


def test_run_that_has_ended_holds_no_part(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    with checkpoints:
        checkpoints.begin(RUN, AROUND)
        part = weakref.ref(checkpoints.register("part", Results()))
        assert part() is not None
    assert part() is None


def test_removed_folder_is_created_again(tmp_path: Path) -> None:
    import shutil

    checkpoints, part = opened(tmp_path / "run")
    part["x"] = Frozen(torch.ones(2))
    checkpoints.save()
    shutil.rmtree(tmp_path / "run")
    checkpoints.save()
    assert opened(tmp_path / "run")[1]["x"].value.tolist() == [1, 1]


def test_state_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    layer = torch.nn.Linear(1, 1)
    checkpoints, _ = opened(tmp_path, layer)
    checkpoints.save()
    good = layer.weight.item()
    with torch.no_grad():
        layer.weight.fill_(torch.nan)
    checkpoints.save()
    assert len(names(tmp_path)) == 1
    assert opened(tmp_path, torch.nn.Linear(1, 1))[1].weight.item() == good


def test_incomplete_files_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint-000001-x.safetensors.0123abcd.partial").write_bytes(b"half")
    checkpoints, _ = opened(tmp_path)
    checkpoints.save()
    checkpoints.remove()
    assert not tmp_path.exists()


def test_folder_in_use_is_refused_until_it_is_released(tmp_path: Path) -> None:
    first = Checkpoints(tmp_path / "kept")
    with first:
        with pytest.raises(UsageError, match="another one is using"), Checkpoints(first.folder):
            pass
        with Checkpoints(first.folder, writes=False):  # as the other processes of a group do
            pass
    with pytest.raises(KeyboardInterrupt), first:
        raise KeyboardInterrupt
    with Checkpoints(first.folder) as again:
        again.begin(RUN, AROUND)
    again.remove()
    assert not first.folder.exists()


def test_lock_that_is_not_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a" / ".lock").mkdir(parents=True)
    with (
        pytest.raises(UsageError, match=r"\.lock must be a file that can be written"),
        Checkpoints(tmp_path / "a"),
    ):
        pass
    (tmp_path / "b").mkdir()
    (tmp_path / "elsewhere").write_text("kept")
    (tmp_path / "b" / ".lock").symlink_to(tmp_path / "elsewhere")
    with (
        pytest.raises(UsageError, match="symbolic link that leads out"),
        Checkpoints(tmp_path / "b"),
    ):
        pass
    assert (tmp_path / "elsewhere").read_text() == "kept"
    (tmp_path / "c").write_text("a file")
    with pytest.raises(UsageError, match="must be a folder"), Checkpoints(tmp_path / "c"):
        pass


def test_state_of_a_part_is_read_before_the_run_begins(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path).recorded("part") is None
    assert NullCheckpointer().recorded("part") is None
    checkpoints, part = opened(tmp_path)
    part["x"] = 1
    checkpoints.save()
    fresh = Checkpoints(tmp_path)
    assert fresh.recorded("part") == {"x": 1}
    assert fresh.recorded("other") is None
    _, again = opened(tmp_path)
    assert again == {"x": 1}


def test_recorded_state_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    class Listed:
        def state_dict(self) -> Any:
            return [1]

        def load_state_dict(self, state: Any) -> None: ...

    checkpoints, _ = opened(tmp_path, Listed())
    checkpoints.save()
    with pytest.raises(UsageError, match="state of the part does not fit"):
        Checkpoints(tmp_path).recorded("part")
