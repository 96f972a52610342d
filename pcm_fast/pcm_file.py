"""Learned PCMs on disk: ``pcm.json``, ``head.safetensors``, and an adapter (PEFT layout) or a model beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pcm_fast.adapter import load_adapter, save_adapter
from pcm_fast.checkpoint import Checkpoint, LoadError, check_same_vocabulary
from pcm_fast.loader import load_checkpoint
from pcm_fast.pcm import LearnedPCM


def read_pcm(directory: Path, base: Checkpoint) -> LearnedPCM:
    """Read a learned PCM from its directory and hold its shapes against the base.

    ======================  ==============================================================================
    pcm.json                {"kind": "shared" | "separate", "experts": [K names], "template": "...{preference}..."}
    head.safetensors        "weight" [K, d] and "bias" [K], float32
    adapter_config.json,
    adapter_model.safetensors   shared: LoRA adapter on the base, PEFT layout; without them, the base as it is
    model/                  separate: a Hugging Face directory with the base's vocabulary
    ======================  ==============================================================================

    Raises:
        LoadError: a file is missing or malformed; the message names it, what was expected and what was found.
    """
    if not directory.is_dir():
        raise LoadError(
            f"pcm: {directory}: expected 'uniform' or the directory of a learned PCM, and it does not exist"
        )
    kind, experts, template = _read_description(directory / "pcm.json")
    weight, bias = _read_head(directory / "head.safetensors", len(experts))
    if kind == "separate":
        checkpoint = load_checkpoint(directory / "model")
        check_same_vocabulary(base, checkpoint)
        pcm = LearnedPCM("separate", experts, template, weight, bias, checkpoint=checkpoint)
    else:
        adapted = (directory / "adapter_config.json").exists()
        if adapted and base.config is None:
            raise LoadError(f"{directory}: an adapter cannot be put on this base: {base.family_reason}")
        adapter = load_adapter(directory, base.config) if adapted and base.config is not None else None
        pcm = LearnedPCM("shared", experts, template, weight, bias, adapter=adapter)
    body = pcm.checkpoint or base
    if body.config is not None and body.config.hidden_size != weight.shape[1]:
        raise LoadError(
            f"{directory / 'head.safetensors'}: weight: expected shape [{len(experts)}, {body.config.hidden_size}] "
            f"for the hidden size of {body.path.name}, got {list(weight.shape)}"
        )
    return pcm


def save_pcm(pcm: LearnedPCM, directory: str | Path) -> None:
    """Write a learned PCM into a directory (made if need be) so that ``read_pcm`` gives the same PCM back."""
    from safetensors.numpy import save_file

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    description = {"kind": pcm.kind, "experts": list(pcm.experts), "template": pcm.template}
    (directory / "pcm.json").write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    save_file({"weight": _float32(pcm.weight), "bias": _float32(pcm.bias)}, directory / "head.safetensors")
    if pcm.adapter is not None:
        save_adapter(pcm.adapter, directory)
    if pcm.checkpoint is not None and pcm.checkpoint.path.resolve() != (directory / "model").resolve():
        shutil.copytree(pcm.checkpoint.path, directory / "model", dirs_exist_ok=True)


def _read_description(path: Path) -> tuple[Any, tuple[str, ...], str]:
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LoadError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise LoadError(f"{path}: expected JSON: {error}") from None
    wanted = {"kind", "experts", "template"}
    if not isinstance(description, dict) or set(description) != wanted:
        found = sorted(description) if isinstance(description, dict) else type(description).__name__
        raise LoadError(f"{path}: expected exactly the keys {sorted(wanted)}, got {found}")
    kind, experts, template = description["kind"], description["experts"], description["template"]
    if kind not in ("shared", "separate"):
        raise LoadError(f"{path}: kind: expected 'shared' or 'separate', got {kind!r}")
    named = isinstance(experts, list) and experts and all(isinstance(name, str) for name in experts)
    if not named or len(set(experts)) != len(experts):
        raise LoadError(f"{path}: experts: expected a list of distinct names, got {experts!r}")
    if not isinstance(template, str) or "{preference}" not in template:
        raise LoadError(f"{path}: template: expected text with '{{preference}}' in it, got {template!r}")
    return kind, tuple(experts), template


def _read_head(path: Path, num_experts: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise LoadError(f"{path}: does not exist") from None
    except (SafetensorError, KeyError, OSError) as error:  # KeyError: a dtype that NumPy lacks
        raise LoadError(f"{path}: expected float32 safetensors: {error!r}") from None
    if set(tensors) != {"weight", "bias"}:
        raise LoadError(f"{path}: expected the tensors ['bias', 'weight'], got {sorted(tensors)}")
    weight, bias = tensors["weight"], tensors["bias"]
    for name, tensor in tensors.items():
        if tensor.dtype != np.float32 or not np.isfinite(tensor).all():
            raise LoadError(f"{path}: {name}: expected finite float32 numbers, got {tensor.dtype}")
    if weight.ndim != 2 or weight.shape[0] != num_experts:
        raise LoadError(f"{path}: weight: expected shape [{num_experts}, hidden size], got {list(weight.shape)}")
    if bias.shape != (num_experts,):
        raise LoadError(f"{path}: bias: expected shape [{num_experts}], got {list(bias.shape)}")
    return weight, bias


def _float32(array: npt.ArrayLike) -> npt.NDArray[np.float32]:
    return np.ascontiguousarray(array, dtype=np.float32)
