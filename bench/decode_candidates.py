"""The candidates of bench_decode.py by name, and the files that they read."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import decode_llama
from decode_batch import EXPERTS_EACH, ConcurrentRequests
from decode_burst import Candidate
from decode_mixture import ALL_SITES, ATTENTION, MixtureFiles, Prompts, write_mixture
from decode_native import MixtureDecoder, weight_formats
from decode_peft import PeftDecoder, PlainForward

from pcm_fast.checkpoint import ModelConfig
from pcm_fast.loader import EMBEDDED_MODEL, embedded_path, load_checkpoint
from pcm_fast.spec import ModelSpec

EXPERTS = 4  # and a PCM: the mixture of the headline
EXPERTS_IN_BATCH = 6

OURS = "pcm-fast, GGUF weights"
OURS_LARGE = f"{OURS}, {ALL_SITES.name}"
OURS_ALONE = f"{OURS}, 1 expert, no PCM"
OURS_FLOAT32, OURS_BFLOAT16 = "pcm-fast, float32 weights", "pcm-fast, bfloat16 weights"
REFERENCE = "reference decoder"
PEFT_IN_TURN, PEFT_MIXED = "PEFT, adapters in turn", "PEFT, mixed batch"
LLAMA, LLAMA_KIND = "llama.cpp, one model, same GGUF", "llama.cpp, one model, {}"
LLAMA_FLOAT32, LLAMA_BFLOAT16, LLAMA_8_BITS = map(LLAMA_KIND.format, ("F32", "BF16", "Q8_0"))
FORWARD = "transformers, one forward of all prompts"
SAME_WEIGHTS = {
    "pcm-fast, 8-bit weights": LLAMA_8_BITS,
    OURS_FLOAT32: LLAMA_FLOAT32,
    OURS_BFLOAT16: LLAMA_BFLOAT16,
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is measured."""

    threads: int
    context: int
    turns: int
    tokens: int  # of a burst
    slow_tokens: int  # of a burst of a decoder that takes a tenth of a second a token or more
    expert_turns: int
    expert_counts: tuple[int, ...]
    reference_counts: tuple[int, ...]
    batch_turns: int
    batch_sizes: tuple[int, ...]
    batch_tokens: int
    cold_rounds: int
    all_memory: bool  # the peak memory of every candidate, or of the first alone
    gguf_kinds: tuple[str, ...]  # formats in which llama.cpp is given the base too, beside its own


FULL = Plan(
    threads=2,
    context=256,
    turns=7,
    tokens=28,
    slow_tokens=6,
    expert_turns=5,
    expert_counts=tuple(range(1, 9)),
    reference_counts=(1, 4, 8),
    batch_turns=3,
    batch_sizes=(1, 2, 4, 8, 16, 32),
    batch_tokens=16,
    cold_rounds=5,
    all_memory=True,
    gguf_kinds=("F32", "BF16", "Q8_0"),
)
# One thread: two that wait for each other crawl where the cores are busy, as they are under pytest -n 2.
QUICK = Plan(
    threads=1,
    context=16,
    turns=1,
    tokens=3,
    slow_tokens=2,
    expert_turns=1,
    expert_counts=(1, 8),
    reference_counts=(),
    batch_turns=1,
    batch_sizes=(1, 4),
    batch_tokens=2,
    cold_rounds=1,
    all_memory=False,
    gguf_kinds=(),
)


