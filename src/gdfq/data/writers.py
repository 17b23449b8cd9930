"""Writing synthetic images as files that other tools read."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gdfq.data.preprocessing import Preprocessing
from gdfq.errors import UsageError
from gdfq.files.atomic import make_folder, write_atomically

PIXELS, FLOATS, PNG = "images.npz", "images.npy", "png"


@dataclass(frozen=True)
class ImageFiles:
    """The image files of one folder.

    - `images.npz`: `images` uint8 [N, C, *size] and, if there are labels, `labels` [N], as
      `load_data` reads them.
    - `images.npy`: the normalised floats, float32 [N, C, *size], as the network takes them.
    - `png/CLASS/NUMBER.png`: the pixels, in one sub-folder per class, sorted in class order.
      Classes without images have empty sub-folders.

    Attributes:
        folder: The folder.
        png: Whether PNG files are written.
    """

    folder: Path
    png: bool = False

    def prepare(self, input_shape: tuple[int, ...]) -> None:
        """Create the folder.

        Args:
            input_shape: Shape of one image.

        Raises:
            UsageError: The folder already holds images or cannot be written, or the images cannot
                be PNG files.
        """
        if any(os.path.lexists(self.folder / name) for name in (PIXELS, FLOATS, PNG)):
            raise UsageError(
                f"{self.folder} already holds images. Choose another folder or remove them."
            )
        if self.png and (len(input_shape) != 3 or input_shape[0] not in (1, 3)):
            raise UsageError(
                "PNG files need images of 1 or 3 channels [C, H, W]; this network takes "
                f"{list(input_shape)}. Remove --png: {PIXELS} and {FLOATS} hold any shape."
            )
        make_folder(self.folder)

    def write(
        self, images: Tensor, labels: Tensor | None, preprocessing: Preprocessing, classes: int
    ) -> list[Path]:
        """Write the files.

        Args:
            images: Normalised images, [N, C, *size].
            labels: Class of each image, [N], if known.
            preprocessing: From pixels to these images; its inverse gives the pixels.
            classes: Number of classes.

        Returns:
            The paths written.
        """
        paths = [self.folder / PIXELS, self.folder / FLOATS]
        if self.png:
            paths.append(self.folder / PNG)
            given = torch.zeros(len(images), dtype=torch.long) if labels is None else labels
            write_png(paths[-1], preprocessing.pixels(images), given, classes)
        np.save(paths[1], images.contiguous().numpy())
        more = {} if labels is None else {"labels": labels}
        write_atomically(paths[0], preprocessing.to_npz(images, **more))
        return paths


def write_png(folder: Path, pixels: Tensor, labels: Tensor, classes: int) -> None:
    """Write images as folder/CLASS/NUMBER.png, with leading zeros in both.

    Args:
        folder: Where the sub-folders are created.
        pixels: uint8 [N, 1 or 3, H, W].
        labels: Class of each image, [N].
        classes: Number of classes; each gets a sub-folder.
    """
    digits, places = len(str(classes - 1)), len(str(len(pixels) - 1))
    folders = [folder / f"{label:0{digits}}" for label in range(classes)]
    for path in folders:
        make_folder(path)
    for number, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
        array = (image[0] if len(image) == 1 else image.permute(1, 2, 0)).contiguous().numpy()
        Image.fromarray(array).save(folders[label] / f"{number:0{places}}.png")
