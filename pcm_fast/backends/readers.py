"""Who reads in a mixture, and with which of its models: one model for each distinct checkpoint, whoever shares it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pcm_fast import _native
from pcm_fast.adapter import Adapter
from pcm_fast.checkpoint import Checkpoint, ModelConfig
from pcm_fast.kv_cache import namespace_id
from pcm_fast.pcm import LearnedPCM
from pcm_fast.sequence import Reader
from pcm_fast.spec import ModelSpec
from pcm_fast.vocabulary import vocab_size

SITES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def reason_against(spec: ModelSpec, unsupported: Callable[[ModelConfig], str | None]) -> str | None:
    """Why a backend of our own cannot run this mixture; None if it can.

    unsupported: says the same of the shape of one model.
    """
    if len(spec.experts) > _native.MAX_EXPERTS:
        return f"more than {_native.MAX_EXPERTS} experts"
    for owner, checkpoint, adapter in _readers_of(spec):
        where = "" if checkpoint is spec.checkpoint else f" ({owner})"
        if checkpoint.config is None:
            return (checkpoint.family_reason or "an architecture it does not know") + where
        reason = unsupported(checkpoint.config)
        if reason is not None:
            return reason + where
        if checkpoint.config.vocab_size != vocab_size(spec.checkpoint):
            return f"a vocabulary of {checkpoint.config.vocab_size} tokens{where}"
        for path in adapter.sites if adapter is not None else ():
            if path != "lm_head" and not path.endswith(SITES):
                return f"an adapter on {path}"
    return None


@dataclass(frozen=True)
class Readers:
    """Who reads with which model.

    Attributes:
        checkpoints: of each model.
        adapters: of each model, those that its rows may carry; a ``Reader.adapter`` is an index there.
        experts: the reader of each of the K experts.
        pcm: the reader of a learned PCM, None for another kind.
    """

    checkpoints: tuple[Checkpoint, ...]
    adapters: tuple[tuple[Adapter, ...], ...]
    experts: tuple[Reader, ...]
    pcm: Reader | None

    @staticmethod
    def of(spec: ModelSpec, *identities: str) -> Readers:
        """The readers of a mixture; identities: what their keys and values depend on besides checkpoint and adapter."""
        everybody = _readers_of(spec)
        checkpoints = tuple({id(checkpoint): checkpoint for _, checkpoint, _ in everybody}.values())
        adapters = tuple(
            tuple({id(a): a for _, other, a in everybody if other is checkpoint and a is not None}.values())
            for checkpoint in checkpoints
        )
        readers = []
        for _, checkpoint, adapter in everybody:
            model = next(i for i, other in enumerate(checkpoints) if other is checkpoint)
            readers.append(
                Reader(
                    model=model,
                    adapter=-1 if adapter is None else next(i for i, a in enumerate(adapters[model]) if a is adapter),
                    namespace=namespace_id(checkpoint.identity, adapter.identity if adapter else "", *identities),
                    adapts_head=adapter is not None and "lm_head" in adapter.sites,
                )
            )
        learned = isinstance(spec.pcm, LearnedPCM)
        return Readers(
            checkpoints,
            adapters,
            tuple(readers[:-1] if learned else readers),
            readers[-1] if learned else None,
        )


def rows_of_model(experts: tuple[Reader, ...], pcm: Reader | None, model: int) -> int:
    """Rows that a sequence with all experts has on one of the models."""
    return sum(reader.model == model for reader in experts) + int(pcm is not None and pcm.model == model)


def _readers_of(spec: ModelSpec) -> list[tuple[str, Checkpoint, Adapter | None]]:
    """Everybody who reads text: a name for messages, the checkpoint and the adapter; the PCM last."""
    readers = [(f"expert {e.name!r}", spec.expert_checkpoint(i), e.adapter) for i, e in enumerate(spec.experts)]
    if isinstance(spec.pcm, LearnedPCM):
        readers.append(("the PCM", spec.pcm.checkpoint or spec.checkpoint, spec.pcm.adapter))
    return readers
