"""The Preference Control Model: from a preference and the text so far to one weight per expert.

There are five kinds, and no more structure to them than this:

=============  ======================================  ==================================================
kind           ``from_pretrained(..., pcm=...)``       weights over the active experts
=============  ======================================  ==================================================
NamedPCM       nothing, or ``"named"``                 from the names and strengths in the preference
UniformPCM     ``"uniform"``                           the same for all
FixedPCM       ``{"concise": 0.7, "friendly": 0.3}``   the mapping
CallablePCM    a function of a PCMContext              whatever it answers, asked at every token
LearnedPCM     a directory                             softmax(head(hidden state)) of a language model
=============  ======================================  ==================================================

The first three know their weights before the first token (``static_weights``), and an expert whose weight is 0 is then
not run at all. A learned PCM is run by the backend, as one more row beside the experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pcm_fast.adapter import Adapter
from pcm_fast.checkpoint import Checkpoint
from pcm_fast.preference import ResolvedPreference, check_numbers, named_experts
from pcm_fast.sampling import MergeRule

Float32 = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int64]

NO_PREFERENCE = "no particular preference"  # what a learned PCM reads where there is none


@dataclass(frozen=True, slots=True)
class PCMContext:
    """What a callable PCM is shown before every token of a batch of B sequences.

    The reference backend shows it all rows of a call at once; the native one shows them one by one (B = 1), since each
    goes on at its own pace.

    Attributes:
        preference: the preference; ``.text``, ``.strengths`` and ``.active`` (indices of the active experts).
        expert_names: names of all K experts, in the order of the weights.
        prompts: B arrays int64, the token ids of each prompt without padding.
        generated: B arrays int64 [step], the tokens generated so far; after the end of its sequence a row repeats the
            pad token.
        step: number of tokens generated so far, 0 before the first.
        rows: which rows of the request the B sequences are.
    """

    preference: ResolvedPreference
    expert_names: tuple[str, ...]
    prompts: tuple[Tokens, ...]
    generated: tuple[Tokens, ...]
    step: int
    rows: tuple[int, ...] = ()


PCMFunction = Callable[[PCMContext], npt.ArrayLike | Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class NamedPCM:
    """Weights by name: a mapping's strengths normalised; equal weights for the experts that free text names."""


@dataclass(frozen=True, slots=True)
class UniformPCM:
    """The same weight for every active expert."""


@dataclass(frozen=True, slots=True)
class FixedPCM:
    """Weights that depend on nothing; experts that are not in the mapping have weight 0."""

    weights: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class CallablePCM:
    """Weights from a function, called before every token with a PCMContext.

    It returns a mapping from expert to weight for all rows, or an array [K] for all rows or [B, K], K counting all
    experts. Weights are finite, and not negative unless merge="log_linear". Under the other rules they are divided by
    their sum.
    """

    function: PCMFunction


@dataclass(frozen=True)
class LearnedPCM:
    """A language model with a linear head: weights = softmax over the active experts of ``weight @ hidden + bias``.

    ``hidden`` is the model's last hidden state (after its final norm) at the last token of its context: the preference
    in words ahead of the conversation, then the answer so far.

    Attributes:
        kind: "shared": an adapter on the base the experts share; "separate": a small model of its own, with the base's
            vocabulary.
        experts: the K names, in the order of the head's rows.
        template: the system turn put ahead of the conversation, with "{preference}" where the preference goes.
        weight: [K, d] float32, d the hidden size of the model.
        bias: [K] float32.
        adapter: of a shared PCM; None is the base as it is.
        checkpoint: of a separate PCM.
    """

    kind: Literal["shared", "separate"]
    experts: tuple[str, ...]
    template: str
    weight: Float32
    bias: Float32
    adapter: Adapter | None = None
    checkpoint: Checkpoint | None = None

    def for_experts(self, expert_names: Sequence[str]) -> LearnedPCM:
        """The same PCM with the rows of its head in the order of expert_names; ValueError for one it does not know."""
        unknown = [name for name in expert_names if name not in self.experts]
        if unknown:
            known = ", ".join(map(repr, self.experts))
            raise ValueError(f"pcm: this PCM was trained for the experts {known}; it has no weight for {unknown[0]!r}")
        rows = [self.experts.index(name) for name in expert_names]
        return replace(self, experts=tuple(expert_names), weight=self.weight[rows], bias=self.bias[rows])

    def system_turn(self, preference: ResolvedPreference) -> str:
        """The template with the preference filled in, or ``NO_PREFERENCE`` where there is none."""
        return self.template.replace("{preference}", preference.text or NO_PREFERENCE)

    def weights(self, hidden: Float32, active: Sequence[int]) -> Float32:
        """Mixture weights [..., K] for hidden states [..., d]: exactly 0 outside active, which sums to 1."""
        columns = list(active)
        # No matrix product: what one row gets from that may depend on how many there are.
        products = hidden.astype(np.float32)[..., None, :] * self.weight[columns]
        scores = products.sum(axis=-1) + self.bias[columns]
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights = np.zeros((*hidden.shape[:-1], len(self.experts)), dtype=np.float32)
        weights[..., columns] = scores / scores.sum(axis=-1, keepdims=True)
        return weights


PCM = NamedPCM | UniformPCM | FixedPCM | CallablePCM | LearnedPCM


