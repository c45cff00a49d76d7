"""Soft prompts on a frozen T5: train, evaluate, export (Lester et al. 2021)."""

__version__ = '0.1.0'
