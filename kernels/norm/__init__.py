"""RMS normalization: with the addition before it, and with the order of rows that packed layers after it want.

This floor knows no model, file or front end; it needs torch and triton only.
"""
