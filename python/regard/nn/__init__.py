"""Modules with weights, under PyTorch's names: load a state dict and call. Always in evaluation mode."""

from __future__ import annotations

from regard.nn.module import Module, ModuleList

__all__ = [
    "Module",
    "ModuleList",
]
