"""Networks of the libraries: timm, torchvision, Hugging Face transformers, pytorchcv, diffusers.

Each library is imported only when it is used. It loads pretrained weights through its own cache,
and gives what it knows about the images that the network takes. Weights whose pickle could run code
are not read.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gdfq.data.class_names import ClassNames, class_names, imagenet
from gdfq.data.preprocessing import Preprocessing, Resize
from gdfq.errors import UsageError, first_line
from gdfq.models.denoisers import load_denoiser
from gdfq.models.hugging_face import quiet_loading
from gdfq.models.language import is_causal, load_causal
from gdfq.models.loaded import Loaded, names_of
from gdfq.models.weights import read_weights


def from_hub(hub: str, name: str, *, pretrained: bool) -> Loaded:
    """Load a network of a library.

    Args:
        hub: A key of HUBS.
        name: The library's name of the network.
        pretrained: Load the pretrained weights; otherwise the weights are as initialised.

    Raises:
        UsageError: The library is not installed or does not know the name, or the weights are not
            in its cache and cannot be downloaded.
    """
    library = HUBS[hub].library
    package = _import(library, hub)
    try:
        return HUBS[hub].load(package, name, pretrained)
    except UsageError:
        raise
    except OSError as error:  # files that are not in the cache and cannot be downloaded
        raise UsageError(
            f"{hub}:{name} needs files of {library}, in its cache {HUBS[hub].cache()} or over the "
            f"network; it says: {first_line(error).rstrip('.')}. "
            "Connect to the network once, copy that folder from another machine, or "
            f"{HUBS[hub].otherwise}."
        ) from error
    except Exception as error:  # each library raises its own types for an unknown name
        raise UsageError(
            f"MODEL must name a network that {library} can load; for {hub}:{name} it says: "
            f"{first_line(error)}"
        ) from error


def _import(library: str, hub: str) -> Any:
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{hub}:NAME needs {library} ({error}). Install it: "
            f"pip install 'gdfq[{HUBS[hub].extra or hub}]'"
        ) from error
    except Exception as error:  # for example torchvision kernels built for another torch
        raise UsageError(
            f"{hub}:NAME needs {library}, which fails when it is imported: {first_line(error)}. "
            "torch and torchvision must be of one release and one build (CPU or CUDA): install "
            "both from the same place."
        ) from error


def _timm(timm: Any, name: str, pretrained: bool) -> Loaded:
    if ":" not in name and not timm.is_model(name):
        raise UsageError(f"timm has no network {name!r}. timm.list_models('*word*') finds names.")
    with _no_retries():  # it reads safetensors, or torch files with weights_only
        module = timm.create_model(name, pretrained=pretrained)
    return Loaded(module, *_of_timm(module.pretrained_cfg), _imagenet_of_timm(module))


def _imagenet_of_timm(module: Any) -> ClassNames | None:
    """The ids of ImageNet, if the pretrained weights are for its 1,000 classes."""
    config = module.pretrained_cfg
    tag = str(config.get("tag") or "") + str(config.get("hf_hub_id") or "")
    is_imagenet = config.get("num_classes") == len(imagenet()) and tag.endswith("in1k")
    return imagenet() if is_imagenet else None


def _of_timm(config: Mapping[str, Any]) -> tuple[tuple[int, ...] | None, Preprocessing | None]:
    """Input shape and preprocessing of a `pretrained_cfg`."""
    shape = config.get("input_size")
    if not shape or not config.get("mean") or not config.get("std"):
        return tuple(shape) if shape else None, None
    resize = Resize(
        crop=config.get("crop_pct") or 0.875,  # timm's own default
        squash=config.get("crop_mode") == "squash",
        interpolation=config.get("interpolation") or "bilinear",
    )
    return tuple(shape), Preprocessing.of(shape[0], config["mean"], config["std"], resize)


def _torchvision(torchvision: Any, name: str, pretrained: bool) -> Loaded:
    models = torchvision.models
    weights = getattr(models.get_model_weights(name), "DEFAULT", None)
    if pretrained:
        if weights is None:
            raise UsageError(
                f"torchvision has no weights for {name!r}. Give them with --weights FILE."
            )
        # The builder reads the same file without weights_only; what this lets pass is harmless.
        weights.get_state_dict(check_hash=True, map_location="cpu", weights_only=True)
    module = models.get_model(name, weights=weights if pretrained else None)
    categories = None if weights is None else weights.meta.get("categories")
    return Loaded(
        module,
        *_of_torchvision(None if weights is None else weights.transforms()),
        class_names(categories),
    )


def _of_torchvision(preset: Any) -> tuple[tuple[int, ...] | None, Preprocessing | None]:
    """Input shape and preprocessing of the transforms that belong to classification weights."""
    if not all(hasattr(preset, name) for name in ("crop_size", "resize_size", "mean", "std")):
        return None, None
    (crop,), (size,) = preset.crop_size, preset.resize_size
    resize = Resize(min(1.0, crop / size), interpolation=preset.interpolation.value)
    channels = len(preset.mean)
    return (channels, crop, crop), Preprocessing.of(channels, preset.mean, preset.std, resize)


def _transformers(transformers: Any, name: str, pretrained: bool) -> Loaded:
    auto, safe = transformers.AutoModelForImageClassification, {"trust_remote_code": False}
    with _no_retries(), quiet_loading():
        if is_causal(transformers.AutoConfig.from_pretrained(name, **safe), name):
            return load_causal(transformers, name, pretrained=pretrained)
        if pretrained:
            module, report = auto.from_pretrained(
                name, use_safetensors=True, output_loading_info=True, **safe
            )
            missing = sorted(report["missing_keys"])
            if missing:
                raise UsageError(
                    f"hf:{name} must hold a trained image classifier; its weights lack "
                    f"{', '.join(missing[:3])}. Choose one that was trained to classify."
                )
        else:
            module = auto.from_config(transformers.AutoConfig.from_pretrained(name, **safe), **safe)
        try:
            processor = transformers.AutoImageProcessor.from_pretrained(name, **safe).to_dict()
        except (OSError, ValueError):  # many repositories have none
            processor = {}
    channels = getattr(module.config, "num_channels", 3)
    shape, preprocessing = _of_processor(processor, channels)
    size = getattr(module.config, "image_size", None)
    if shape is None and size is not None:
        shape = (channels, *((size, size) if isinstance(size, int) else size))
    return Loaded(module, shape, preprocessing, names_of(module))


def _of_processor(
    processor: Mapping[str, Any], channels: int
) -> tuple[tuple[int, ...] | None, Preprocessing | None]:
    """Input shape and preprocessing of a Hugging Face image processor's values.

    Processors that swap or shift channels have no such preprocessing.
    """
    size, crop = (dict(processor.get(key) or {}) for key in ("size", "crop_size"))
    edge = size.get("shortest_edge")
    height, width = size.get("height", edge), size.get("width", edge)
    if not height or not width:
        return None, None
    squash, share = edge is None, processor.get("crop_pct")
    if edge is not None and share is not None:
        squash, share = edge >= 384, 1.0 if edge >= 384 else share  # as ConvNeXt was trained
    elif processor.get("do_center_crop") and crop.get("height"):
        share = min(1.0, crop["height"] / height)
        height, width = crop["height"], crop["width"]
    shape = (channels, height, width)
    if processor.get("do_flip_channel_order") or processor.get("rescale_offset"):
        return shape, None
    mean: Any = 0.0
    std: Any = 1.0
    if processor.get("do_normalize"):
        mean, std = processor["image_mean"], processor["image_std"]
    unit = 255 * processor["rescale_factor"] if processor.get("do_rescale") else 255.0
    resize = Resize(share or 1.0, squash, _pillow_filter(processor.get("resample")))
    mean, std = (np.asarray(values, float) / unit for values in (mean, std))
    return shape, Preprocessing.of(channels, mean, std, resize)


def _pillow_filter(resample: int | None) -> str:
    from PIL.Image import Resampling

    return "bilinear" if resample is None else Resampling(resample).name.lower()


def _pytorchcv(_: Any, name: str, pretrained: bool) -> Loaded:
    provider = importlib.import_module("pytorchcv.model_provider")
    if pretrained:
        store = importlib.import_module("pytorchcv.models.common.model_store")
        # The provider reads the same file without weights_only; what this lets pass is harmless.
        read_weights(Path(store.get_model_file(name.lower())))
    module = provider.get_model(name, pretrained=pretrained)
    size = getattr(module, "in_size", None)
    return Loaded(module, None if size is None else (getattr(module, "in_channels", 3), *size))


@contextmanager
def _no_retries() -> Iterator[None]:
    """Restrict the Hugging Face hub to its cache while it cannot be reached.

    By default the hub tries each file six times, for up to a minute, and has no option for less.
    """
    hub = importlib.import_module("huggingface_hub")
    constants, offline = hub.constants, hub.constants.HF_HUB_OFFLINE
    if not offline:
        try:
            hub.utils.get_session().head(constants.ENDPOINT, timeout=10)
        except Exception:  # of the http library that this version of the hub has
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


def _hub_cache() -> str:
    return str(importlib.import_module("huggingface_hub").constants.HF_HUB_CACHE)


def _torch_cache() -> str:
    from torch.hub import get_dir

    return f"{get_dir()}/checkpoints"


def _ptcv_cache() -> str:
    return str(Path("~/.torch/models").expanduser())


@dataclass(frozen=True)
class Hub:
    """A library of networks.

    Attributes:
        load: Takes the imported library, a name and whether to load pretrained weights.
        library: Name of the package to import.
        cache: Returns the folder where the library keeps its files.
        otherwise: Advice for when files cannot be downloaded, for error messages.
        extra: The extra that installs it, if it has another name than the prefix of MODEL.
    """

    load: Callable[[Any, str, bool], Loaded]
    library: str
    cache: Callable[[], str]
    otherwise: str = "give the weights with --weights FILE"
    extra: str | None = None


HUBS = {
    "timm": Hub(_timm, "timm", _hub_cache),
    "torchvision": Hub(_torchvision, "torchvision", _torch_cache),
    "hf": Hub(_transformers, "transformers", _hub_cache, "give a folder with them as hf:FOLDER"),
    "ptcv": Hub(_pytorchcv, "pytorchcv", _ptcv_cache),
    "diffusers": Hub(
        load_denoiser,
        "diffusers",
        _hub_cache,
        "give a folder that save_pretrained wrote, as diffusers:FOLDER",
        extra="diffusion",
    ),
}
"""Prefix of MODEL -> the library. The prefix is the name of the extra that installs it, too."""
