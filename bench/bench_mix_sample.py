"""ops.mix_sample against the composition of torch operations that it replaces: `pytest bench/bench_mix_sample.py`.

Both get the same logits, K = 4 experts, float32, top_p = 0.9, one row. The logits are those of the embedded model under
four system prompts ("real"), or normal with the standard deviation in the name. Writes bench/results/mix_sample.json.
"""

import collections
import json
import statistics
from pathlib import Path

import pytest
import torch
from composition import composition
from machine import conditions, read_bandwidth

from pcm_fast import ops
from pcm_fast.model import MixtureModel
from pcm_fast.presets import prompted_experts

THREADS = 2
TURNS = 15
TOP_P = 0.9
RESULT = Path(__file__).parent / "results" / "mix_sample.json"
CASES = [(49_152, "real"), (49_152, "normal 1"), (49_152, "normal 4"), (262_144, "normal 1"), (262_144, "normal 4")]


@pytest.fixture(scope="module")
def real_logits():
    model = MixtureModel.from_pretrained("smollm2-135m-instruct", experts=prompted_experts(), backend="reference")
    prompt = model.tokenizer.apply_chat_template([{"role": "user", "content": "Why does the sea have tides?"}])
    rows = [model.log_probs([prompt], preference={name: 1.0})[0, -1] for name in model.expert_names[:4]]
    return torch.stack([torch.as_tensor(row) for row in rows])[None]


@pytest.fixture(scope="module")
def stats():
    """Median seconds of every turn, by (vocabulary, data, candidate); written down when all are there."""
    measured = collections.defaultdict(list)
    yield measured
    if sum(map(len, measured.values())) < 2 * len(CASES) * TURNS:
        return
    bandwidth = read_bandwidth(THREADS)
    rows = []
    for vocabulary, data in CASES:
        times = [measured[vocabulary, data, candidate] for candidate in ("pcm-fast", "torch")]
        ours, composed = map(statistics.median, times)
        ratios = [theirs / our for our, theirs in zip(*times, strict=True)]
        limit = 4 * 4 * vocabulary / bandwidth
        rows.append(
            {
                "vocabulary": vocabulary,
                "logits": data,
                "torch (us)": composed * 1e6,
                "pcm-fast (us)": ours * 1e6,
                "times faster": statistics.median(ratios),
                "lowest and highest turn": f"{min(ratios):.1f} to {max(ratios):.1f}",
                "one read of the logits from memory (us)": limit * 1e6,
                "share of that bandwidth": limit / ours,
            }
        )
    result = {
        "name": "Merge and sample one token: 4 experts, float32, top_p 0.9, one row (medians)",
        "conditions": {
            **conditions(THREADS),
            "turns, the two in alternation": TURNS,
            "read bandwidth (GB/s)": bandwidth / 1e9,
        },
        "rows": rows,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        print(row)


@pytest.mark.parametrize("candidate", ["torch", "pcm-fast"])
@pytest.mark.parametrize(("vocabulary", "data"), CASES)
@pytest.mark.parametrize("turn", range(TURNS))
def test_mix_sample(benchmark, stats, real_logits, turn, vocabulary, data, candidate):
    generator = torch.Generator().manual_seed(0)
    if data == "real":
        logits = real_logits
        assert logits.shape[-1] == vocabulary
    else:
        logits = torch.randn(1, 4, vocabulary, generator=generator) * float(data.split()[1])
    weights = torch.full((1, 4), 0.25)
    torch.set_num_threads(THREADS)
    benchmark.group = f"V={vocabulary} {data}"
    if candidate == "torch":
        benchmark.pedantic(composition, (logits, weights, TOP_P, generator), rounds=20, warmup_rounds=3)
    else:
        run = {"top_p": TOP_P, "num_threads": THREADS}
        benchmark.pedantic(ops.mix_sample, (logits, weights), run, rounds=200, warmup_rounds=20)
    stats[vocabulary, data, candidate].append(statistics.median(benchmark.stats.stats.data))
