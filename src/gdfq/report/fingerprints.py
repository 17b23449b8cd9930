"""Whether two runs of one network were tested on the same images."""

from dataclasses import dataclass

from gdfq.report.read import Run, number, text


@dataclass(frozen=True)
class ImageFingerprints:
    """What identifies the test images of a run; None stands for what its files do not hold.

    Attributes:
        data: Hash of all labels and of the pixels of a few images, which runs before version 0.2
            do not have.
        predictions: Hash of labels and the original's predictions, which runs without evidence do
            not have.
        file: Path as it was given, number of images and the original's accuracy in percent. Equal
            ones are taken for the same images; others can be, too, under another path.
    """

    data: str | None = None
    predictions: str | None = None
    file: tuple[str, float | None, float | None] | None = None

    def same_as(self, other: "ImageFingerprints") -> bool | None:
        """Return whether they are of the same images, or None if that is not known.

        The first fingerprint that both have decides.
        """
        pairs = (self.data, other.data), (self.predictions, other.predictions)
        for mine, theirs in pairs:
            if mine is not None and theirs is not None:
                return mine == theirs
        return True if self.file is not None and self.file == other.file else None


def fingerprints_of(run: Run) -> ImageFingerprints:
    """Return what the files of a run hold of its test images."""
    metrics, path = run.metrics, text(run.config.get("test"))
    original = number((metrics.get("teacher") or {}).get("top1"))
    return ImageFingerprints(
        data=text(metrics.get("test_data")),
        predictions=text((run.evidence.get("test") or {}).get("fingerprint")),
        file=None if path is None else (path, number(metrics.get("test_images")), original),
    )
