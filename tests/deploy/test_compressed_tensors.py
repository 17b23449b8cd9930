"""Folders of the format compressed-tensors, which transformers loads."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import networks, torchvision_shim
from support.language_model import captured_model
from torch import Tensor

import gdfq
from gdfq.deploy.compressed_tensors.folder import packed_rows
from gdfq.deploy.compressed_tensors.proof import rounded_by_runtime
from gdfq.deploy.compressed_tensors.target import COMPRESSED_TENSORS
from gdfq.equalizers.smooth import Smooth
from gdfq.errors import GdfqError, UsageError
from gdfq.functional.grid import Bits
from gdfq.models.registry import load_model
from gdfq.plan.resolve import resolve
from gdfq.quantized import QuantizedNetwork
from gdfq.recipes import RECIPES
from gdfq.sources.own_text import OwnText, Sampling
from gdfq.student.scheme import Scheme

_OPERATORS = torchvision_shim.define_missing_operators()  # they are there while this lives
TARGET = replace(COMPRESSED_TENSORS, runtime=None)
"""For what is refused before a run, for which nothing must be installed."""
_SOURCE = OwnText(sequences=8, batch=8, sampling=Sampling(length=12))
QUICK = replace(RECIPES["text-quick"], source=_SOURCE, steps=2, calibration=1, warmup=1)
TUNED = replace(RECIPES["text"], source=_SOURCE, steps=4, calibration=1, warmup=1)
_SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
          "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 24,
          "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
needs_library = pytest.mark.needs("compressed_tensors")


def test_codes_of_a_row_are_packed_into_words() -> None:
    """1 + 16·(−8 + 8) + … : code 0 of 4 bits is stored as 8, least significant first."""
    codes = torch.tensor([[-8, -7, 0, 7, -8, -8, -8, -8, 1], [0] * 9], dtype=torch.int8)
    low, zeros = 0x0000F810, 0x88888888 - 2**32
    assert packed_rows(codes, 4).tolist() == [[low, 9], [zeros, 8]]
    assert packed_rows(torch.full((1, 11), -1, dtype=torch.int8), 3).tolist() == [
        [int("11" + "011" * 10, 2) - 2**32, 0]
    ]


def test_tokens_are_rounded_by_half_of_all_codes() -> None:
    x = torch.tensor([[127.5, -127.5, 0.6], [0.0, 0.0, 0.0]])
    expected = torch.tensor([[127.0, -128.0, 1.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(rounded_by_runtime(x, 8), expected)


@needs_library
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_are_those_of_the_library(bits: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    draw = torch.Generator().manual_seed(bits)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, 43), generator=draw)
    codes = codes.to(torch.int8)
    expected: Tensor = pack_to_int32(codes, bits)
    # Beyond the last code of a row the library leaves zeros, too.
    assert torch.equal(packed_rows(codes, bits), expected)


def _saved(folder: Path, family: str = "llama", **values: Any) -> str:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**_SIZES, **values})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 2.0)
            else:
                parameter.mul_(10)
    model.save_pretrained(folder)
    return f"hf:{folder}"


def _loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _quantized(model: str, bits: str, recipe: Any = QUICK, **options: Any) -> QuantizedNetwork:
    return gdfq.quantize(model, bits=bits, recipe=recipe, target="compressed-tensors", **options)


@needs_library
@pytest.mark.parametrize(
    ("bits", "options", "values"),
    [
        ("w4a16", {}, {"tie_word_embeddings": True}),
        ("w4a16", {"group_size": 8}, {}),
        ("w3a16", {"recipe": TUNED}, {"tie_word_embeddings": True}),
        ("w4a16", {"layer_bits": ["last=8"]}, {"tie_word_embeddings": True}),
        ("w4a16", {}, {"family": "qwen2"}),
        ("w4a16", {}, {"family": "mistral"}),
        ("w4a16", {}, {"family": "qwen3"}),
    ],
)
def test_transformers_computes_the_student(
    bits: str, options: dict[str, Any], values: dict[str, Any], tmp_path: Path
) -> None:
    model = _saved(tmp_path / "model", **values)
    quantized = _quantized(model, bits, **options)
    exported = quantized.export(tmp_path / "q", target="compressed-tensors", original=model)
    assert exported.path == tmp_path / "q"
    given = torch.randint(50, (3, 15), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        found = _loaded(tmp_path / "q")(input_ids=given).logits
        torch.testing.assert_close(found, quantized(given), atol=1e-4, rtol=1e-4)


@needs_library
@pytest.mark.parametrize("equalizer", ["smooth", "none"])
def test_transformers_rounds_tokens(equalizer: str, tmp_path: Path) -> None:
    model = _saved(tmp_path / "model", tie_word_embeddings=True)
    quantized = _quantized(model, "w8a8", equalizer=equalizer)
    exported = quantized.export(tmp_path / "q", target="compressed-tensors", original=model)
    given = torch.randint(50, (3, 15), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        found = _loaded(tmp_path / "q")(input_ids=given).logits
        rounding = (quantized(given) - load_model(model).module(given)).norm()
        assert 0 < (found - quantized(given)).norm() < 2 * rounding
    assert any("127.5" in note for note in exported.notes)
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    (group,) = config["quantization_config"]["config_groups"].values()
    assert group["input_activations"]["strategy"] == "token"
    assert config["tie_word_embeddings"] == (equalizer == "none")
    assert config["quantization_config"]["ignore"] == ["lm_head"]


@needs_library
def test_folder_that_is_not_equal_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _saved(tmp_path / "model")
    quantized = _quantized(model, "w4a16")

    def wrong(codes: Tensor, bits: int) -> Tensor:
        return packed_rows(codes.flip(0), bits)

    monkeypatch.setattr("gdfq.deploy.compressed_tensors.folder.packed_rows", wrong)
    with pytest.raises(GdfqError, match=r"layers that differ are: model\.layers\.0\.self_attn"):
        quantized.export(tmp_path / "q", target="compressed-tensors", original=model)
    assert not list((tmp_path / "q").iterdir())


@needs_library
def test_export_needs_the_original(tmp_path: Path) -> None:
    model = _saved(tmp_path / "model")
    quantized = _quantized(model, "w4a16")

    def export(original: str | None) -> None:
        quantized.export(tmp_path / "q", target="compressed-tensors", original=original)

    with pytest.raises(UsageError, match="none was named"):
        export(None)
    with pytest.raises(UsageError, match="as hf:ID"):
        export("timm:resnet18")
    with pytest.raises(UsageError, match="transformers can load"):
        export(f"hf:{tmp_path / 'nothing'}")
    other = _saved(tmp_path / "other", hidden_size=32)
    with pytest.raises(UsageError, match="in its shape"):
        export(other)


@needs_library
@pytest.mark.parametrize(
    ("family", "message"), [("gemma", "code computes with these"), ("gpt2", "linear layers alone")]
)
def test_model_with_other_weights_is_refused(family: str, message: str, tmp_path: Path) -> None:
    sizes = {
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 24,
        "tie_word_embeddings": True,
    }
    model = _saved(tmp_path / "model", family, **sizes)
    quantized = _quantized(model, "w4a16")
    with pytest.raises(UsageError, match=message):
        quantized.export(tmp_path / "q", target="compressed-tensors", original=model)


@needs_library
def test_biases_that_tuning_added_are_refused(tmp_path: Path) -> None:
    model = _saved(tmp_path / "model")
    quantized = gdfq.quantize(model, bits="w4a16", recipe=TUNED)
    with pytest.raises(UsageError, match=r"biases where the original has them.*Quantize it again"):
        quantized.export(tmp_path / "q", target="compressed-tensors", original=model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": "w4a4"}, "activations of 4 bits"),
        ({"bits": "w8a8", "layer_bits": ["*.down=4"]}, "inputs of layers with 4 bits"),
        ({"bits": "w4a16", "group_size": 7}, r"q \(groups of 6 do not divide 16 columns\)"),
        ({"bits": "w8a8", "equalizer": "hadamard"}, "while the model runs.*'smooth' or 'none'"),
        ({"bits": "w8a8", "equalizer": "reassembly"}, "while the model runs"),
    ],
)
def test_scheme_that_the_format_cannot_express_is_refused_before_the_run(
    options: dict[str, Any], message: str
) -> None:
    options = {"equalizer": "none", **options}
    with pytest.raises(UsageError, match=message):
        resolve(captured_model(), recipe="text", target=TARGET, **options)


def test_equalizer_by_default_is_left_out_with_a_warning() -> None:
    with pytest.warns(gdfq.GdfqWarning, match="no equalizer is used"):
        plan = resolve(captured_model(), bits="w8a8", recipe="text", target=TARGET)
    assert plan.recipe.equalizer is None
    chosen = resolve(
        captured_model(), bits="w8a8", recipe="text", target=TARGET, equalizer="smooth"
    )
    assert chosen.recipe.equalizer == Smooth()


def test_other_networks_are_refused_before_the_run() -> None:
    with pytest.raises(UsageError, match="holds causal language models alone"):
        resolve(networks.captured("Residual"), bits="w8a8", recipe="quick", target=TARGET)


def test_layers_learn_no_biases_for_the_target() -> None:
    with_target, without = (
        gdfq.quantize(captured_model(), bits="w4a16", recipe=TUNED, target=target).network.layers
        for target in (TARGET, None)
    )
    biases = [[bool(present.any()) for layer in layers if (present := layer.bias) is not None]
              for layers in (with_target, without)]  # fmt: skip
    assert not any(biases[0])
    assert all(biases[1])


def test_finished_network_is_checked() -> None:
    quantized = gdfq.quantize(
        captured_model(), bits="w4a4", recipe=replace(QUICK, equalizer=None), group_size=7
    )
    with pytest.raises(UsageError, match=r"inputs of 4 bits.*3 groups of 16 columns"):
        TARGET.check_network(quantized.network, "tokens")
    rotated = gdfq.quantize(captured_model(), bits="w8a8", recipe=QUICK)
    with pytest.raises(UsageError, match=r"rotated"):
        TARGET.check_network(rotated.network, "tokens")


def test_scheme_that_fits_is_accepted() -> None:
    TARGET.check_scheme(captured_model(), Scheme(Bits.parse("w8a8"), "tokens", group_size=8))
