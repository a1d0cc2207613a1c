"""Benchmarks and evidence: perplexity by context, and how the small model came to be."""
