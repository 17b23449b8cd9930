"""Networks of libraries, and a few of our own, that nothing in the package was made for."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Unseen:
    """A network with random weights, and the shape of its input."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = (3, 64, 64)


class Part(nn.Module):
    """A part of a network, or what a function takes out of its results."""

    def __init__(self, network: nn.Module, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.network, self.function = network, function

    def forward(self, images: Tensor) -> Any:
        return self.function(self.network, images)


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: importlib.import_module("timm").create_model(name, num_classes=10, **options)


def _torchvision(path: str, **options: Any) -> Callable[[], nn.Module]:
    module, _, name = f"torchvision.models.{path}".rpartition(".")
    return lambda: getattr(importlib.import_module(module), name)(weights=None, **options)


def _backbone(name: str) -> Callable[[], nn.Module]:
    """The backbone of one of torchvision's detectors."""
    make: Any = _torchvision(f"detection.{name}", weights_backbone=None)
    return lambda: Part(make().backbone, lambda net, x: net(x))


def _raw_detector(name: str) -> Callable[[], nn.Module]:
    """One of torchvision's detectors up to the raw outputs of its head."""
    make = _torchvision(f"detection.{name}", weights_backbone=None)

    def outputs(net: Any, x: Tensor) -> Any:
        features = net.backbone(x)
        features = [features] if isinstance(features, Tensor) else list(features.values())
        return net.head(features)

    return lambda: Part(make(), outputs)


def _segmentation(name: str) -> Callable[[], nn.Module]:
    make = _torchvision(f"segmentation.{name}", weights_backbone=None, num_classes=5)
    return lambda: Part(make(), lambda net, x: net(x)["out"])


def _smp(kind: str, encoder: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(importlib.import_module("segmentation_models_pytorch"), kind)(
        encoder, encoder_weights=None, classes=3, **options
    )


def _yolo(config: str) -> Callable[[], nn.Module]:
    """A detector of Ultralytics up to its raw outputs."""

    def make() -> nn.Module:
        tasks = importlib.import_module("ultralytics.nn.tasks")
        kinds = {"seg": "SegmentationModel", "pose": "PoseModel", "cls": "ClassificationModel"}
        kind = next((c for word, c in kinds.items() if f"-{word}" in config), "DetectionModel")
        return getattr(tasks, kind)(f"{config}.yaml", verbose=False)

    return make


def _transformers(config: str, model: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        library = importlib.import_module("transformers")
        network = getattr(library, model)(getattr(library, config)(**options))
        return Part(network, _tensors_of)

    return make


def _tensors_of(network: nn.Module, images: Tensor) -> Any:
    """The outputs of a network of transformers that are tensors."""
    found = network(images)
    names = "logits pred_boxes pooler_output last_hidden_state reconstruction predicted_depth"
    values = [getattr(found, name, None) for name in names.split()]
    tensors = [value for value in values if value is not None]
    return tensors[0] if len(tensors) == 1 else tuple(tensors[:2])


class DetrLike(nn.Module):
    """Queries that attend to the features of a convolutional backbone; classes and boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU()),
        )
        layer = nn.TransformerDecoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 2)
        self.queries = nn.Parameter(torch.randn(10, 32))
        self.classes, self.boxes = nn.Linear(32, 6), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        memory = self.stem(x).flatten(2).transpose(1, 2)
        found = self.decoder(self.queries.expand(x.shape[0], -1, -1), memory)
        return self.classes(found), self.boxes(found).sigmoid()


class Landmarks(nn.Module):
    """Points of a face by the expected position in heat maps (soft-argmax)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.PReLU(16)),
            *(nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.BatchNorm2d(16), nn.PReLU(16)),
            *(nn.Conv2d(16, 32, 1), nn.BatchNorm2d(32), nn.PReLU(32)),
        )
        self.heat = nn.Conv2d(32, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        heat = self.heat(self.stem(x))
        weights = heat.flatten(2).softmax(2).view_as(heat)
        rows = torch.linspace(-1, 1, heat.shape[2])
        columns = torch.linspace(-1, 1, heat.shape[3])
        y = (weights.sum(3) * rows).sum(2)
        return torch.stack([(weights.sum(2) * columns).sum(2), y], 2)


class SuperResolution(nn.Module):
    """EDSR in small: residual blocks without batch norms, pixel shuffle, a long skip."""

    def __init__(self, norms: bool) -> None:
        super().__init__()
        norm = nn.BatchNorm2d if norms else nn.Identity
        self.head = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), norm(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
            for _ in range(3)
        )  # fmt: skip
        self.tail = nn.Sequential(nn.Conv2d(16, 12, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        y = first = self.head(x)
        for block in self.blocks:
            y = y + 0.1 * block(y)
        up = F.interpolate(x, scale_factor=2, mode="bicubic", align_corners=False)
        return self.tail(y + first) + up


class Hourglass(nn.Module):
    """Down, up by nearest neighbours, skips: heat maps of poses."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()

        def conv(i: int, o: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU())

        self.stem, self.heat = conv(3, 12), nn.Conv2d(12, 4, 1)
        self.down = nn.ModuleList(conv(12, 12) for _ in range(depth))
        self.up = nn.ModuleList(conv(12, 12) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        skips = []
        for down in self.down:
            skips.append(x)
            x = down(F.max_pool2d(x, 2))
        for up, skip in zip(self.up, reversed(skips), strict=True):
            x = up(F.interpolate(x, size=skip.shape[2:]) + skip)
        return self.heat(x)


class ConditionalConvolution(nn.Module):
    """Weights that are mixed by the image (CondConv)."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.route = nn.Linear(8, experts)
        self.experts = nn.Parameter(torch.randn(experts, 16 * 8 * 3 * 3) * 0.1)
        self.norm, self.head = nn.BatchNorm2d(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        n, c, h, w = x.shape
        kernels = self.route(x.mean((2, 3))).sigmoid() @ self.experts
        x = F.conv2d(x.reshape(1, n * c, h, w), kernels.view(n * 16, c, 3, 3), padding=1, groups=n)
        return self.head(torch.relu(self.norm(x.view(n, 16, h, w))).mean((2, 3)))


class SpatialTransformer(nn.Module):
    """Style transfer's kind: reflection padding, instance norms, nearest upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.ReflectionPad2d(4), nn.Conv2d(3, 8, 9), nn.InstanceNorm2d(8, affine=True), nn.ReLU()),
            *(nn.ReflectionPad2d(1), nn.Conv2d(8, 16, 3, 2), nn.InstanceNorm2d(16, affine=True), nn.ReLU()),
            *(nn.Upsample(scale_factor=2), nn.ReflectionPad2d(1), nn.Conv2d(16, 8, 3)),
            *(nn.InstanceNorm2d(8, affine=True), nn.ReLU(), nn.Conv2d(8, 3, 1)),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).tanh()


class GatedScenes(nn.Module):
    """Squeeze and excitation, channel attention and spatial attention (CBAM), GeM pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.channel = nn.Sequential(nn.Conv2d(16, 4, 1), nn.ReLU(), nn.Conv2d(4, 16, 1))
        self.spatial = nn.Conv2d(2, 1, 7, padding=3)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        average, most = F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)
        x = x * (self.channel(average) + self.channel(most)).sigmoid()
        where = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        x = x * self.spatial(where).sigmoid()
        return self.head(x.clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3))


class PyramidPooling(nn.Module):
    """PSPNet's pooling to uneven sizes, by mean and by maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.levels = nn.ModuleList(
            nn.Sequential(pool, nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
            for pool in (nn.AdaptiveAvgPool2d(3), nn.AdaptiveMaxPool2d(5), nn.AdaptiveMaxPool2d(1))
        )
        self.head = nn.Conv2d(20, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        size = x.shape[2:]
        return self.head(torch.cat([x, *(F.interpolate(level(x), size=size) for level in self.levels)], 1))  # fmt: skip


_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_VIT = {**_SMALL, "intermediate_size": 64, "image_size": 64, "patch_size": 16, "num_labels": 5}

NETWORKS: Mapping[str, Unseen] = {
    "own:DetrLike": Unseen(DetrLike),
    "own:Landmarks": Unseen(Landmarks),
    "own:SuperResolution": Unseen(lambda: SuperResolution(norms=True), (3, 24, 24)),
    "own:SuperResolution without norms": Unseen(lambda: SuperResolution(norms=False), (3, 24, 24)),
    "own:Hourglass": Unseen(Hourglass, (3, 44, 52)),
    "own:ConditionalConvolution": Unseen(ConditionalConvolution, (3, 16, 16)),
    "own:SpatialTransformer": Unseen(SpatialTransformer, (3, 32, 32)),
    "own:GatedScenes": Unseen(GatedScenes),
    "own:PyramidPooling": Unseen(PyramidPooling, (3, 28, 28)),
    "ultralytics:yolov8n": Unseen(_yolo("yolov8n")),
    "ultralytics:yolo11n": Unseen(_yolo("yolo11n")),
    "ultralytics:yolov5n": Unseen(_yolo("yolov5n")),
    "ultralytics:yolov8n-seg": Unseen(_yolo("yolov8n-seg")),
    "ultralytics:yolov8n-pose": Unseen(_yolo("yolov8n-pose")),
    "ultralytics:yolo11n-cls": Unseen(_yolo("yolo11n-cls")),
    "ultralytics:yolo12n": Unseen(_yolo("yolo12n")),
    "ultralytics:yolov10n": Unseen(_yolo("yolov10n")),
    "ultralytics:yolov9t": Unseen(_yolo("yolov9t")),
    "ultralytics:yolov3-tiny": Unseen(_yolo("yolov3-tiny")),
    **{f"torchvision:{n}.backbone": Unseen(_backbone(n)) for n in (
        "fasterrcnn_mobilenet_v3_large_320_fpn", "fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn",
        "ssdlite320_mobilenet_v3_large",
    )},
    "torchvision:ssd300_vgg16.backbone": Unseen(_backbone("ssd300_vgg16"), (3, 300, 300)),
    "torchvision:fcos_resnet50_fpn": Unseen(_raw_detector("fcos_resnet50_fpn")),
    "torchvision:retinanet_resnet50_fpn_v2": Unseen(_raw_detector("retinanet_resnet50_fpn_v2")),
    "torchvision:ssdlite320_mobilenet_v3_large": Unseen(_raw_detector("ssdlite320_mobilenet_v3_large"), (3, 160, 160)),
    **{f"torchvision:{n}": Unseen(_segmentation(n)) for n in (
        "lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50", "fcn_resnet50",
    )},
    "torchvision:efficientnet_v2_s": Unseen(_torchvision("efficientnet_v2_s", num_classes=10)),
    "torchvision:maxvit_t": Unseen(_torchvision("maxvit_t", num_classes=10), (3, 224, 224)),
    "torchvision:convnext_tiny": Unseen(_torchvision("convnext_tiny", num_classes=10)),
    "torchvision:swin_v2_t": Unseen(_torchvision("swin_v2_t", num_classes=10)),
    "torchvision:regnet_y_400mf": Unseen(_torchvision("regnet_y_400mf", num_classes=10)),
    "torchvision:mc3_18": Unseen(_torchvision("video.mc3_18", num_classes=5), (3, 4, 32, 32)),
    "torchvision:s3d": Unseen(_torchvision("video.s3d", num_classes=5), (3, 16, 64, 64)),
    "smp:Unet resnet18": Unseen(_smp("Unet", "resnet18")),
    "smp:Unet mobilenet_v2": Unseen(_smp("Unet", "mobilenet_v2")),
    "smp:Unet efficientnet-b0": Unseen(_smp("Unet", "efficientnet-b0")),
    "smp:FPN resnet18": Unseen(_smp("FPN", "resnet18")),
    "smp:FPN mobilenet_v2": Unseen(_smp("FPN", "mobilenet_v2")),
    "smp:FPN efficientnet-b0": Unseen(_smp("FPN", "efficientnet-b0")),
    "smp:Unet timm-mobilenetv3": Unseen(_smp("Unet", "tu-mobilenetv3_small_050")),
    "smp:UnetPlusPlus resnet18": Unseen(_smp("UnetPlusPlus", "resnet18")),
    "smp:Linknet resnet18": Unseen(_smp("Linknet", "resnet18")),
    "smp:PSPNet resnet18": Unseen(_smp("PSPNet", "resnet18")),
    "smp:PAN resnet18": Unseen(_smp("PAN", "resnet18")),
    "smp:MAnet resnet18": Unseen(_smp("MAnet", "resnet18")),
    "smp:DeepLabV3Plus resnet18": Unseen(_smp("DeepLabV3Plus", "resnet18")),
    "smp:UPerNet resnet18": Unseen(_smp("UPerNet", "resnet18")),
    "smp:Segformer mit_b0": Unseen(_smp("Segformer", "mit_b0")),
    "transformers:ViT": Unseen(_transformers("ViTConfig", "ViTForImageClassification", **_VIT)),
    "transformers:DeiT": Unseen(_transformers("DeiTConfig", "DeiTForImageClassification", **_VIT)),
    "transformers:BEiT": Unseen(_transformers("BeitConfig", "BeitForImageClassification", **_VIT)),
    "transformers:DINOv2": Unseen(_transformers("Dinov2Config", "Dinov2ForImageClassification", **_SMALL, image_size=56, patch_size=14, num_labels=5), (3, 56, 56)),
    "transformers:YOLOS": Unseen(_transformers("YolosConfig", "YolosForObjectDetection", **_SMALL, intermediate_size=64, image_size=[64, 64], num_detection_tokens=10), (3, 64, 64)),
    "transformers:MobileNetV1": Unseen(_transformers("MobileNetV1Config", "MobileNetV1ForImageClassification", depth_multiplier=0.25, num_labels=5)),
    "transformers:MobileNetV2": Unseen(_transformers("MobileNetV2Config", "MobileNetV2ForImageClassification", depth_multiplier=0.35, num_labels=5)),
    "transformers:MobileViT": Unseen(_transformers("MobileViTConfig", "MobileViTForImageClassification", hidden_sizes=[32, 40, 48], neck_hidden_sizes=[8, 16, 24, 32, 40, 48, 96], image_size=64, num_labels=5)),
    "transformers:MobileViTV2": Unseen(_transformers("MobileViTV2Config", "MobileViTV2ForImageClassification", width_multiplier=0.5, image_size=64, num_labels=5)),
    "transformers:ResNet": Unseen(_transformers("ResNetConfig", "ResNetForImageClassification", embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], layer_type="basic", num_labels=5)),
    "transformers:RegNet": Unseen(_transformers("RegNetConfig", "RegNetForImageClassification", embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], groups_width=8, num_labels=5)),
    "transformers:ConvNext": Unseen(_transformers("ConvNextConfig", "ConvNextForImageClassification", hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_labels=5)),
    "transformers:ConvNextV2": Unseen(_transformers("ConvNextV2Config", "ConvNextV2ForImageClassification", hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_labels=5)),
    "transformers:Swin": Unseen(_transformers("SwinConfig", "SwinForImageClassification", embed_dim=12, depths=[2, 2], num_heads=[2, 4], window_size=4, image_size=64, num_labels=5)),
    "transformers:PoolFormer": Unseen(_transformers("PoolFormerConfig", "PoolFormerForImageClassification", hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_labels=5)),
    "transformers:Segformer": Unseen(_transformers("SegformerConfig", "SegformerForSemanticSegmentation", hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], decoder_hidden_size=32, num_labels=5)),
    "transformers:LeViT": Unseen(_transformers("LevitConfig", "LevitForImageClassification", image_size=64, hidden_sizes=[32, 48, 64], num_attention_heads=[2, 3, 4], depths=[1, 1, 1], key_dim=[8, 8, 8], num_labels=5)),
    "transformers:CvT": Unseen(_transformers("CvtConfig", "CvtForImageClassification", embed_dim=[16, 32, 48], num_heads=[1, 2, 3], depth=[1, 1, 1], num_labels=5)),
    "transformers:EfficientNet": Unseen(_transformers("EfficientNetConfig", "EfficientNetForImageClassification", width_coefficient=0.25, depth_coefficient=0.25, image_size=64, num_labels=5)),
    "transformers:FocalNet": Unseen(_transformers("FocalNetConfig", "FocalNetForImageClassification", embed_dim=16, depths=[1, 1], hidden_sizes=[16, 32], focal_levels=[2, 2], focal_windows=[3, 3], image_size=64, num_labels=5)),
    "transformers:PVTv2": Unseen(_transformers("PvtV2Config", "PvtV2ForImageClassification", hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2], image_size=64, num_labels=5)),
    "transformers:SwiftFormer": Unseen(_transformers("SwiftFormerConfig", "SwiftFormerForImageClassification", depths=[1, 1, 1, 1], embed_dims=[16, 24, 32, 48], num_labels=5)),
    "transformers:BiT": Unseen(_transformers("BitConfig", "BitForImageClassification", embedding_size=16, hidden_sizes=[32, 48, 64, 96], depths=[1, 1, 1, 1], num_groups=4, num_labels=5)),
    "transformers:DPT": Unseen(_transformers("DPTConfig", "DPTForDepthEstimation", **_SMALL, intermediate_size=64, image_size=64, patch_size=16, backbone_out_indices=[0, 1, 1, 1], neck_hidden_sizes=[8, 16, 24, 32], fusion_hidden_size=16)),
    "transformers:Swin2SR": Unseen(_transformers("Swin2SRConfig", "Swin2SRForImageSuperResolution", embed_dim=12, depths=[2, 2], num_heads=[2, 2], window_size=4, image_size=32), (3, 32, 32)),
    **{f"timm:{name}": Unseen(_timm(name)) for name in (
        "convmixer_768_32", "cs3darknet_s", "darknet17", "dla46_c", "dpn48b", "edgenext_xx_small", "efficientvit_b0",
        "ese_vovnet19b_slim_dw", "fasternet_t0", "fastvit_t8", "gernet_s", "ghostnetv2_100", "hgnetv2_b0", "hrnet_w18_small",
        "inception_next_atto", "lcnet_035", "mambaout_femto", "mixnet_s", "mnasnet_small", "mobilenetv4_conv_small_035",
        "mobileone_s0", "nf_regnet_b0", "poolformer_s12", "pvt_v2_b0", "regnetz_b16", "repghostnet_050", "repvit_m0_9",
        "res2next50", "resnest14d", "resnetv2_18", "rexnet_100", "selecsls42", "shvit_s1", "skresnet18", "starnet_s050",
        "tf_efficientnet_cc_b0_4e", "tinynet_e", "vovnet39a", "densenetblur121d", "convformer_s18", "resnetblur18",
        "ecaresnet26t", "gcresnext26ts", "seresnext26d_32x4d", "tresnet_m", "swiftformer_xs",
    )},
    **{f"timm:{name}": Unseen(_timm(name), (3, size, size)) for name, size in (
        ("mobilevit_xxs", 128), ("mobilevitv2_050", 128), ("levit_128s", 224), ("xcit_nano_12_p16_224", 224), ("cait_xxs24_224", 224),
        ("coat_lite_tiny", 224), ("convit_tiny", 224), ("crossvit_tiny_240", 240), ("efficientformerv2_s0", 224), ("efficientvit_m0", 224),
        ("eva02_tiny_patch14_224", 224), ("gcvit_xxtiny", 224), ("gmixer_24_224", 224), ("resmlp_12_224", 224), ("gmlp_ti16_224", 224), ("pit_ti_224", 224),
        ("tiny_vit_5m_224", 224), ("visformer_tiny", 224), ("halonet26t", 256), ("botnet26t_256", 256), ("lambda_resnet26t", 256),
        ("maxvit_rmlp_pico_rw_256", 256), ("coatnet_pico_rw_224", 224), ("sequencer2d_s", 224), ("tnt_s_legacy_patch16_224", 224),
    )},
}  # fmt: skip
"""By name, those of our own first."""
