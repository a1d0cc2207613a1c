"""Packed GPTQ weights: the checkpoint's layout, and the matmul with it.

This floor knows no model, file or front end; it needs torch only.
"""
