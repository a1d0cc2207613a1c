"""Benchmarks and evidence: kernels against those of others and ahead of time, plans tuned on a device, perplexity by
context, and how the small model came to be.
"""
