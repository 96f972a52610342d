"""The same experts and PCM in PEFT, on transformers in float32: adapters set in turn, or mixed in one batch."""

import inspect
import time
from itertools import pairwise
from typing import Any

import torch
from composition import composition
from decode_burst import Burst
from decode_mixture import TOP_P, MixtureFiles, Prompts
from decode_traffic import FLOAT32, Traffic
from peft import PeftModel
from transformers import DynamicCache

from pcm_fast.pcm import LearnedPCM
from pcm_fast.spec import ModelSpec
from pcm_fast.transformers_model import build_model

PCM = "pcm"


class PeftDecoder:
    """A PEFT model with all adapters, own KV caches, and the usual composition in torch after it."""

    def __init__(
        self, spec: ModelSpec, files: MixtureFiles, prompts: Prompts, new_tokens: int, threads: int, mixed: bool,
        device: str = "cpu",
    ) -> None:  # fmt: skip
        """mixed: one batch with an adapter for each row; otherwise one forward for each adapter."""
        pcm = spec.pcm
        assert isinstance(pcm, LearnedPCM)
        assert pcm.adapter is not None
        assert spec.checkpoint.config is not None
        self._prompts, self._new_tokens, self._threads, self._mixed = prompts, new_tokens, threads, mixed
        self._names = list(spec.expert_names)
        directories = {**files.experts(len(self._names)), PCM: files.pcm}
        self._device = torch.device(device)
        self._model = peft_model(spec, directories).to(self._device)
        accepted = inspect.signature(self._model.base_model.model.forward).parameters
        self._cache_name = "cache" if "cache" in accepted else "past_key_values"  # by the release of transformers
        self._head = tuple(torch.from_numpy(part).to(self._device) for part in (pcm.weight, pcm.bias))
        self._generator = torch.Generator(self._device).manual_seed(0)
        traffic = Traffic(spec.checkpoint.config)
        rows = len(directories)
        base = (
            FLOAT32 * (traffic.layers + traffic.head) if mixed else traffic.one_forward_each(len(self._names), pcms=1)
        )
        adapters = FLOAT32 * rows * pcm.adapter.num_parameters
        self.step_bytes = base + adapters + traffic.kv_bytes(rows, prompts.length)
        self.flops = traffic.step_flops(rows if mixed else rows - 1, rows, prompts.length, pcm.adapter)
        self.stored_bytes = 0

    @torch.inference_mode()
    def run(self, turn: int) -> Burst:
        torch.set_num_threads(self._threads)
        read = self._read_mixed if self._mixed else self._read_in_turn
        caches: dict[str, DynamicCache] = {}
        unread = torch.tensor([self._prompts.prompt(turn)], device=self._device)
        times = [time.perf_counter()]
        for _ in range(self._new_tokens):
            logits, hidden = read(unread, caches)
            weights = torch.softmax(hidden @ self._head[0].T + self._head[1], dim=-1)
            unread, _ = composition(logits, weights, TOP_P, self._generator)
            unread.tolist()  # as whoever looks for the end of a sequence does; waits for the device
            times.append(time.perf_counter())
        steps = [after - before for before, after in pairwise(times)]
        return Burst(steps[1:], steps[0])

    def _read_in_turn(self, unread: torch.Tensor, caches: dict[str, DynamicCache]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [1, K, V] of the experts and the hidden state [1, d] of the PCM, after tokens [1, n]."""
        logits = []
        for name in self._names:
            self._model.set_adapter(name)
            logits.append(self._model(unread, logits_to_keep=1, **self._cache(caches, name)).logits[:, -1])
        self._model.set_adapter(PCM)
        body = self._model.base_model.model.model  # without the head
        hidden = body(unread, **self._cache(caches, PCM)).last_hidden_state[:, -1]
        return torch.stack(logits, dim=1), hidden

    def _read_mixed(self, unread: torch.Tensor, caches: dict[str, DynamicCache]) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, by one forward of K + 1 rows."""
        names = [*self._names, PCM]
        output = self._model(
            unread.expand(len(names), -1),
            logits_to_keep=1,
            output_hidden_states=True,
            adapter_names=names,
            **self._cache(caches, ""),
        )
        return output.logits[None, :-1, -1], output.hidden_states[-1][-1:, -1]

    def _cache(self, caches: dict[str, DynamicCache], name: str) -> dict[str, DynamicCache]:
        """The cache of this name, made if need be, as a keyword of the model."""
        return {self._cache_name: caches.setdefault(name, DynamicCache())}


class PlainForward:
    """One float32 forward of the plain base over a batch of prompts: what prefill is held against."""

    def __init__(self, spec: ModelSpec, prompts: Prompts, threads: int, rows: int) -> None:
        self._model = build_model(spec.checkpoint)
        self._prompts, self._threads, self._rows = prompts, threads, rows
        assert spec.checkpoint.config is not None
        traffic = Traffic(spec.checkpoint.config)
        self.step_bytes, self.stored_bytes = traffic.one_forward_each(1, 0), 0
        self.flops = rows * prompts.length * 2 * traffic.layers

    @torch.inference_mode()
    def run(self, turn: int) -> Burst:
        torch.set_num_threads(self._threads)
        ids = torch.tensor([self._prompts.prompt(turn)]).expand(self._rows, -1)
        start = time.perf_counter()
        self._model(ids, logits_to_keep=1)
        seconds = time.perf_counter() - start
        return Burst([seconds], seconds)


def peft_model(spec: ModelSpec, directories: dict[str, Any]) -> PeftModel:
    """The base with the adapters in these directories, by name."""
    base = build_model(spec.checkpoint)
    (first, directory), *others = directories.items()
    model = PeftModel.from_pretrained(base, directory, adapter_name=first)
    for name, directory in others:
        model.load_adapter(directory, adapter_name=name)
    return model.eval()
