"""What a mixture is made of, apart from how it is run."""

from __future__ import annotations

from dataclasses import dataclass

from pcm_fast.checkpoint import Checkpoint
from pcm_fast.experts import Expert
from pcm_fast.pcm import PCM


@dataclass(frozen=True)
class ModelSpec:
    """A base, the experts on it and the PCM that weighs them: all that a backend needs.

    Attributes:
        checkpoint: the base.
        experts: the K experts; their order is the order of all weights.
        pcm: how weights come from a preference.
    """

    checkpoint: Checkpoint
    experts: tuple[Expert, ...]
    pcm: PCM

    @property
    def expert_names(self) -> tuple[str, ...]:
        """The names of the K experts, in their order."""
        return tuple(expert.name for expert in self.experts)

    def expert_checkpoint(self, index: int) -> Checkpoint:
        """The checkpoint that holds the weights of one expert, less its adapter."""
        return self.experts[index].checkpoint or self.checkpoint
