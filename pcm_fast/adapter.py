"""LoRA adapters in PEFT's directory layout, held as plain arrays."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from pcm_fast.checkpoint import LoadError, ModelConfig, StoredTensor
from pcm_fast.hf_directory import read_json
from pcm_fast.quantization import READABLE_DTYPES
from pcm_fast.safetensors_file import read_safetensors

Float32 = npt.NDArray[np.float32]

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
# Options under which an adapter is more than W + scaling * B A on linear layers of the untouched base.
UNSUPPORTED_OPTIONS = (
    *("use_dora", "lora_bias", "modules_to_save", "fan_in_fan_out", "layer_replication", "alora_invocation_tokens"),
    *("use_qalora", "target_parameters", "trainable_token_indices", "use_bdlora", "arrow_config", "kasa_config"),
    *("monteclora_config", "megatron_config"),
)
# Initialisations that change the base weights too, so that the adapter alone does not fit the base as published.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


class AdapterSite:
    """What an adapter adds to one linear layer: ``scaling * B @ A``.

    Factors that lie in a file stay there and are decoded whenever they are asked for: a backend keeps them in a form of
    its own, and a second copy would take as much memory again.
    """

    def __init__(self, A: Float32 | StoredTensor, B: Float32 | StoredTensor, scaling: float) -> None:
        """A: [r, in], B: [out, r]; float32 arrays, or tensors of a file."""
        if len(A.shape) != 2 or len(B.shape) != 2 or A.shape[0] != B.shape[1] or A.shape[0] == 0:
            raise ValueError(f"A, B: expected [r, in] and [out, r], got {list(A.shape)} and {list(B.shape)}")
        if any(isinstance(factor, np.ndarray) and factor.dtype != np.float32 for factor in (A, B)):
            raise TypeError(f"A, B: expected float32, got {A.dtype} and {B.dtype}")
        self._A, self._B, self.scaling = A, B, scaling

    @property
    def A(self) -> Float32:  # noqa: N802, as in the paper
        """The factor that is applied first, float32 [r, in]."""
        return self._A.dequantize() if isinstance(self._A, StoredTensor) else self._A

    @property
    def B(self) -> Float32:  # noqa: N802
        """The factor that is applied second, float32 [out, r]."""
        return self._B.dequantize() if isinstance(self._B, StoredTensor) else self._B

    @property
    def rank(self) -> int:
        """Rows of A."""
        return int(self._A.shape[0])

    @property
    def num_parameters(self) -> int:
        """Numbers in A and B."""
        return int(self._A.size + self._B.size)

    def delta(self) -> Float32:
        """The change of the weight, float32 [out, in]."""
        product: Float32 = self.B @ self.A
        product *= np.float32(self.scaling)
        return product


@dataclass(eq=False)
class Adapter:
    """A LoRA adapter: its sites by module path, e.g. "model.layers.0.self_attn.q_proj", in the base's order.

    ``identity`` names the content, wherever it lies: made of every number in it unless it is given.
    """

    path: Path | None
    sites: Mapping[str, AdapterSite]
    identity: str = ""

    def __post_init__(self) -> None:
        if self.identity:
            return
        digest = hashlib.sha256()
        for name in sorted(self.sites):
            site = self.sites[name]
            a, b = site.A, site.B
            digest.update(f"{name} {a.shape} {b.shape} {float(site.scaling)!r} ".encode())
            digest.update(np.ascontiguousarray(a).tobytes())
            digest.update(np.ascontiguousarray(b).tobytes())
        self.identity = digest.hexdigest()[:32]

    @property
    def num_parameters(self) -> int:
        """Numbers in all A and B."""
        return sum(site.num_parameters for site in self.sites.values())


def load_adapter(path: str | Path, config: ModelConfig) -> Adapter:
    """A PEFT LoRA directory: ``adapter_config.json`` and ``adapter_model.safetensors``.

    The weights in the file decide which layers are adapted; rank and scaling follow ``r``, ``lora_alpha``,
    ``rank_pattern``, ``alpha_pattern`` and ``use_rslora`` as PEFT reads them.

    Args:
        path: the directory.
        config: the base's configuration, against which every shape is checked.

    Raises:
        LoadError: not a LoRA adapter, one with an unsupported option, or one for another base.
    """
    directory = Path(path).expanduser()
    if not (directory / CONFIG_NAME).is_file():
        raise LoadError(f"{directory}: expected a PEFT adapter directory, got no {CONFIG_NAME}")
    options = read_json(directory / CONFIG_NAME)
    check_options(directory / CONFIG_NAME, options)
    weights = directory / WEIGHTS_NAME
    if not weights.exists():
        pickled = directory / "adapter_model.bin"
        if pickled.exists():
            raise LoadError(
                f"{pickled}: pickled weights can run code when loaded and are refused, expected {WEIGHTS_NAME}"
            )
        raise LoadError(f"{weights}: missing, expected beside {CONFIG_NAME}")
    factors = pair_factors(weights, read_safetensors(weights), config)
    if not factors:
        raise LoadError(f"{weights}: expected LoRA weights, got an empty file")
    sites: dict[str, AdapterSite] = {}
    for module, (out_features, in_features) in config.linear_shapes().items():
        if module not in factors:
            continue
        pair = factors[module]
        rank, scaling = rank_and_scaling(directory / CONFIG_NAME, options, module)
        check_factor(weights, module, pair.get("A"), "A", (rank, in_features))
        check_factor(weights, module, pair.get("B"), "B", (out_features, rank))
        sites[module] = AdapterSite(pair["A"], pair["B"], scaling)
    return Adapter(directory, sites)


def check_options(path: Path, options: Mapping[str, Any]) -> None:
    """Raise LoadError unless the options describe plain LoRA."""
    if options.get("peft_type") != "LORA":
        raise LoadError(f"{path}: peft_type: expected 'LORA', got {options.get('peft_type')!r}")
    if options.get("bias", "none") != "none":
        raise LoadError(f"{path}: bias: expected 'none', got {options['bias']!r}, which is not supported")
    for name in UNSUPPORTED_OPTIONS:
        if options.get(name):
            raise LoadError(f"{path}: {name}: expected it unset, got {options[name]!r:.60}, which is not supported")
    init = str(options.get("init_lora_weights", True)).lower()
    if init.startswith(BASE_CHANGING_INITS):
        raise LoadError(
            f"{path}: init_lora_weights: {init!r} changes the base weights too and is not supported, "
            "expected an adapter converted to plain LoRA"
        )


def pair_factors(
    path: Path, stored: Mapping[str, StoredTensor], config: ModelConfig
) -> dict[str, dict[str, StoredTensor]]:
    """The tensors A and B of each module; LoadError for one that is neither, or belongs to no layer of the base."""
    linear = config.linear_shapes()
    factors: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in stored.items():
        if name.endswith(".base_layer.weight"):  # PEFT adds the base's head or embedding when one of them is adapted
            raise LoadError(
                f"{path}: tensor {name}: a weight of the base's own is not supported in an adapter, "
                "expected it saved with save_embedding_layers=False"
            )
        if ".lora_embedding_" in name:
            raise LoadError(f"{path}: tensor {name}: LoRA on an embedding is not supported, expected linear layers")
        matched = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        if matched is None:
            raise LoadError(
                f"{path}: tensor {name}: expected base_model.model.<layer>.lora_A.weight or lora_B.weight, "
                "which is all that is supported"
            )
        if matched[1] not in linear:
            raise LoadError(
                f"{path}: tensor {name}: adapter for another base: this one has no linear layer {matched[1]}"
            )
        factors.setdefault(matched[1], {})[matched[2]] = tensor
    return factors


def check_factor(path: Path, module: str, tensor: StoredTensor | None, factor: str, shape: tuple[int, int]) -> None:
    """Raise LoadError unless this factor is there with the shape that the base and the rank call for."""
    name = f"base_model.model.{module}.lora_{factor}.weight"
    if tensor is None:
        raise LoadError(f"{path}: tensor {name} is missing, expected shape {list(shape)}")
    if tensor.dtype not in READABLE_DTYPES:
        raise LoadError(f"{path}: tensor {name}: expected F32, F16 or BF16, got {tensor.dtype}")
    if tensor.shape == shape:
        return
    base_side = 1 if factor == "A" else 0
    if len(tensor.shape) == 2 and tensor.shape[base_side] == shape[base_side]:
        raise LoadError(
            f"{path}: tensor {name}: expected rank {shape[1 - base_side]}, as {CONFIG_NAME} says, "
            f"got shape {list(tensor.shape)}"
        )
    raise LoadError(
        f"{path}: tensor {name}: adapter for another base: expected shape {list(shape)}, got {list(tensor.shape)}"
    )


def rank_and_scaling(path: Path, options: Mapping[str, Any], module: str) -> tuple[int, float]:
    """A module's rank, and what its ``B @ A`` is multiplied by."""
    rank = of_pattern(path, "rank_pattern", options, module, options.get("r", 8))
    alpha = of_pattern(path, "alpha_pattern", options, module, options.get("lora_alpha", 8))
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise LoadError(f"{path}: r of {module}: expected a positive integer, got {rank!r}")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not isfinite(alpha):
        raise LoadError(f"{path}: lora_alpha of {module}: expected a number, got {alpha!r}")
    return rank, float(alpha) / (rank**0.5 if options.get("use_rslora") else rank)


