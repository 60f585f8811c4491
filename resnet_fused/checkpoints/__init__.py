"""Checkpoints of residual nets from one code base's names to another's; see `convert`."""

from __future__ import annotations

from .files import convert_file
from .formats import ALIASES, FORMATS
from .holding import DROPPABLE
from .optimizer import convert_optimizer
from .options import ConvertOptions
from .report import Conversion
from .roles import ConversionError
from .translate import convert

__all__ = [
    "ALIASES",
    "DROPPABLE",
    "FORMATS",
    "Conversion",
    "ConversionError",
    "ConvertOptions",
    "convert",
    "convert_file",
    "convert_optimizer",
]
