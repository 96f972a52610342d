"""What bench_decode.py decodes: random LoRA experts and a learned PCM on the embedded model, and prompts of real text.

The adapters are written in PEFT's layout, so that every candidate reads the same files. Their numbers are rounded to
bfloat16, in which adapters are shipped.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pcm_fast.adapter import Adapter, AdapterSite, save_adapter
from pcm_fast.checkpoint import ModelConfig
from pcm_fast.loader import EMBEDDED_MODEL, load_checkpoint
from pcm_fast.model import MixtureModel
from pcm_fast.pcm import LearnedPCM
from pcm_fast.pcm_file import save_pcm
from pcm_fast.spec import ModelSpec

TOP_P = 0.9
NUM_EXPERTS = 8  # written; a mixture takes the first K of them
TEXT = Path(__file__).parents[1] / "LICENSE"
FIRST_TOKEN = 1000  # prompts differ in their first token alone, which may be any


@dataclass(frozen=True)
class AdapterShape:
    """The size of an adapter: its rank, and the linear layers it is on by the ends of their names."""

    name: str
    rank: int
    modules: tuple[str, ...]


ATTENTION = AdapterShape("rank 8 on q, k, v, o", 8, ("q_proj", "k_proj", "v_proj", "o_proj"))
ALL_SITES = AdapterShape("rank 16 on all 7 sites", 16, (*ATTENTION.modules, "gate_proj", "up_proj", "down_proj"))


@dataclass(frozen=True)
class MixtureFiles:
    """Adapters of one shape and a PCM in a directory."""

    directory: Path

    @property
    def pcm(self) -> Path:
        return self.directory / "pcm"

    def experts(self, count: int) -> dict[str, Path]:
        return {f"expert{i}": self.directory / f"expert{i}" for i in range(count)}

    def spec(self, count: int, with_pcm: bool = True) -> ModelSpec:
        """The first `count` experts, weighed by the PCM or all the same."""
        pcm: Any = self.pcm if with_pcm else "uniform"
        return MixtureModel.from_pretrained(EMBEDDED_MODEL, self.experts(count), pcm).spec


def write_mixture(directory: Path, shape: AdapterShape) -> MixtureFiles:
    """Random experts of this shape and a PCM that weighs them, in files."""
    files = MixtureFiles(directory)
    checkpoint = load_checkpoint(EMBEDDED_MODEL)
    config = checkpoint.config
    assert config is not None
    experts = files.experts(NUM_EXPERTS)
    for seed, path in enumerate(experts.values()):
        save_adapter(random_adapter(config, shape, seed), path, EMBEDDED_MODEL)
    rng = np.random.default_rng(NUM_EXPERTS)
    head = rng.standard_normal((NUM_EXPERTS, config.hidden_size), dtype=np.float32) / np.float32(config.hidden_size)
    pcm = LearnedPCM(
        "shared",
        tuple(experts),
        "Preference: {preference}",
        head,
        np.zeros(NUM_EXPERTS, np.float32),
        random_adapter(config, shape, NUM_EXPERTS),
    )
    save_pcm(pcm, files.pcm)
    return files


def random_adapter(config: ModelConfig, shape: AdapterShape, seed: int) -> Adapter:
    """An adapter in memory that changes the model somewhat."""
    rng = np.random.default_rng(seed)
    sites = {}
    for module, (out_features, in_features) in config.linear_shapes().items():
        if module.endswith(shape.modules):
            a = rng.standard_normal((shape.rank, in_features), dtype=np.float32) / np.float32(in_features**0.5)
            b = rng.standard_normal((out_features, shape.rank), dtype=np.float32) * np.float32(0.2 / out_features**0.5)
            sites[module] = AdapterSite(_to_bfloat16(a), _to_bfloat16(b), scaling=2.0)
    return Adapter(None, sites)


class Prompts:
    """Prompts of the same length out of one text; no two share a prefix, so that none can be reused."""

    def __init__(self, length: int) -> None:
        tokenizer = load_checkpoint(EMBEDDED_MODEL).tokenizer
        assert tokenizer is not None
        self._text = tokenizer.encode(TEXT.read_text(encoding="utf-8"))
        self.length = length

    def prompt(self, number: int) -> list[int]:
        """The prompt of this number."""
        return [FIRST_TOKEN + number, *self._text[1 : self.length]]

    def continuation(self, count: int) -> list[int]:
        """How the text goes on, for a candidate that draws no tokens."""
        return list(self._text[self.length : self.length + count])


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The nearest bfloat16 numbers, as float32."""
    rounded: np.ndarray = torch.from_numpy(values).bfloat16().float().numpy()
    return rounded
