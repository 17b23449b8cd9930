"""Weights of the time steps of a diffusion model."""

import pytest
import torch

from gdfq.functional.signal_noise import PredictionKind, min_snr_weights

SNR = torch.tensor([100.0, 5.0, 0.5])


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("epsilon", [0.05, 1.0, 1.0]),
        ("v_prediction", [5 / 101, 5 / 6, 0.5 / 1.5]),
        ("sample", [5.0, 5.0, 0.5]),
    ],
)
def test_weights_are_those_by_hand(prediction: PredictionKind, expected: list[float]) -> None:
    assert min_snr_weights(SNR, prediction).tolist() == pytest.approx(expected)


def test_weighted_errors_of_all_predictions_of_one_image_are_equal() -> None:
    signal = SNR / (SNR + 1)
    x, wrong, clean = torch.tensor(0.3), torch.tensor(0.9), torch.tensor(0.7)
    a, b = signal.sqrt(), (1 - signal).sqrt()
    kinds: dict[PredictionKind, tuple[torch.Tensor, torch.Tensor]] = {
        "epsilon": ((x - a * clean) / b, (x - a * wrong) / b),
        "v_prediction": ((a * x - clean) / b, (a * x - wrong) / b),
        "sample": (clean.expand(3), wrong.expand(3)),
    }
    found = [
        min_snr_weights(SNR, kind) * (one - other).square() for kind, (one, other) in kinds.items()
    ]
    assert torch.allclose(found[0], found[2])
    assert torch.allclose(found[1], found[2])
