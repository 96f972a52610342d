import math

import numpy as np
import pytest

from pcm_fast.preference import named_experts, resolve_preference

NAMES = ("concise", "friendly", "step_by_step", "very friendly")


def test_nothing_said_activates_all():
    resolved = resolve_preference(None, NAMES)
    assert (resolved.text, resolved.strengths, resolved.active) == ("", None, (0, 1, 2, 3))


def test_text_activates_all_and_is_kept():
    resolved = resolve_preference("  short, please ", NAMES)
    assert (resolved.text, resolved.strengths, resolved.active) == ("short, please", None, (0, 1, 2, 3))


def test_mapping_activates_what_it_gives_a_strength():
    resolved = resolve_preference({"friendly": 0.5, "concise": np.float32(1), "step_by_step": 0}, NAMES)
    assert resolved.active == (0, 1)
    assert resolved.strengths == {"friendly": 0.5, "concise": 1.0, "step_by_step": 0.0}
    assert resolved.text == "concise (1), friendly (0.5)"


def test_equal_strengths_read_as_a_list():
    assert resolve_preference({"friendly": 2, "concise": 2}, NAMES).text == "friendly and concise"
    assert resolve_preference(dict.fromkeys(NAMES[:3], 1), NAMES).text == "concise, friendly and step_by_step"


@pytest.mark.parametrize("preference", [None, "friendly", {"friendly": 1}])
def test_active_overrides(preference):
    assert resolve_preference(preference, NAMES, active=["friendly", "concise"]).active == (0, 1)


@pytest.mark.parametrize(
    "text, named",
    [
        ("concise and friendly", (0, 1)),
        ("Concise, please", (0,)),
        ("explain step by step", (2,)),
        ("explain Step-by-step", (2,)),
        ("be very friendly", (3,)),
        ("very friendly, and friendly too", (1, 3)),
        ("unfriendly conciseness", ()),
        ("not verbose, concise", (0,)),
        ("no nonsense please but be friendly to me and concise", (0, 1)),
    ],
)
def test_names_in_text_are_whole_words(text, named):
    assert named_experts(text, NAMES) == named


@pytest.mark.parametrize("text", ["not concise", "friendly but not too concise", "don't be concise", "non-concise"])
def test_a_denied_name_is_an_error(text):
    with pytest.raises(ValueError, match=r"denies 'concise'.*mapping"):
        named_experts(text, NAMES)


@pytest.mark.parametrize(
    "preference, active, error, message",
    [
        (3, None, TypeError, "preference: expected text, a mapping"),
        (" ", None, ValueError, "preference: expected some text"),
        ({}, None, ValueError, "preference: expected at least one of the experts 'concise', .* got an empty mapping"),
        ({"rude": 1}, None, ValueError, r"preference: expected names of experts \('concise', .*\), got 'rude'"),
        ({"concise": -1}, None, ValueError, "preference: expected a strength >= 0 for 'concise', got -1.0"),
        ({"concise": math.nan}, None, ValueError, "preference: expected a finite number for 'concise', got nan"),
        ({"concise": math.inf}, None, ValueError, "preference: expected a finite number for 'concise', got inf"),
        ({"concise": "much"}, None, TypeError, "preference: expected a number for 'concise', got 'much'"),
        ({"concise": True}, None, TypeError, "preference: expected a number for 'concise', got True"),
        ({"concise": 0}, None, ValueError, "preference: expected a strength above 0 for at least one"),
        (None, "concise", TypeError, "active: expected a sequence of names"),
        (None, [], ValueError, "active: expected at least one"),
        (None, ["rude"], ValueError, "active: expected names of experts .* got 'rude'"),
        (None, ["concise", "concise"], ValueError, "active: expected each expert once"),
        ({"friendly": 1}, ["concise"], ValueError, "asks for 'friendly', which active=.* leaves out"),
    ],
)
def test_bad_preferences(preference, active, error, message):
    with pytest.raises(error, match=message):
        resolve_preference(preference, NAMES, active)
