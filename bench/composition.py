"""The usual torch way to merge K distributions and draw a token: what ops.mix_sample replaces, and baselines use."""

import torch


def composition(
    logits: torch.Tensor, weights: torch.Tensor, top_p: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """log_softmax, weighted sum, sort, cumulative sum, multinomial: logits [B, K, V], weights [B, K] -> tokens [B, 1].

    Returns the tokens and their log-probabilities under the merge.
    """
    p = (torch.log_softmax(logits, dim=-1).exp() * weights[..., None]).sum(dim=1)
    ordered, ids = torch.sort(p, descending=True, dim=-1)
    before = ordered.cumsum(dim=-1) - ordered
    kept = torch.where(before < top_p, ordered, 0.0)
    choice = torch.multinomial(kept, 1, generator=generator)
    token = ids.gather(-1, choice)
    return token, p.gather(-1, token).log()
