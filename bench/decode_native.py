"""Mixtures through the package's own interface: the native decoder in every weight format, and the reference."""

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from decode_burst import Burst
from decode_mixture import TOP_P, Prompts
from decode_traffic import Traffic

from pcm_fast.model import MixtureModel
from pcm_fast.pcm import LearnedPCM
from pcm_fast.spec import ModelSpec

DRAW: dict[str, Any] = {"top_p": TOP_P, "eos_token_id": []}  # a sequence never ends before its time
BLOCK = 16  # positions in a block of the KV cache


class MixtureDecoder:
    """A MixtureModel, timed token by token; `model` are keywords of it."""

    def __init__(
        self,
        spec: ModelSpec,
        prompts: Prompts,
        new_tokens: int,
        active: Sequence[str] | None = None,
        **model: Any,
    ) -> None:
        self.model = MixtureModel(spec, **model)
        self._prompts, self._new_tokens, self._active = prompts, new_tokens, active
        assert spec.checkpoint.config is not None
        traffic = Traffic(spec.checkpoint.config)
        experts = len(spec.experts if active is None else active)
        pcms = int(isinstance(spec.pcm, LearnedPCM))
        rows = experts + pcms
        self.flops = traffic.step_flops(experts, rows, prompts.length, spec.experts[0].adapter)
        # Packs the weights, builds the models; with a prompt that no turn has.
        self._generate([prompts.prompt(-1)[:BLOCK]], 2)
        if self.model.backend == "reference":
            weights, self.stored_bytes = traffic.one_forward_each(experts, pcms), 0
        else:
            weights = self.model._backend.model.num_bytes  # type: ignore[attr-defined]
            blocks = -(-(prompts.length + new_tokens) // BLOCK)
            self.stored_bytes = weights + traffic.kv_bytes(rows, blocks * BLOCK)
        self.step_bytes = weights + traffic.kv_bytes(rows, prompts.length)

    def run(self, turn: int) -> Burst:
        clock = Clock(_profile(self.model))
        output = self._generate([self._prompts.prompt(turn)], self._new_tokens, clock)
        return Burst(clock.steps(), output.timings["time_to_first_token"], clock.parts())

    def _generate(self, prompts: list[list[int]], new_tokens: int, clock: "Clock | None" = None) -> Any:
        learned = isinstance(self.model.spec.pcm, LearnedPCM)
        return self.model.generate(
            prompts,
            pcm_input_ids=prompts if learned else None,  # as long as what the experts read
            active=self._active,
            max_new_tokens=new_tokens,
            streamer=clock,
            return_dict_in_generate=True,
            **DRAW,
        )


class Clock:
    """A streamer that notes when every token came, and what the parts of the steps had taken by the first and last."""

    def __init__(self, profile: Callable[[], dict[str, float]]) -> None:
        self._profile = profile
        self._times: list[float] = []
        self._parts: list[dict[str, float]] = []

    def put(self, value: Any) -> None:
        """The prompt at the first call, then one token at each."""
        self._times.append(time.perf_counter())
        if len(self._times) == 2:
            self._parts.append(self._profile())

    def end(self) -> None:
        self._parts.append(self._profile())

    def steps(self) -> list[float]:
        """Seconds from token to token."""
        return [after - before for before, after in pairwise(self._times[1:])]

    def parts(self) -> dict[str, float]:
        """Seconds a step by part."""
        first, last = self._parts
        return {part: (last[part] - first[part]) / len(self.steps()) for part in last}


def weight_formats() -> dict[str, dict[str, str]]:
    """The formats that the native backend keeps weights in, by name: keywords of MixtureModel."""
    return {
        "GGUF weights": {"weights": "gguf"},
        "float32 weights": {"weights": "float32"},
        "bfloat16 weights": {"weights": "bfloat16"},
        "8-bit weights": {"weights": "q8_0"},
        "GGUF weights, 8-bit activations": {"weights": "gguf", "activations": "int8"},
    }


def _profile(model: MixtureModel) -> Callable[[], dict[str, float]]:
    """What the parts of the steps have taken so far; nothing if the backend does not tell."""
    profile = getattr(getattr(model._backend, "model", None), "profile", None)
    return (lambda: dict(profile())) if profile is not None else dict
