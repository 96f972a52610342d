"""A token of the mixture on a device: as right as the tolerances ask, and how long it takes beside other decoders."""

from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from decode_burst import interleave
from decode_mixture import ATTENTION, TEXT, TOP_P, Prompts, write_mixture
from decode_native import MixtureDecoder
from decode_peft import PeftDecoder

from pcm_fast.backends.torch_models import TorchModels
from pcm_fast.model import MixtureModel

EXPERTS = 4
POSITIONS = 512  # of a text, from which on its rounded weights are judged
LIMITS = {"float32": (1e-3, 1e-7), "bfloat16": (0.1, 5e-4)}  # of log p where p > 1e-6, and of the mean KL


class Decode:
    """The embedded model with random experts and a PCM."""

    def __init__(self, directory: Path, device: torch.device, dry: bool) -> None:
        self._files = write_mixture(directory, ATTENTION)
        self._spec = self._files.spec(1 if dry else EXPERTS)
        self._device, self._dry = str(device), dry
        self._prompts = Prompts(16 if dry else 256)

    def tolerances(self) -> list[dict[str, Any]]:
        """log p of a text against the reference, for each kind of weights."""
        tokenizer = self._spec.checkpoint.tokenizer
        assert tokenizer is not None
        ids = tokenizer.encode(TEXT.read_text(encoding="utf-8"))[: 24 if self._dry else 600]
        own = {"pcm_input_ids": [ids[:8]], "prompt_length": 8}
        expected = _normalised(MixtureModel(self._spec, backend="reference").log_probs([ids], **own)[0, 7:])
        rows = []
        for weights, (most, divergence) in LIMITS.items():
            ours = _normalised(self._model(weights).log_probs([ids], **own)[0, 7:])
            apart = np.abs(ours - expected)[expected > np.log(1e-6)]
            mean = float((np.exp(expected) * (expected - ours)).sum(-1).mean())
            judged = weights == "float32" or len(expected) >= POSITIONS
            # Rounding 4-bit blocks to bfloat16 moves a few unlikely tokens by more, whoever multiplies.
            greatest = float(apart.max() if weights == "float32" else np.quantile(apart, 0.99))
            rows.append(
                {
                    "weights": weights,
                    "positions": len(expected),
                    "log p apart (bfloat16: 99 % of tokens)": greatest,
                    "mean KL": mean,
                    "well": greatest < most and mean < divergence if judged else None,
                }
            )
        return rows

    def latencies(self) -> list[dict[str, Any]]:
        """Milliseconds a token of one request, of every decoder in turn; all but the reference on the device."""
        tokens, slow, turns = (3, 2, 1) if self._dry else (64, 8, 5)
        threads = torch.get_num_threads()
        decoders: dict[str, Any] = {}
        for weights in LIMITS:
            for graphs in (True, False):
                decoder = MixtureDecoder(
                    self._spec, self._prompts, tokens, backend="torch", device=self._device, weights=weights,
                    kv_dtype=weights, num_threads=1 if self._dry else None,
                )  # fmt: skip
                if not graphs:
                    without_graphs(decoder.model)
                name = f"torch backend, {weights}, {'graphs' if graphs else 'no graphs'}"
                decoders[name] = decoder
        decoders["reference decoder, on the CPU"] = MixtureDecoder(self._spec, self._prompts, slow, backend="reference")
        for name, mixed in (("PEFT, adapters in turn", False), ("PEFT, mixed batch", True)):
            decoders[f"{name}, float32"] = PeftDecoder(
                self._spec, self._files, self._prompts, slow, threads, mixed, self._device
            )
        bursts = interleave(decoders, turns)
        return [
            {
                "decoder": name,
                "experts": len(self._spec.experts),
                "context": self._prompts.length,
                "top_p": TOP_P,
                "ms a token": median(burst.step for burst in found) * 1e3,
                "ms to the first": median(burst.first for burst in found) * 1e3,
            }
            for name, found in bursts.items()
        ]

    def _model(self, weights: str) -> MixtureModel:
        threads = 1 if self._dry else None  # two that wait for each other crawl where the cores are busy
        return MixtureModel(
            self._spec, backend="torch", device=self._device, weights=weights, kv_dtype=weights, num_threads=threads
        )


def _normalised(log_p: Any) -> Any:
    """Log-probabilities in float64, whose sums are 1 to its last place: float32 alone would show in the KL."""
    wide = np.asarray(log_p, np.float64)
    return wide - np.logaddexp.reduce(wide, axis=-1, keepdims=True)


def without_graphs(model: MixtureModel) -> None:
    """Have every step of the engine behind ``generate`` launched operator by operator."""
    found = model._decoder._engine
    assert found is not None
    assert isinstance(model._decoder.model, TorchModels)
    found[0]._runner.graphs = None  # type: ignore[attr-defined]
