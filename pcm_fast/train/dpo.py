"""Direct preference optimisation of a LoRA adapter, by trl (arXiv 2305.18290)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from pcm_fast.adapter import WEIGHTS_NAME
from pcm_fast.checkpoint import Checkpoint
from pcm_fast.tokenizer import Tokenizer
from pcm_fast.train.config import ExpertConfig
from pcm_fast.train.pairs import Pair
from pcm_fast.transformers_model import build_model

Advance = Callable[[int, dict[str, float]], None]


def train_adapter(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    pairs: Sequence[Pair],
    config: ExpertConfig,
    seed: int,
    work: Path,
    output: Path,
    advance: Advance,
    start: Path | None = None,
) -> list[dict[str, float]]:
    """Train an adapter on pairs of answers and write it, in bfloat16, as a PEFT directory.

    Args:
        checkpoint: the base.
        tokenizer: the base's.
        pairs: what to learn from. The answers' ``likelihood`` is that of the reference, so that the base is not run
            again.
        config: of the adapter and the optimiser.
        seed: of the order of the pairs and the adapter's first values.
        work: for the trainer's checkpoints; training goes on from the last of them.
        output: where the adapter goes.
        advance: called with the step and the trainer's figures.
        start: directory of an adapter of that shape to go on from; None: a new one.

    Returns:
        The trainer's figures, step by step.
    """
    torch.manual_seed(seed)
    lora = LoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=list(config.modules), task_type="CAUSAL_LM"
    )
    steps = max(1, round(len(pairs) * config.epochs / config.batch_size))
    losses = {"sigmoid": 1.0, "sft": config.sft_weight}
    options = DPOConfig(
        output_dir=str(work),
        per_device_train_batch_size=config.batch_size,
        max_steps=steps,
        learning_rate=config.learning_rate,
        warmup_steps=round(config.warmup * steps),
        lr_scheduler_type="cosine",
        beta=config.beta,
        loss_type=[name for name, weight in losses.items() if weight],
        loss_weights=[weight for weight in losses.values() if weight],
        max_length=None,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        seed=seed,
        data_seed=seed,
        logging_steps=5,
        save_steps=20,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    text_tokenizer = _transformers_tokenizer(tokenizer)
    reports = Reports(advance)
    trainer = DPOTrainer(
        model=build_model(checkpoint),
        peft_config=lora,
        args=options,
        data_collator=PairCollator(text_tokenizer.pad_token_id),
        train_dataset=_dataset(tokenizer, pairs),
        processing_class=text_tokenizer,
        callbacks=[reports],
    )
    # The collator brings the reference's log-likelihoods, which trl would otherwise compute anew.
    trainer.precompute_ref_logps = True
    if start is not None:
        before = {name: value.float() for name, value in load_file(start / WEIGHTS_NAME).items()}
        unexpected = set_peft_model_state_dict(trainer.model, before).unexpected_keys
        assert not unexpected, unexpected
    resumed = any(work.glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=resumed or None)
    trainer.model.save_pretrained(str(output))
    weights = output / WEIGHTS_NAME
    factors = {
        name: (value * config.scale if "lora_B" in name else value).bfloat16()
        for name, value in load_file(weights).items()
    }
    save_file(factors, weights, {"format": "pt"})
    for leftover in output.glob("README.md"):
        leftover.unlink()
    return list(trainer.state.log_history)


class PairCollator:
    """trl's collator, given the tokens that were drawn in place of the tokens that trl makes of their text.

    trl ends every answer, also one that was cut off at its last token, and a text may be cut into tokens in many ways.
    """

    def __init__(self, pad_token_id: int) -> None:
        self._collate = DataCollatorForPreference(pad_token_id=pad_token_id)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch as DPOTrainer takes it."""
        drawn = [
            {
                "prompt_ids": example["prompt_tokens"],
                "chosen_ids": example["chosen_tokens"],
                "rejected_ids": example["rejected_tokens"],
                "ref_chosen_logps": example["reference_chosen"],
                "ref_rejected_logps": example["reference_rejected"],
            }
            for example in examples
        ]
        batch: dict[str, Any] = self._collate(drawn)
        return batch


class Reports(TrainerCallback):  # type: ignore[misc]
    """Tells ``advance`` of every step; trl asks for a subclass."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **rest: Any) -> None:
        """Figures are there."""
        self._advance(state.global_step, dict(logs or {}))

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """A step is done."""
        self._advance(state.global_step, {})


def _dataset(tokenizer: Tokenizer, pairs: Sequence[Pair]) -> Dataset:
    rows = []
    for pair in pairs:
        turns = [{"role": "user", "content": pair.prompt}]
        rows.append(
            {
                "prompt": tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False),
                "chosen": pair.chosen.text,
                "rejected": pair.rejected.text,
                "prompt_tokens": tokenizer.apply_chat_template(turns, add_generation_prompt=True),
                "chosen_tokens": pair.chosen.tokens,
                "rejected_tokens": pair.rejected.tokens,
                "reference_chosen": pair.chosen.likelihood,
                "reference_rejected": pair.rejected.likelihood,
            }
        )
    return Dataset.from_list(rows)


def _transformers_tokenizer(tokenizer: Tokenizer) -> Any:
    special = dict(tokenizer.special_tokens)
    special.setdefault("pad_token", special["eos_token"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, **special)
