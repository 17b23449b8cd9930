"""Equalizers of language models: changes after which rounding their activations costs less."""