@dataclass(frozen=True)
class Workspace:
    """The files of a run, and the candidates on them."""

    directory: Path
    plan: Plan

    def prepare(self) -> None:
        """Write the files."""
        write_mixture(self._small.directory, ATTENTION)
        write_mixture(self._large.directory, ALL_SITES)
        if decode_llama.installed():
            for kind in self.plan.gguf_kinds:
                decode_llama.requantised(embedded_path(), self._gguf(kind), kind)

    def headline(self) -> list[Candidate]:
        """All decoders of 4 experts and a PCM, and one model in llama.cpp."""
        ours = [
            Candidate(f"pcm-fast, {name}", partial(self._native, self._small, EXPERTS, **keywords))
            for name, keywords in weight_formats().items()
        ]
        return [
            *ours,
            Candidate(OURS_LARGE, partial(self._native, self._large, EXPERTS)),
            Candidate(OURS_ALONE, partial(self._native, self._small, 1, with_pcm=False)),
            Candidate(REFERENCE, partial(self._reference, EXPERTS)),
            Candidate(PEFT_IN_TURN, partial(self._peft, mixed=False)),
            Candidate(PEFT_MIXED, partial(self._peft, mixed=True)),
            *self.llama(),
        ]

    def llama(self) -> list[Candidate]:
        """One model in llama.cpp, in each of the formats; none where it is not installed."""
        if not decode_llama.installed():
            return []
        files = {
            LLAMA: embedded_path(),
            **{LLAMA_KIND.format(kind): self._gguf(kind) for kind in self.plan.gguf_kinds},
        }
        return [Candidate(name, partial(self._llama, path)) for name, path in files.items()]

    def forward(self) -> Candidate:
        """What prefill is held against."""
        spec = self._small.spec(EXPERTS)
        return Candidate(FORWARD, partial(PlainForward, spec, self._prompts, self.plan.threads, rows=EXPERTS + 1))

    def by_experts(self, counts: Sequence[int], reference_counts: Sequence[int]) -> list[Candidate]:
        """Ours and the reference with K experts and a PCM, and one model in llama.cpp."""
        return [
            *(Candidate(expert_name(OURS, count), partial(self._native, self._small, count)) for count in counts),
            *(Candidate(expert_name(REFERENCE, count), partial(self._reference, count)) for count in reference_counts),
            *self.llama()[:1],
        ]

    def concurrent(self) -> ConcurrentRequests:
        """Many requests at once, each with some of the experts."""
        spec = self._small.spec(EXPERTS_IN_BATCH)
        return ConcurrentRequests(spec, self._prompts, self.plan.batch_sizes, self.plan.batch_tokens, self.plan.threads)

    def one_request(self) -> MixtureDecoder:
        """The reference with one such request."""
        spec = self._small.spec(EXPERTS_IN_BATCH)
        return self._mixture(spec, self.plan.slow_tokens, spec.expert_names[:EXPERTS_EACH], backend="reference")

    @cached_property
    def config(self) -> ModelConfig:
        config = load_checkpoint(EMBEDDED_MODEL).config
        assert config is not None
        return config

    @cached_property
    def _prompts(self) -> Prompts:
        return Prompts(self.plan.context)

    @property
    def _small(self) -> MixtureFiles:
        return MixtureFiles(self.directory / "small")

    @property
    def _large(self) -> MixtureFiles:
        return MixtureFiles(self.directory / "large")

    def _gguf(self, kind: str) -> Path:
        return self.directory / f"{kind}.gguf"

    def _native(self, files: MixtureFiles, count: int, with_pcm: bool = True, **keywords: str) -> MixtureDecoder:
        return self._mixture(files.spec(count, with_pcm), self.plan.tokens, backend="native", **keywords)

    def _reference(self, count: int) -> MixtureDecoder:
        return self._mixture(self._small.spec(count), self.plan.slow_tokens, backend="reference")

    def _mixture(
        self, spec: ModelSpec, tokens: int, active: Sequence[str] | None = None, **keywords: str
    ) -> MixtureDecoder:
        return MixtureDecoder(spec, self._prompts, tokens, active, num_threads=self.plan.threads, **keywords)

    def _llama(self, path: Path) -> decode_llama.LlamaDecoder:
        return decode_llama.LlamaDecoder(path, self.config, self._prompts, self.plan.tokens, self.plan.threads)

    def _peft(self, mixed: bool) -> PeftDecoder:
        spec, plan = self._small.spec(EXPERTS), self.plan
        return PeftDecoder(spec, self._small, self._prompts, plan.slow_tokens, plan.threads, mixed)


def expert_name(decoder: str, count: int) -> str:
    """The name of a candidate with so many experts."""
    return f"{decoder}, K = {count}"
