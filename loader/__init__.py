"""Checkpoints to modules to models: what is in a folder, which rope it means, and how it is loaded."""
