"""Greedy answers on real weights: fifty times the text of the reference, from GGUF blocks and in float32."""

import numpy as np
import pytest

from pcm_fast import MixtureModel, reference
from pcm_fast.experts import Expert
from pcm_fast.pcm import UniformPCM
from pcm_fast.spec import ModelSpec

NEW_TOKENS = 64
TOPICS = (
    "tides bees glaciers violins chess volcanoes bread moonlight whales paper coffee earthquakes pianos rain cheese "
    "maps bicycles owls rivers glass stocks dreams salt printing penguins thunder soap libraries hearts rice "
    "magnets lighthouses spiders alphabets tea bridges forests compasses yeast clouds sleep guitars potatoes comets "
    "silk telephones ants deserts honey windmills"
)


@pytest.fixture(scope="module")
def setting(embedded_checkpoint, random_adapter):
    """Two adapters, fifty prompts, and what the reference answers."""
    config = embedded_checkpoint.config
    experts = (
        Expert("one", random_adapter(config, rank=8, seed=1, size=0.2)),
        Expert("two", random_adapter(config, rank=16, seed=2, size=0.2)),
    )
    spec = ModelSpec(embedded_checkpoint, experts, UniformPCM())
    tokenizer = embedded_checkpoint.tokenizer
    turns = [[{"role": "user", "content": f"Tell me something about {topic}."}] for topic in TOPICS.split()]
    prompts = [list(tokenizer.apply_chat_template(turn, add_generation_prompt=True)) for turn in turns]
    assert len(prompts) == 50
    options = {
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "return_dict_in_generate": True,
    }
    return spec, prompts, options, reference.generate(spec, prompts, **options)


@pytest.mark.parametrize("weights", ["gguf", "float32"])
def test_fifty_answers_are_those_of_the_reference(setting, weights):
    spec, prompts, options, expected = setting
    ours = MixtureModel(spec, backend="native", weights=weights).generate(prompts, **options)
    start = expected.sequences.shape[1] - expected.logprobs.shape[1]
    for row in range(len(prompts)):
        length = int(expected.lengths[row])
        theirs, mine = (output.sequences[row, start : start + length] for output in (expected, ours))
        different = np.flatnonzero(theirs != mine)
        if len(different) == 0:
            assert ours.lengths[row] == length
            continue
        # Only a tie may part them: both tokens are about as likely, each where it was chosen.
        first = different[0]
        assert abs(expected.logprobs[row, first] - ours.logprobs[row, first]) < 1e-3, (row, first)
