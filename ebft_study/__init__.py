"""Hyperparameter and scaling studies of Energy-Based Fine-Tuning (EBFT) of language models."""

__version__ = "0.1.0"
