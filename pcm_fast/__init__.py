"""Several expert language models answer together, for about the price of one.

The public names are imported when first used: torch and transformers only by what needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pcm_fast._version import __version__

if TYPE_CHECKING:
    from pcm_fast import ops, reference
    from pcm_fast.engine import Engine, TokenOutput
    from pcm_fast.model import MixtureModel, ModelSpec
    from pcm_fast.sampling import SamplingParams

__all__ = [
    "Engine",
    "MixtureModel",
    "ModelSpec",
    "SamplingParams",
    "TokenOutput",
    "__version__",
    "ops",
    "reference",
]

_HOMES = {
    "Engine": "pcm_fast.engine",
    "MixtureModel": "pcm_fast.model",
    "ModelSpec": "pcm_fast.model",
    "SamplingParams": "pcm_fast.sampling",
    "TokenOutput": "pcm_fast.engine",
}


def __getattr__(name: str) -> Any:
    if name in ("ops", "reference"):
        return importlib.import_module(f"pcm_fast.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'pcm_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
