"""Generated prompts for the search."""

import json
import re
from pydoc_data.topics import topics

import pytest

from minference_jax import calibration_prompts
from minference_jax.search import manual_prompt, retrieval_prompt


def test_generated_prompts_fill_the_length_and_ask_for_what_is_there(model):
    retrieval, manual, another, _ = calibration_prompts(model, 400, count=4)
    for prompt in (retrieval, manual):
        assert 400 - 100 < len(prompt) <= 400
    text = model.tokenizer.decode(retrieval)
    object_ = json.loads(text[text.index("{") : text.index("}") + 1])
    key = text.rpartition('the key "')[2].partition('"')[0]
    assert key in object_
    text, _, question = model.tokenizer.decode(manual).rpartition("\n\n")
    topic = question.partition("about ")[2].partition(",")[0]
    assert topics[topic].splitlines()[1] in text
    assert len(re.findall(r"\nThe number of this manual is \d{7}\.\n", text)) == 1
    assert question.startswith("What does")
    assert "what is the number of this manual?" in question
    assert calibration_prompts(model, 400) == [retrieval, manual]
    assert calibration_prompts(model, 400, count=1, seed=1) == [another] != [retrieval]
    assert max(map(len, calibration_prompts(model))) <= model.config.max_length
    for prompt_of in (retrieval_prompt, manual_prompt):
        with pytest.raises(ValueError, match="longer than the 512 that the model can read"):
            prompt_of(model, 513)
        with pytest.raises(ValueError, match="a calibration prompt: length=20 is too short"):
            prompt_of(model, 20)
    with pytest.raises(ValueError, match="count=0 must be 1 or more"):
        calibration_prompts(model, count=0)
