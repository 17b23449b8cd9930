"""Weights of the time steps of a diffusion model, by signal and noise."""

from typing import Literal

from torch import Tensor

PredictionKind = Literal["epsilon", "v_prediction", "sample"]


def min_snr_weights(snr: Tensor, prediction: PredictionKind, limit: float = 5.0) -> Tensor:
    """Return weights of the squared errors of a denoiser's predictions: Min-SNR-γ.

    An error of the clean image has the weight min(SNR, γ) (arXiv 2303.09556). An error of
    the noise is one of the image over √SNR, an error of the velocity one over √(SNR + 1), so that
    their weights are min(SNR, γ) / SNR and min(SNR, γ) / (SNR + 1).

    Args:
        snr: ᾱ / (1 − ᾱ) of each time step, > 0, any shape.
        prediction: What the denoiser predicts: the noise, the velocity (arXiv 2202.00512) or the
            clean image.
        limit: γ, as in the paper.

    Returns:
        Weights in the shape of `snr`.
    """
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": snr.new_ones(())}[prediction]
    return snr.clamp_max(limit) / divisor
