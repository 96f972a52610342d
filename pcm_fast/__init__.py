"""Several expert language models answer together, for about the price of one."""

from pcm_fast._version import __version__

__all__ = ["__version__"]
