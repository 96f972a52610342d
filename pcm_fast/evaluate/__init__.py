"""Evaluation: the PCM against other ways to merge preferences, on held-out prompts, with error bars."""
