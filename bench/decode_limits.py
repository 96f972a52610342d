"""Writes the table of docs/performance.md from bench/results/decode.json: the parts of a step beside their limits.

A part cannot take less than reading what it reads from memory at the measured bandwidth, nor less than its operations
at the measured float32 peak. Keys and values are asked for while the products of the layer before are computed, so
attention may come in under its time of reading, and those products over theirs.
"""

import json
from typing import Any

from decode_candidates import EXPERTS, OURS
from decode_mixture import ATTENTION
from decode_traffic import Traffic
from table import ROOT, conditions, table, updated

from pcm_fast.checkpoint import Checkpoint
from pcm_fast.loader import EMBEDDED_MODEL, load_checkpoint

RESULT, PAGE = ROOT / "bench" / "results" / "decode.json", ROOT / "docs" / "performance.md"
SITES = {
    "query, key, value": ("q_proj", "k_proj", "v_proj"),
    "output": ("o_proj",),
    "gate, up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
BFLOAT16 = 2


def work(checkpoint: Checkpoint, rank: int, heads: int, rows: int, positions: int) -> dict[str, tuple[int, int]]:
    """Bytes read and float32 operations of each part; adapters of this rank on the attention sites, in bfloat16."""
    config = checkpoint.config
    assert config is not None
    shapes = config.linear_shapes()
    parts: dict[str, tuple[int, int]] = {}
    shrunk = 0
    for part, sites in SITES.items():
        modules = [module for module in shapes if module.endswith(sites)]
        weights = sum(checkpoint.tensors[f"{module}.weight"].blocks().nbytes for module in modules)
        numbers = sum(shapes[module][0] * shapes[module][1] for module in modules)
        adapted = [shapes[module] for module in modules if module.endswith(("q_proj", "k_proj", "v_proj", "o_proj"))]
        expanded = rank * sum(outputs for outputs, _ in adapted)
        shrunk += rank * sum(inputs for _, inputs in adapted)
        parts[part] = weights + rows * expanded * BFLOAT16, 2 * rows * (numbers + expanded)
    parts["norms, adapters in"] = rows * shrunk * BFLOAT16, 2 * rows * shrunk
    traffic = Traffic(config)
    attention = 4 * positions * config.num_layers * config.num_heads * config.head_dim
    parts["attention"] = traffic.kv_bytes(rows, positions), rows * attention
    head = checkpoint.tensors["model.embed_tokens.weight"].blocks().nbytes
    parts["head"] = head, 2 * heads * traffic.head
    return parts


def limit_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each part of a step with 4 experts and a PCM on GGUF weights, and one for the sum."""
    bandwidth = result["conditions"]["read bandwidth (GB/s)"] * 1e9
    peak = result["conditions"]["float32 peak (GFLOP/s)"] * 1e9
    measured = next(row["parts (ms)"] for row in result["parts"] if row["decoder"] == OURS)
    checkpoint = load_checkpoint(EMBEDDED_MODEL)
    found = work(checkpoint, ATTENTION.rank, EXPERTS, EXPERTS + 1, result["conditions"]["context"])
    rows = []
    for part, milliseconds in measured.items():
        num_bytes, operations = found.get(part, (0, 0))
        reading, computing = num_bytes / bandwidth * 1e3, operations / peak * 1e3
        rows.append(
            {
                "part": part,
                "ms": milliseconds,
                "MB read": num_bytes / 1e6,
                "reading them (ms)": reading,
                "million operations": operations / 1e6,
                "computing them (ms)": computing,
                "the greater limit, share of the time": max(reading, computing) / milliseconds
                if milliseconds
                else None,
            }
        )
    total = {key: sum(row[key] or 0.0 for row in rows) for key in list(rows[0])[1:-1]}
    limit = max(total["reading them (ms)"], total["computing them (ms)"])
    rows.append({"part": "**a step**", **total, list(rows[0])[-1]: limit / total["ms"]})
    return rows


def main() -> None:
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    text = f"{table(limit_rows(result), RESULT)}\n\n{conditions(result['conditions'])}"
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8"), "bench", text), encoding="utf-8")


if __name__ == "__main__":
    main()
