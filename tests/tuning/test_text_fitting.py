"""Weights of a language model, fitted layer by layer."""

import torch
from support.language_model import captured_model, tokens

from gdfq.functional.grid import Bits
from gdfq.functional.losses import token_divergences
from gdfq.quantizers.family import TOKENS
from gdfq.student.build import build_student
from gdfq.student.freeze import freeze
from gdfq.student.scheme import LayerBits, Scheme
from gdfq.tuning.text_fitting import fit_weights_


def _divergence(bits: str, *, fits: bool, group_size: int | None = None) -> float:
    teacher = captured_model()
    scheme = Scheme(Bits.parse(bits), "tokens", (LayerBits("last", None),), group_size=group_size)
    student = build_student(teacher, scheme, quantizers=TOKENS).eval()
    if fits:
        fit_weights_(student, teacher, [tokens(count=64, length=24, seed=2)])
    network, unseen = freeze(student), tokens(count=16, length=24, seed=3)
    with torch.no_grad():
        divergences = token_divergences(network(unseen), teacher.network(unseen))
    return float(divergences.mean())


def test_fitted_weights_predict_unseen_text_better() -> None:
    assert _divergence("w3a16", fits=True) < 0.7 * _divergence("w3a16", fits=False)


def test_fitting_makes_up_for_rounded_inputs() -> None:
    assert _divergence("w8a4", fits=True) < 0.95 * _divergence("w8a4", fits=False)


def test_weights_in_groups_are_fitted_too() -> None:
    rounded, fitted = (_divergence("w3a16", fits=fits, group_size=8) for fits in (False, True))
    assert fitted < rounded