def static_weights(
    pcm: PCM, preference: ResolvedPreference, expert_names: Sequence[str], rule: MergeRule
) -> Float32 | None:
    """Mixture weights [K] that hold for the whole request, or None if they depend on the text so far.

    Raises:
        ValueError: a preference in words that names no active expert; no active expert with a weight other than 0; a
            negative weight under another rule than log_linear.
    """
    if isinstance(pcm, (CallablePCM, LearnedPCM)):
        return None
    raw = np.zeros(len(expert_names))
    if isinstance(pcm, FixedPCM):
        for name, weight in pcm.weights.items():
            raw[list(expert_names).index(name)] = weight
    elif isinstance(pcm, NamedPCM) and preference.strengths is not None:
        for name, strength in preference.strengths.items():
            raw[list(expert_names).index(name)] = strength
    elif isinstance(pcm, NamedPCM) and preference.text:
        named = named_experts(preference.text, expert_names)
        if not set(named) & set(preference.active):
            raise ValueError(
                f"preference: {preference.text!r} names none of the active experts "
                f"({', '.join(repr(expert_names[i]) for i in preference.active)}); name one, give a mapping such as "
                f"{{{expert_names[preference.active[0]]!r}: 1.0}}, or load the model "
                "with pcm='uniform' or a learned PCM"
            )
        raw[list(named)] = 1.0
    else:
        raw[list(preference.active)] = 1.0
    normalised = isinstance(pcm, (NamedPCM, UniformPCM)) or rule.kind != "log_linear"
    rows = _restrict("pcm", raw[None], preference.active, expert_names, rule, normalised)
    return np.asarray(rows[0])


def called_weights(pcm: CallablePCM, context: PCMContext, rule: MergeRule) -> Float32:
    """Mixture weights [B, K] from the user's function, checked; entries of inactive experts become 0."""
    answer = pcm.function(context)
    names, rows = context.expert_names, len(context.prompts)
    if isinstance(answer, Mapping):
        numbers = check_numbers("pcm: the callable's answer", answer, names)
        raw = np.array([numbers.get(name, 0.0) for name in names])
    else:
        raw = _numbers(answer)
    if raw.shape not in ((len(names),), (rows, len(names))):
        raise ValueError(
            f"pcm: expected the callable to return a mapping, an array of shape [{len(names)}] or one of shape "
            f"[{rows}, {len(names)}], got shape {list(raw.shape)}"
        )
    raw = np.broadcast_to(raw, (rows, len(names)))
    return _restrict(
        "pcm: the callable's answer", raw, context.preference.active, names, rule, normalised=rule.kind != "log_linear"
    )


def load_pcm(source: Any, expert_names: Sequence[str], base: Checkpoint) -> PCM:
    """A PCM from what ``from_pretrained(pcm=...)`` takes: a name, a mapping, a callable, a directory, a PCM or None.

    Raises:
        TypeError, ValueError: it is none of these, or does not fit the experts or the base.
    """
    if source is None or (isinstance(source, str) and source == "named"):
        return NamedPCM()
    if isinstance(source, LearnedPCM):
        return source.for_experts(expert_names)
    if isinstance(source, FixedPCM):
        source = source.weights
    if isinstance(source, (NamedPCM, UniformPCM, CallablePCM)):
        return source
    if isinstance(source, Mapping):
        return FixedPCM(check_numbers("pcm", source, expert_names))
    if isinstance(source, str) and source == "uniform":
        return UniformPCM()
    if isinstance(source, (str, Path)):
        from pcm_fast.pcm_file import read_pcm

        return read_pcm(Path(source), base).for_experts(expert_names)
    if callable(source):
        return CallablePCM(source)
    raise TypeError(
        f"pcm: expected None, 'named', 'uniform', a mapping from expert to weight, a callable or a directory, "
        f"got {source!r}"
    )


def _restrict(
    argument: str,
    raw: npt.NDArray[np.float64],
    active: Sequence[int],
    expert_names: Sequence[str],
    rule: MergeRule,
    normalised: bool,
) -> Float32:
    """Weights [B, K] float32 from raw numbers: checked, 0 outside active, divided by their sum if normalised."""
    if not np.isfinite(raw).all():
        raise ValueError(f"{argument}: expected finite weights, got {raw[~np.isfinite(raw).all(axis=1)][0].tolist()}")
    if rule.kind != "log_linear" and (raw < 0).any():
        row = raw[(raw < 0).any(axis=1)][0]
        raise ValueError(f"{argument}: expected weights >= 0 under merge={rule.kind!r}, got {row.tolist()}")
    weights = np.zeros_like(raw)
    weights[:, list(active)] = raw[:, list(active)]
    if not (weights != 0).any(axis=1).all():
        names = ", ".join(repr(expert_names[i]) for i in active)
        raise ValueError(
            f"{argument}: expected a weight other than 0 for one of the active experts ({names}), got none"
        )
    if normalised:
        weights = weights / weights.sum(axis=1, keepdims=True)
    return weights.astype(np.float32)


def _numbers(answer: Any) -> npt.NDArray[np.float64]:
    """An array of the callable's answer, torch tensors on any device included."""
    if hasattr(answer, "detach"):
        answer = answer.detach().cpu().double().numpy()  # double: NumPy has no bfloat16
    try:
        return np.asarray(answer, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"pcm: expected the callable to return numbers, got {answer!r}") from None
