"""What one step has to read and to compute, from the shapes alone: the physical limits of a candidate."""

from dataclasses import dataclass

from pcm_fast.adapter import Adapter
from pcm_fast.checkpoint import ModelConfig

FLOAT32, FLOAT16 = 4, 2


@dataclass(frozen=True)
class Traffic:
    """Sizes of a model, counted in numbers."""

    config: ModelConfig

    @property
    def head(self) -> int:
        """Numbers in the head, which is the embedding as well."""
        return self.config.vocab_size * self.config.hidden_size

    @property
    def layers(self) -> int:
        """Numbers in the linear layers, less the head."""
        return sum(rows * columns for rows, columns in self.config.linear_shapes().values()) - self.head

    def kv_bytes(self, rows: int, positions: int, itemsize: int = FLOAT32) -> int:
        """The KV cache of so many rows."""
        config = self.config
        return 2 * rows * positions * config.num_layers * config.num_kv_heads * config.head_dim * itemsize

    def one_forward_each(self, experts: int, pcms: int) -> int:
        """Bytes of float32 weights read by one forward for each expert, and each PCM, which needs no head."""
        return FLOAT32 * ((experts + pcms) * self.layers + experts * self.head)

    def step_flops(self, heads: int, rows: int, positions: int, adapter: Adapter | None) -> int:
        """Operations of a step: all rows go through the layers, their adapters and attention, `heads` of them on."""
        config = self.config
        attention = 2 * positions * config.num_layers * config.num_heads * config.head_dim
        adapted = adapter.num_parameters if adapter is not None else 0
        return 2 * (rows * (self.layers + adapted + attention) + heads * self.head)
