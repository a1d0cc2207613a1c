"""Rotary position embedding: frequencies of every scaling, and the rotation itself.

This floor knows no model, file or front end; it needs torch and numpy only.
"""

from ropewalk.rope.frequencies import ROPE_TYPES, inverse_frequencies, parameter_names, rotary_dim

__all__ = ["ROPE_TYPES", "inverse_frequencies", "parameter_names", "rotary_dim"]
