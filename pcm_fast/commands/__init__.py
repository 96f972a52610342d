"""The commands of ``pcm-fast``, one file each, and what they share; ``pcm_fast/cli.py`` reads their options."""
