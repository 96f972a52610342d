"""``pcm-fast info``: what is installed, what it runs on, and what is in a model."""

from __future__ import annotations

import importlib.metadata
import os
import platform

from rich.text import Text

from pcm_fast import ops
from pcm_fast._version import __version__
from pcm_fast.commands import terminal
from pcm_fast.loader import load_checkpoint
from pcm_fast.presets import TRAINED_BASE, TRAINED_EXPERTS


def print_info(base: str | None) -> None:
    """Print versions, what the kernels run on, and if a base is given what it holds."""
    console = terminal.output()
    lines = {"pcm-fast": __version__, "python": f"{platform.python_version()} on {platform.platform()}"}
    for package in ("torch", "transformers", "tokenizers", "numpy", "triton"):
        lines[package] = _installed(package)
    lines["cores"] = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    lines |= {f"kernels: {name}": state for name, state in ops.backends().items()}
    lines["kernels in use"] = ops.backend()
    lines["trained experts"] = f"{', '.join(TRAINED_EXPERTS)}; for {TRAINED_BASE}"
    if base is not None:
        lines |= _model_lines(base)
    width = max(map(len, lines)) + 2
    for name, value in lines.items():
        console.print(Text.assemble((f"{name:{width}}", "bold"), value))


def _model_lines(base: str) -> dict[str, str]:
    checkpoint = load_checkpoint(base)
    config = checkpoint.config
    if config is None:
        return {"model": str(checkpoint.path), "family": f"none of our own: {checkpoint.family_reason}"}
    stored = ", ".join(f"{count:,} {dtype}" for dtype, count in checkpoint.dtypes.items())
    template = checkpoint.tokenizer is not None and checkpoint.tokenizer.chat_template is not None
    heads = f"{config.num_heads} heads ({config.num_kv_heads} for keys and values) of {config.head_dim}"
    return {
        "model": str(checkpoint.path),
        "format": f"{checkpoint.format}; parameters stored as {stored}",
        "size": f"{checkpoint.num_parameters:,} parameters in {checkpoint.num_bytes / 1e6:.1f} MB",
        "family": config.family,
        "layers": f"{config.num_layers} of width {config.hidden_size}, {heads}",
        "vocabulary": f"{config.vocab_size:,} tokens",
        "context": f"{config.max_position_embeddings:,} tokens",
        "chat template": "yes" if template else "no",
    }


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
