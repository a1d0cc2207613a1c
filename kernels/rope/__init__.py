"""Rotary position embedding: frequencies of every scaling, and the rotation itself in torch and in Triton.

This floor knows no model, file or front end; it needs torch, triton and numpy only.
"""

from ropewalk.rope.frequencies import ROPE_TYPES, inverse_frequencies, parameter_names, rotary_dim

__all__ = ["ROPE_TYPES", "inverse_frequencies", "parameter_names", "rotary_dim"]