def of_pattern(path: Path, name: str, options: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module path: PEFT's rule, in its order."""
    patterns = options.get(name) or {}
    if not isinstance(patterns, Mapping):
        raise LoadError(f"{path}: {name}: expected a mapping from module patterns to numbers, got {patterns!r:.60}")
    for pattern, value in patterns.items():
        try:
            matched = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            raise LoadError(f"{path}: {name}: {pattern!r} is not a regular expression: {error}") from error
        if matched:
            return value
    return default


def save_adapter(adapter: Adapter, path: str | Path, base_model_name_or_path: str | None = None) -> None:
    """Write an adapter as a PEFT directory that ``load_adapter`` and ``peft.PeftModel.from_pretrained`` read back.

    Args:
        adapter: with at least one site.
        path: the directory, made if it is not there.
        base_model_name_or_path: noted in the configuration for people to read; nothing here depends on it.
    """
    if not adapter.sites:
        raise ValueError("adapter: expected at least one site, got none")
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    # PEFT knows alpha, not scaling. Where the product is not exact the last bit of a float64 is off, no more.
    alphas = {module: site.scaling * site.rank for module, site in adapter.sites.items()}
    rank = Counter(site.rank for site in adapter.sites.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    options = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name_or_path,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(adapter.sites),
        "rank_pattern": {re.escape(module): site.rank for module, site in adapter.sites.items() if site.rank != rank},
        "alpha_pattern": {re.escape(module): value for module, value in alphas.items() if value != alpha},
    }
    tensors: dict[str, Float32] = {}
    for module, site in adapter.sites.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = np.ascontiguousarray(site.A)
        tensors[f"base_model.model.{module}.lora_B.weight"] = np.ascontiguousarray(site.B)
    (directory / CONFIG_NAME).write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")
    # Who has loaded the adapter that stood there reads its file still: it must not change under them.
    unfinished = directory / f"{WEIGHTS_NAME}.new"
    save_file(tensors, unfinished, metadata={"format": "pt"})
    unfinished.replace(directory / WEIGHTS_NAME)
