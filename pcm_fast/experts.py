"""Experts: complete next-token models over one vocabulary (no feed-forward blocks of mixture-of-experts layers)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pcm_fast.adapter import Adapter, load_adapter
from pcm_fast.checkpoint import Checkpoint, check_same_vocabulary
from pcm_fast.loader import load_checkpoint

_FORMS = (
    "expected None (the base), the path of a PEFT adapter or of a full model, or a mapping with 'adapter' or 'model' "
    "and 'system'"
)


@dataclass(frozen=True)
class Expert:
    """One expert: the base, an adapter on the base, or a full model of its own; each may have its own system prompt.

    Attributes:
        name: how preferences call it.
        adapter: LoRA adapter on the base, None for the base as it is.
        system: its system prompt, None for none. An expert with one is a *prompted expert*.
        checkpoint: a full fine-tune in place of the base; then there is no adapter.
    """

    name: str
    adapter: Adapter | None = None
    system: str | None = None
    checkpoint: Checkpoint | None = None


def load_experts(
    spec: Mapping[str, str | Path | Mapping[str, Any] | None] | None, base: Checkpoint
) -> tuple[Expert, ...]:
    """Experts from what ``MixtureModel.from_pretrained(experts=...)`` takes; None stands for {"base": None}.

    A path is a PEFT directory if it holds ``adapter_config.json``, and otherwise a full model, in any form that
    ``load_checkpoint`` reads. Something that several experts use is loaded once.

    Raises:
        TypeError, ValueError: a malformed spec; the message names the expert.
        LoadError: a file is missing or malformed, or does not fit the base.
    """
    if spec is None:
        return (Expert("base"),)
    if not isinstance(spec, Mapping):
        raise TypeError(f"experts: expected a mapping from name to expert, got {spec!r}")
    if not spec:
        raise ValueError("experts: expected at least one expert, got an empty mapping")
    adapters: dict[Path, Adapter] = {}
    checkpoints: dict[str, Checkpoint] = {}
    experts = []
    for name, value in spec.items():
        if not isinstance(name, str) or not name.strip() or name != name.strip():
            raise ValueError(f"experts: expected names without surrounding blanks, got {name!r}")
        adapter_path, model, system = _parts(name, value)
        adapter = checkpoint = None
        if adapter_path is not None:
            key = adapter_path.resolve()
            adapter = adapters[key] = adapters.get(key) or _load_adapter(name, adapter_path, base)
        if model is not None:
            checkpoint = checkpoints[model] = checkpoints.get(model) or load_checkpoint(model)
            check_same_vocabulary(base, checkpoint)
        experts.append(Expert(name, adapter, system, checkpoint))
    return tuple(experts)


def _parts(name: str, value: Any) -> tuple[Path | None, str | None, str | None]:
    """Adapter directory, full model and system prompt of one expert; None where it has none."""
    if value is None:
        return None, None, None
    if isinstance(value, (str, Path)):
        return (Path(value), None, None) if _is_adapter(value) else (None, str(value), None)
    if not isinstance(value, Mapping):
        raise TypeError(f"experts[{name!r}]: {_FORMS}, got {value!r}")
    unknown = [key for key in value if key not in ("adapter", "model", "system")]
    if unknown:
        raise ValueError(
            f"experts[{name!r}]: expected the keys 'adapter', 'model' and 'system' only, got {unknown[0]!r}"
        )
    adapter, model, system = (value.get(key) for key in ("adapter", "model", "system"))
    for key, path in (("adapter", adapter), ("model", model)):
        if path is not None and not isinstance(path, (str, Path)):
            raise TypeError(f"experts[{name!r}][{key!r}]: expected a path or None, got {path!r}")
    if adapter is not None and model is not None:
        raise ValueError(f"experts[{name!r}]: expected an adapter or a model, got both")
    if system is not None and not isinstance(system, str):
        raise TypeError(f"experts[{name!r}]['system']: expected text or None, got {system!r}")
    if system is not None and not system.strip():
        raise ValueError(f"experts[{name!r}]['system']: expected some text, got an empty string; None stands for none")
    return None if adapter is None else Path(adapter), None if model is None else str(model), system


def _is_adapter(path: str | Path) -> bool:
    return (Path(path) / "adapter_config.json").is_file()


def _load_adapter(name: str, path: Path, base: Checkpoint) -> Adapter:
    if base.config is None:
        raise ValueError(f"experts[{name!r}]: {path}: an adapter cannot be put on this base: {base.family_reason}")
    return load_adapter(path, base.config)
