"""Which images from elsewhere a screen keeps."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from support import networks
from support.narrowing import present
from torch import Tensor, nn

from gdfq.analysis.candidates import measure_candidates
from gdfq.data.datasets import ArrayData, load_unlabelled
from gdfq.data.preprocessing import Preprocessing, Resize
from gdfq.errors import GdfqWarning, UsageError
from gdfq.execution.context import Context
from gdfq.files.states import from_bytes, to_bytes
from gdfq.functional.losses import relative_statistics_loss
from gdfq.functional.screening import energy
from gdfq.graph.capture import Captured, capture
from gdfq.graph.statistics import StatisticsNetwork
from gdfq.plan.elsewhere import check_takes_candidates
from gdfq.plan.method import resolve_method
from gdfq.recipes import PAPER
from gdfq.sources import pool as pools
from gdfq.sources.base import Batch
from gdfq.sources.candidates import VERDICTS, Candidates, Screen, Screening
from gdfq.sources.pool import ImagePool, PoolStream
from gdfq.sources.screen import screened

PLAIN, SCREEN = Preprocessing((0.0,), (1.0,)), Screen()
LENIENT = Screen(known_share=1.0, least_share=0.0)
"""No image is dropped because the network does not know it."""


def stripes(count: int, seed: int) -> Tensor:
    """Images [count, 3, 16, 16] that no noise resembles."""
    draw = torch.Generator().manual_seed(seed)
    high = torch.rand(count, 3, 1, 1, generator=draw)
    mask = torch.arange(16) % 2 == 0
    return (high * mask + 0.1 * torch.rand(count, 3, 16, 16, generator=draw)).float()


def pool_of(images: Tensor, screen: Screen = SCREEN) -> Candidates:
    return Candidates(ArrayData(images, None), PLAIN, screen=screen)


@pytest.fixture(scope="module")
def teacher() -> Captured:
    images = stripes(64, 0)
    return capture(networks.that_saw(images), images[:1])


OWN = stripes(40, 1)


def test_screen_keeps_the_images_that_pass_all_filters(teacher: Captured) -> None:
    images = stripes(60, 2)
    images[:20] = torch.randn(20, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    found, kept, labels = screened(teacher, OWN, pool_of(images), 60, Context(seed=4))
    assert found.refused is None
    assert sorted(found.judged.tolist()) == list(range(60))
    assert kept.equal(images[found.kept])
    with torch.no_grad():
        assert present(labels).equal(teacher.network(kept).argmax(1))
        energies = energy(teacher.network(images[found.judged]))
        limit = energy(teacher.network(OWN)).quantile(0.95)
    torch.testing.assert_close(found.energies, energies)
    familiar = energies <= limit
    dropped_by_energy = found.verdicts == VERDICTS.index("energy")
    assert dropped_by_energy.equal(~familiar)
    assert dropped_by_energy.any()

    # The statistics of all familiar images but one, by a pass of these images.
    statistics = StatisticsNetwork(teacher)
    rest = images[found.judged[familiar]]

    def distance(chosen: Tensor) -> Tensor:
        with torch.no_grad():
            return relative_statistics_loss(statistics(chosen)[1], statistics.stored)

    without = [distance(torch.cat([rest[:i], rest[i + 1 :]])) for i in range(len(rest))]
    worse = distance(rest) > torch.stack(without)
    assert (found.verdicts[familiar] == VERDICTS.index("sensitivity")).equal(worse)
    assert 0 < len(found.kept) < len(rest)


def test_screen_stops_at_enough_images(teacher: Captured) -> None:
    whole, _, _ = screened(teacher, OWN, pool_of(stripes(60, 2)), 60, Context())
    few, kept, labels = screened(teacher, OWN, pool_of(stripes(60, 2)), 5, Context())
    assert len(kept) == len(present(labels)) == len(few.kept) == 5
    assert few.kept.equal(whole.kept[:5])
    assert few.verdicts[-1] == 0  # nothing behind the last one that was needed
    assert few.as_values()["share"] == round(5 / 45, 4)
    other, _, _ = screened(teacher, OWN, pool_of(stripes(60, 2)), 5, Context(seed=1))
    assert not other.judged[:5].equal(few.judged[:5])


def test_noise_is_refused(teacher: Captured) -> None:
    noise = torch.randn(50, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 3
    found, kept, labels = screened(teacher, OWN, pool_of(noise, LENIENT), 20, Context())
    assert "is nearer to that of noise" in present(found.refused)
    assert len(found.kept) == len(kept) == len(present(labels)) == 0
    assert found.distances["kept"] >= found.distances["noise"] > found.distances["own"]
    assert "none of the 50 proxy images is used" in str(found)
    assert len(found.judged)  # some are judged for the report
    all_of_them = pool_of(noise, Screen(filters=False))
    found, kept, _ = screened(teacher, OWN, all_of_them, 20, Context())
    assert (found.refused, len(kept)) == (None, 20)


def test_pool_is_refused_from_the_middle_between_own_images_and_noise_on(teacher: Captured) -> None:
    refused = []
    for strength in (0.0, 0.1, 0.2, 0.3, 0.4, 0.6):
        draw = torch.Generator().manual_seed(5)
        pool = stripes(60, 2) + strength * torch.randn(60, 3, 16, 16, generator=draw)
        found, kept, _ = screened(teacher, OWN, pool_of(pool, LENIENT), 40, Context())
        place = found.distances
        assert (found.refused is not None) == (len(kept) == 0)
        assert (len(kept) == 0) == (2 * place["kept"] >= place["own"] + place["noise"])
        refused.append(found.refused is not None)
    assert set(refused) == {False, True}
    assert refused == sorted(refused)  # more noise never makes a pool suitable


def test_pool_of_which_hardly_an_image_is_known_is_refused(teacher: Captured) -> None:
    strict = Screen(known_share=0.0, least_share=0.5)
    found, kept, _ = screened(teacher, OWN, pool_of(stripes(50, 2), strict), 50, Context())
    assert "knows only" in present(found.refused)
    assert not len(kept)


def test_network_without_classes_is_screened_by_statistics_alone() -> None:
    images = stripes(32, 0)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=1.0), nn.Conv2d(8, 2, 1))
    network.train()(images)
    teacher = capture(network.eval(), images[:1])
    found, kept, labels = screened(teacher, OWN, pool_of(stripes(30, 2)), 30, Context())
    assert (labels, found.max_energy, len(found.energies)) == (None, None, 0)
    assert 0 < len(kept) < 30


def test_network_without_batch_norms_is_screened_by_patches() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    images = stripes(30, 2)
    images[:6] = 0.5  # patches that are equal have no entropy
    teacher = capture(network.eval(), images[:1])
    screen = Screen(known_share=1.0, least_share=0.0)
    own = torch.cat([OWN, images[:1]])
    found, _, _ = screened(teacher, own, pool_of(images, screen), 30, Context())
    flat = found.judged[found.verdicts == VERDICTS.index("entropy")].tolist()
    assert set(range(6)) <= set(flat) | set(found.judged[found.verdicts == 1].tolist())
    assert found.distances == {}
    scores = found.scores[found.verdicts == 0]
    assert (scores >= present(found.min_entropy)).all()


def files_of(folder: Path, pixels: Tensor, damaged: Sequence[int]) -> Candidates:
    """Image files of pixels, of which some end behind their headers."""
    for index, image in enumerate(pixels):
        file = folder / f"{index:03d}.png"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
        if index in damaged:
            file.write_bytes(file.read_bytes()[:45])
    return Candidates(load_unlabelled(folder, (3, 16, 16), Resize()), PLAIN)


def test_damaged_files_are_left_out_and_change_nothing_else(
    teacher: Captured, tmp_path: Path
) -> None:
    pixels = (255 * stripes(60, 2)).clip(0, 255).to(torch.uint8)
    whole = Candidates(ArrayData(pixels, None), PLAIN)
    expected, images, labels = screened(teacher, OWN, whole, 60, Context())
    unknown = expected.of("energy")[:2]  # the network does not know these, so nothing else changes
    damaged = expected.judged[unknown].tolist()
    assert len(damaged) == 2

    candidates = files_of(tmp_path, pixels, damaged)
    with pytest.warns(GdfqWarning, match=r"of 60 proxy images that were judged 2 cannot") as told:
        found, kept, answers = screened(teacher, OWN, candidates, 60, Context())
    assert f"such as {tmp_path}/{damaged[0]:03d}.png (" in str(told[0].message)
    assert found.of("unreadable").equal(unknown)
    assert found.energies[unknown].isnan().all()
    for of_found, of_expected in (
        (found.verdicts, expected.verdicts),
        (found.energies, expected.energies),
    ):
        of_expected[unknown] = of_found[unknown]
        assert of_found.nan_to_num().equal(of_expected.nan_to_num())
    assert found.scores.nan_to_num().equal(expected.scores.nan_to_num())
    assert found.judged.equal(expected.judged)
    assert kept.equal(images)
    assert present(answers).equal(present(labels))
    assert found.as_values()["dropped"]["unreadable"] == 2
    assert "2 because they cannot be decoded (unreadable)" in str(found)
    shown = measure_candidates(candidates, found)  # reads no damaged file
    assert {example.verdict for example in shown.dropped} == set(found.as_values()["dropped"]) - {
        "unreadable"
    }


@pytest.mark.parametrize("filters", [True, False])
def test_pool_of_damaged_files_is_refused(teacher: Captured, tmp_path: Path, filters: bool) -> None:
    candidates = files_of(tmp_path, torch.zeros(4, 3, 16, 16, dtype=torch.uint8), range(4))
    candidates = replace(candidates, screen=Screen(filters=filters))
    with pytest.warns(GdfqWarning, match="4 cannot be decoded"):
        found, kept, labels = screened(teacher, OWN, candidates, 4, Context())
    assert str(found) == ("none of the 4 proxy images is used: none of them can be decoded")
    assert len(kept) == len(present(labels)) == 0


def test_network_that_cannot_judge_is_refused() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 3))
    teacher = capture(network.eval(), torch.zeros(1, 3, 2, 2), classifier=False)
    candidates = pool_of(torch.zeros(4, 3, 2, 2))
    with pytest.raises(UsageError, match="this network has none"):
        screened(teacher, torch.zeros(4, 3, 2, 2), candidates, 4, Context())


class Own:
    """A source of the images of `OWN`, in batches of 16."""

    batch = 16
    iterations = None

    def stream(self, teacher: Captured, *, steps: int, context: Context) -> Iterator[Batch]:
        for part in OWN.split(16)[:steps]:
            yield Batch((part,), torch.zeros(len(part)).long(), None)


def pool(**changes: object) -> ImagePool:
    made = ImagePool(Own(), images=36, batch=10, augmented=False)  # type: ignore[arg-type]
    return replace(made.with_candidates(pool_of(stripes(60, 2)), 20), **changes)  # type: ignore[arg-type]


def test_pool_mixes_its_own_images_and_those_that_were_kept(teacher: Captured) -> None:
    made = pool()
    assert made.images_held == 56
    stream = made.stream(teacher, steps=5, context=Context())
    batches = list(stream)
    screening = present(made.screening_of(stream))
    kept = stripes(60, 2)[screening.kept]
    assert len(kept) == 20
    expected = torch.cat([OWN[:36], kept])
    seen = torch.cat([batch.images for batch in batches])
    order = [int((expected - image).flatten(1).abs().sum(1).argmin()) for image in seen]
    assert len(set(order)) == 50  # of 56, because the last batch of an epoch is left out
    assert expected[order].equal(seen)
    labels = torch.cat([present(batch.labels) for batch in batches])
    with torch.no_grad():
        answers = torch.cat([torch.zeros(36).long(), teacher.network(kept).argmax(1)])
    assert labels.equal(answers[order])


def test_resumed_pool_judges_nothing_again(
    teacher: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = list(pool().stream(teacher, steps=8, context=Context()))
    stopped = pool().stream(teacher, steps=8, context=Context())
    for _ in range(3):
        next(stopped)
    pieces: dict[str, bytes] = {}

    def name(part: object) -> str:
        key = str(len(pieces))
        pieces[key] = to_bytes(part.value, name)  # type: ignore[attr-defined]
        return key

    state = to_bytes(stopped.state_dict(), name)

    def judged(*_: object) -> None:
        raise AssertionError("the candidates were judged before")

    monkeypatch.setattr(pools, "screened", judged)
    from gdfq.files.states import Frozen

    def piece(key: str) -> Frozen:
        return Frozen(from_bytes(pieces[key], piece))

    resumed = pool().stream(teacher, steps=8, context=Context())
    assert isinstance(resumed, PoolStream)
    resumed.load_state_dict(from_bytes(state, piece))
    for one, other in zip(whole[3:], resumed, strict=True):
        assert one.images.equal(other.images)
    assert str(present(resumed.screening)) == str(present(stopped.screening))


def test_pool_continues_without_an_unsuitable_pool(teacher: Captured) -> None:
    noise = torch.randn(50, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 3
    stream = pool(candidates=pool_of(noise)).stream(teacher, steps=3, context=Context())
    with pytest.warns(GdfqWarning, match="none of the 50 proxy images is used"):
        batches = list(stream)
    assert sum(map(len, batches)) == 30


def test_candidates_need_a_pool_and_a_recipe_without_labels() -> None:
    with pytest.raises(UsageError, match="while the student learns"):
        PAPER.source.with_candidates(pool_of(OWN), 3)
    check_takes_candidates(resolve_method("w4a4", "fast"))
    with pytest.raises(UsageError, match="'synq' learns labels"):
        check_takes_candidates(resolve_method("w4a4", "synq"))
    with pytest.raises(UsageError, match="budget does not count"):
        check_takes_candidates(resolve_method("w4a4", "fast", budget="5m"))


def test_screening_says_what_was_judged_dropped_and_why() -> None:
    verdicts = torch.tensor(
        [VERDICTS.index(name) for name in ("kept", "energy", "kept", "energy", "sensitivity")]
    )
    found = Screening(
        "proxy",
        9,
        torch.arange(5),
        verdicts,
        torch.zeros(5),
        torch.zeros(5),
        6,
        0.0,
        None,
        {},
        None,
    )
    assert str(found) == (
        "of 9 proxy images 5 were judged, until 2 had passed; dropped were 2 because they are unlike "
        "what the network knows (energy) and 1 because they worsen the match of the batch-norm "
        "statistics (sensitivity). 25 % of the images for tuning are of these"
    )
    everything = replace(found, candidates=5, verdicts=torch.zeros(5).long(), own=5)
    assert str(everything) == (
        "of 5 proxy images, which were all judged, 5 passed. 50 % of the images for tuning are of these"
    )
