"""Networks of libraries: weights, configurations, errors."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import networks, torchvision_shim
from support.narrowing import present
from torch import nn

import gdfq
from gdfq.cli import main
from gdfq.data.preprocessing import Preprocessing, Resize
from gdfq.errors import UsageError
from gdfq.graph.capture import capture
from gdfq.models import hubs
from gdfq.models.registry import load_model

_OPERATORS = torchvision_shim.define_missing_operators()  # they are there while this lives


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture
def fake_timm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A timm that has one network and records the calls for it."""

    def create_model(name: str, pretrained: bool) -> nn.Module:
        package.asked.append((name, pretrained))
        if pretrained:
            raise OSError("no route to host")
        network = networks.Residual()
        configuration = {
            "input_size": (3, 8, 8),
            "crop_pct": 0.5,
            "crop_mode": "squash",
            "interpolation": "bicubic",
            "mean": (0.5, 0.4, 0.3),
            "std": (0.3, 0.2, 0.1),
        }
        setattr(network, "pretrained_cfg", configuration)  # noqa: B010 (mypy takes attributes of a module for tensors)
        return network

    package: Any = ModuleType("timm")
    package.asked = []
    package.create_model = create_model
    package.is_model = lambda name: name == "residual"
    hub: Any = ModuleType("huggingface_hub")
    hub.constants = SimpleNamespace(HF_HUB_OFFLINE=False, HF_HUB_CACHE="/cache/hub", ENDPOINT="x")
    monkeypatch.setitem(sys.modules, "timm", package)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    return package


def test_library_gives_the_network_and_its_configuration(
    fake_timm: ModuleType, tmp_path: Path
) -> None:
    loaded = load_model("timm:residual", "random")
    assert (loaded.input_shape, loaded.preprocessing) == (
        (3, 8, 8),
        Preprocessing((0.5, 0.4, 0.3), (0.3, 0.2, 0.1), Resize(0.5, True, "bicubic")),
    )
    state = networks.make("Residual").state_dict()
    save_file(state, tmp_path / "w.safetensors")
    given = load_model("timm:residual", tmp_path / "w.safetensors").module
    assert torch.equal(given.get_parameter("conv1.weight"), state["conv1.weight"])
    assert fake_timm.asked == [("residual", False)] * 2  # nothing was downloaded


def test_random_weights_are_reproducible_and_leave_the_global_state(fake_timm: ModuleType) -> None:
    before = torch.random.get_rng_state()
    first, second = (load_model("timm:residual", "random").module for _ in range(2))
    assert torch.equal(first.get_parameter("conv1.weight"), second.get_parameter("conv1.weight"))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_error_of_unreachable_weights_names_the_cache(fake_timm: ModuleType) -> None:
    with pytest.raises(UsageError) as caught:
        load_model("timm:residual")
    for part in ("timm:residual", "/cache/hub", "no route to host", "--weights FILE"):
        assert part in str(caught.value)
    assert sys.modules["huggingface_hub"].constants.HF_HUB_OFFLINE is False  # as it was


def test_unknown_names_are_refused(fake_timm: ModuleType) -> None:
    with pytest.raises(UsageError, match="timm has no network 'residuum'"):
        load_model("timm:residuum")


@pytest.mark.parametrize("hub", hubs.HUBS)
def test_error_of_a_missing_library_names_its_extra(
    hub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, hubs.HUBS[hub].library, None)
    extra = hubs.HUBS[hub].extra or hub
    with pytest.raises(UsageError, match=rf"pip install 'gdfq\[{extra}\]'"):
        load_model(f"{hub}:anything")


def test_torchvision_of_another_torch_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('no torchvision::nms')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UsageError, match=r"no torchvision::nms.*one release and one build"):
        load_model("torchvision:resnet18")


