"""A PCM in torch: weights, log-likelihoods of answers under the mixture, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence

from pcm_fast.adapter import Adapter, AdapterSite
from pcm_fast.checkpoint import Checkpoint
from pcm_fast.loader import load_checkpoint
from pcm_fast.pcm import LearnedPCM
from pcm_fast.train.config import PCMConfig
from pcm_fast.transformers_model import build_model


class Policy(torch.nn.Module):
    """A language model without its LM head, an adapter on it (of a shared PCM), and a linear head of width K.

    Attributes:
        body: the model with its adapter.
        head: [K, d]; it starts at zero, so that all experts weigh the same.
        config: of the PCM.
        experts: names of the K experts.
    """

    def __init__(self, base: Checkpoint, experts: Sequence[str], config: PCMConfig) -> None:
        """A PCM that has learned nothing yet."""
        super().__init__()
        self.config, self.experts = config, tuple(experts)
        checkpoint = load_checkpoint(config.model) if config.kind == "separate" else base
        if checkpoint.config is None:
            raise ValueError(f"pcm.kind: expected a base that pcm-fast reads itself, got {checkpoint.family_reason}")
        self.causal = build_model(checkpoint)
        body = self.causal.model
        if config.kind == "shared":
            count = checkpoint.config.num_layers
            layers = range(max(0, count - config.layers) if config.layers else 0, count)
            prefixes = tuple(f"layers.{layer}." for layer in layers)
            sites = [
                name
                for name, module in body.named_modules()
                if isinstance(module, torch.nn.Linear) and name.startswith(prefixes) and name.endswith(config.modules)
            ]
            if not sites:
                raise ValueError(f"pcm.modules: expected linear layers of the base, got {list(config.modules)}")
            lora = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=sites)
            self.body: Any = get_peft_model(body, lora)
        else:
            self.body = body.requires_grad_(True)
        self.head = torch.nn.Linear(checkpoint.config.hidden_size, len(experts))
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def parameter_groups(self, rate: float = 1.0) -> list[dict[str, Any]]:
        """For an optimiser: the body's trainable parameters and the head's, each with its learning rate times rate."""
        body = [parameter for parameter in self.body.parameters() if parameter.requires_grad]
        return [
            {"params": body, "lr": rate * self.config.learning_rate},
            {"params": list(self.head.parameters()), "lr": rate * self.config.head_learning_rate},
        ]

    def trained(self) -> list[torch.nn.Parameter]:
        """All parameters that learn."""
        return [parameter for group in self.parameter_groups() for parameter in group["params"]]

    def log_weights(self, contexts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Log mixture weights before every token of each answer.

        Args:
            contexts: what the PCM reads before each answer, at least one token.
            answers: tokens of the answers.

        Returns:
            For each answer [T, K] float32, normalised over all K experts.
        """
        texts = [torch.tensor([*context, *answer[:-1]]) for context, answer in zip(contexts, answers, strict=True)]
        # Padding on the right is behind everything that is looked at, and attention is causal.
        hidden = self.body(input_ids=pad_sequence(texts, batch_first=True), use_cache=False).last_hidden_state
        rows = []
        for row, text, answer in zip(hidden, texts, answers, strict=True):
            rows.append(torch.log_softmax(self.head(row[len(text) - len(answer) : len(text)]), dim=-1))
        return rows

    def learned(self, directory: Path) -> LearnedPCM:
        """The PCM as backends run it. A separate model is written into the directory, and read from there."""
        pcm = LearnedPCM(
            kind="separate" if self.config.kind == "separate" else "shared",
            experts=self.experts,
            template=self.config.template,
            weight=self.head.weight.detach().numpy().copy(),
            bias=self.head.bias.detach().numpy().copy(),
        )
        if self.config.kind == "separate":
            self.causal.save_pretrained(str(directory / "model"))
            own = load_checkpoint(directory / "model")
            return replace(pcm, checkpoint=own)
        return replace(pcm, adapter=self._adapter())

    def _adapter(self) -> Adapter:
        sites = {}
        scaling = self.config.alpha / self.config.rank
        for name, module in self.body.named_modules():
            if hasattr(module, "lora_A") and "default" in module.lora_A:
                A, B = (factor["default"].weight.detach().numpy() for factor in (module.lora_A, module.lora_B))
                sites["model." + name.removeprefix("base_model.model.")] = AdapterSite(A.copy(), B.copy(), scaling)
        return Adapter(None, sites)


def mixture_log_likelihood(
    log_weights: torch.Tensor, expert_logprobs: torch.Tensor, active: Sequence[int]
) -> torch.Tensor:
    """Log pi(y) = sum over t of log sum_i w_i,t p_i(y_t), with the weights renormalised over the active experts.

    Args:
        log_weights: [T, K].
        expert_logprobs: [T, K], log p_i(y_t); what stands at experts that are not active does not matter.
        active: indices of the experts that wrote the answer.
    """
    columns = list(active)
    weights = torch.log_softmax(log_weights[:, columns], dim=-1)
    return torch.logsumexp(weights + expert_logprobs[:, columns], dim=-1).sum()
