"""Sampling."""

calls = []


def hijack_samplers():
    calls.append("hijacked")