def test_quantized_network_keeps_the_preprocessing_of_the_library(
    fake_timm: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--input, --mean and --std are not needed, and no warning asks for them."""
    call = ["quantize", "timm:residual", "--weights", "random", "--recipe", "paper", "--no-onnx"]
    assert main([*call, "--steps", "4", "--out", str(tmp_path / "run")]) == 0
    assert "warning" not in capsys.readouterr().err
    card = gdfq.load(tmp_path / "run").card
    assert card.input_shape == (3, 8, 8)
    assert card.preprocessing == load_model("timm:residual", "random").preprocessing


@pytest.mark.parametrize(
    ("values", "shape", "resize"),
    [
        (  # ViT
            {"size": {"height": 224, "width": 224}, "resample": 2},
            (3, 224, 224),
            Resize(1.0, True, "bilinear"),
        ),
        (  # MobileNetV2
            {
                "size": {"shortest_edge": 256},
                "do_center_crop": True,
                "crop_size": {"height": 224, "width": 224},
                "resample": 2,
            },
            (3, 224, 224),
            Resize(0.875, False, "bilinear"),
        ),
        (  # ResNet, ConvNeXt
            {"size": {"shortest_edge": 224}, "crop_pct": 0.875, "resample": 3},
            (3, 224, 224),
            Resize(0.875, False, "bicubic"),
        ),
        (
            {"size": {"shortest_edge": 384}, "crop_pct": 0.875, "resample": 3},
            (3, 384, 384),
            Resize(1.0, True, "bicubic"),
        ),
    ],
)
def test_hugging_face_processors_are_read(
    values: dict[str, Any], shape: tuple[int, ...], resize: Resize
) -> None:
    common = {
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": IMAGENET[0],
        "image_std": IMAGENET[1],
    }
    found, preprocessing = hubs._of_processor({**common, **values}, 3)
    assert found == shape
    assert preprocessing is not None
    assert preprocessing.mean == pytest.approx(IMAGENET[0])
    assert preprocessing.std == pytest.approx(IMAGENET[1])
    assert preprocessing.resize == resize


def test_processor_without_scaling_or_normalisation_is_read() -> None:
    size = {"size": {"height": 8, "width": 8}, "do_rescale": True}
    # pixels · 2/255, minus 1: as mean 0.5 and std 0.5 of pixels / 255
    half = {"rescale_factor": 2 / 255, "do_normalize": True, "image_mean": [1], "image_std": [1]}
    _, found = hubs._of_processor({**size, **half}, 1)
    assert found is not None
    assert found.mean == pytest.approx((0.5,))
    assert found.std == pytest.approx((0.5,))
    _, found = hubs._of_processor({**size, "rescale_factor": 1 / 255}, 3)
    assert found is not None
    assert found.mean == (0, 0, 0)
    assert found.std == pytest.approx((1, 1, 1))
    flipped = {**size, "rescale_factor": 1 / 255, "do_flip_channel_order": True}
    assert hubs._of_processor(flipped, 3) == ((3, 8, 8), None)
    assert hubs._of_processor({}, 3) == (None, None)


def test_torchvision_presets_are_read() -> None:
    preset = SimpleNamespace(
        crop_size=[224],
        resize_size=[232],
        mean=IMAGENET[0],
        std=IMAGENET[1],
        interpolation=SimpleNamespace(value="bilinear"),
    )
    shape, preprocessing = hubs._of_torchvision(preset)
    assert shape == (3, 224, 224)
    assert preprocessing == Preprocessing(*IMAGENET, Resize(224 / 232))
    assert hubs._of_torchvision(SimpleNamespace()) == (None, None)  # detection


@pytest.mark.parametrize(
    ("spec", "shape", "classes", "resize"),
    [
        pytest.param(
            *("timm:resnet18", (3, 224, 224), 1000, Resize(0.95, False, "bicubic")),
            marks=pytest.mark.needs("timm"),
        ),
        pytest.param(
            *("timm:mobilenetv3_small_050", (3, 224, 224), 1000, Resize(0.875, False, "bicubic")),
            marks=pytest.mark.needs("timm"),
        ),
        pytest.param(
            *("torchvision:mobilenet_v2", (3, 224, 224), 1000, Resize(224 / 232)),
            marks=pytest.mark.needs("torchvision"),
        ),
        pytest.param(
            *("ptcv:resnet20_cifar10", (3, 32, 32), 10, None),
            marks=pytest.mark.needs("pytorchcv"),
        ),
    ],
)
def test_installed_library_gives_the_known_configuration(
    spec: str, shape: tuple[int, ...], classes: int, resize: Resize | None
) -> None:
    loaded = load_model(spec, "random")
    assert loaded.input_shape == shape
    if resize is None:
        assert loaded.preprocessing is None
    else:
        assert loaded.preprocessing == Preprocessing(*IMAGENET, resize)
    with torch.no_grad():
        assert loaded.module.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, classes)


@pytest.mark.needs("pytorchcv")
def test_network_of_a_library_is_captured() -> None:
    loaded = load_model("ptcv:resnet20_cifar10", "random")
    captured = capture(loaded.module, torch.zeros(1, *present(loaded.input_shape)))
    assert (captured.classes, len(captured.batch_norms)) == (10, 21)


@pytest.mark.needs("transformers")
def test_hugging_face_folder_is_loaded(tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification, ViTConfig

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        num_labels=5,
    )
    saved = AutoModelForImageClassification.from_config(config).eval()
    saved.save_pretrained(tmp_path)
    loaded = load_model(f"hf:{tmp_path}")
    assert (loaded.input_shape, loaded.preprocessing) == ((3, 32, 32), None)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.module.eval()(images).logits, saved(images).logits)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(
            {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
        )
    )
    # What the file leaves out has the defaults of its class.
    assert load_model(f"hf:{tmp_path}").preprocessing == Preprocessing(
        (0.5,) * 3, (0.5,) * 3, Resize(1.0, True, "bilinear")
    )
    # A network that was not trained to classify would get a random head.
    state = saved.state_dict()
    del state["classifier.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"lack classifier\.weight"):
        load_model(f"hf:{tmp_path}")
    (tmp_path / "model.safetensors").unlink()
    torch.save(saved.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match="safetensors"):
        load_model(f"hf:{tmp_path}")


class _Trap:
    """Pickled code that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


@pytest.mark.needs("torchvision")
def test_cached_torchvision_weights_run_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = torchvision.models.get_model_weights("mobilenet_v2").DEFAULT
    file = tmp_path / "hub" / "checkpoints" / weights.url.rsplit("/", 1)[1]
    file.parent.mkdir(parents=True)
    torch.save({"features": _Trap(tmp_path / "trap")}, file)
    with pytest.raises(UsageError, match="mobilenet_v2"):
        load_model("torchvision:mobilenet_v2")
    assert not (tmp_path / "trap").exists()
    state = torchvision.models.mobilenet_v2().state_dict()
    torch.save(state, file)
    loaded = load_model("torchvision:mobilenet_v2").module  # from the cache
    assert torch.equal(loaded.get_parameter("classifier.1.weight"), state["classifier.1.weight"])


@pytest.mark.needs("pytorchcv")
def test_cached_pytorchcv_weights_run_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pytorchcv.models.common import model_store

    file = tmp_path / "net.pth"
    monkeypatch.setattr(model_store, "get_model_file", lambda *_, **__: str(file))
    torch.save({"features": _Trap(tmp_path / "trap")}, file)
    with pytest.raises(UsageError, match="without pickled code"):
        load_model("ptcv:resnet20_cifar10")
    assert not (tmp_path / "trap").exists()


@pytest.mark.needs("timm")
def test_cached_timm_weights_are_found_without_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    import timm

    name = "mobilenetv3_small_050"
    state = timm.create_model(name).state_dict()
    snapshot = tmp_path / "models--timm--mobilenetv3_small_050.lamb_in1k" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    save_file(state, snapshot / "model.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    loaded = load_model(f"timm:{name}").module
    assert torch.equal(loaded.get_parameter("classifier.weight"), state["classifier.weight"])
    with pytest.raises(UsageError, match=f"(?s){tmp_path}.*--weights FILE"):
        load_model("timm:resnet18")


def test_mean_and_std_of_bytes_in_a_configuration_are_refused() -> None:
    config = {"input_size": (3, 8, 8), "mean": (123.675,) * 3, "std": (58.395,) * 3}
    with pytest.raises(UsageError, match=r"Give mean 0\.485"):
        hubs._of_timm(config)
    size = {"size": {"height": 8, "width": 8}, "do_normalize": True}
    numbers = {"image_mean": 127.5, "image_std": [127.5] * 3}
    # Without rescaling these are for pixels in 0..255; one number stands for all channels.
    _, found = hubs._of_processor({**size, **numbers, "do_rescale": False}, 3)
    assert found is not None
    assert (found.mean, found.std) == ((0.5,) * 3, (0.5,) * 3)
    with pytest.raises(UsageError, match=r"Give mean 0\.5"):
        hubs._of_processor({**size, **numbers, "do_rescale": True, "rescale_factor": 1 / 255}, 3)
