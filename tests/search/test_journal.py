"""The journal of a search: an interrupted one goes on where it stopped, and what is not its own is refused."""

import json
import re

import jax
import pytest
from searching import CANDIDATES, search
from small_models import NUM_LAYERS

pytestmark = pytest.mark.usefixtures("oracle_first")


class _Interrupted(Exception):
    pass


def interrupted(layer):
    raise _Interrupted


def test_an_interrupted_search_goes_on_behind_the_last_finished_layer(model, found, tmp_path):
    journal, searched = tmp_path / "journal", []
    journal.touch()  # it was killed before it wrote anything
    with pytest.raises(_Interrupted):
        search(model, journal=journal, finished=interrupted)
    with journal.open("a") as file:  # the next line was being written
        file.write('{"layer": 1, "candid')
    again = search(model, journal=journal, finished=lambda layer: searched.append(layer.layer))
    assert searched == [1]
    assert again == found
    assert search(model, journal=journal, finished=interrupted) == found  # nothing is left to do
    assert len(journal.read_text().splitlines()) == 1 + NUM_LAYERS


@pytest.fixture
def journal(model, tmp_path):
    """That of a search that was interrupted behind its first layer."""
    path = tmp_path / "journal"
    with pytest.raises(_Interrupted):
        search(model, journal=path, finished=interrupted, candidates=CANDIDATES[:1])
    return path


def with_fields(*place, **changes):
    """What changes a field of a line, or of its first result."""

    def change(fields):
        inner = fields
        for one in place:
            inner = inner[one]
        inner |= changes
        return fields

    return change


RESULT = ("candidates", 0)


@pytest.mark.parametrize(
    ("line", "change", "sentence"),
    [
        (0, "[1]", 'without "format": "minference-jax/search" in its first line it is not the journal of a search'),
        (0, '{"format": "other"}', 'without "format": "minference-jax/search" in its first line'),
        (0, with_fields(version=3), "version 3 needs a newer minference-jax"),
        (0, with_fields(version=1), "version 1 is of an older minference-jax, this one goes on with 2 only: remove it"),
        (1, '{"layer": 0, "candidates": [{}]}', "line 2: missing field 'output_norms'"),
        (1, with_fields(more=1), "line 2: unknown field 'more'"),
        (1, with_fields(layer=7), "line 2: layer=7 must be 0"),
        (1, "{", "line 2: not JSON"),
        (1, with_fields(output_norms=[1.0]), "line 2: output_norms=[1.0] must be a list of 4 entries, each a finite"),
        (1, with_fields(output_norms="a"), "line 2: output_norms='a' must be a list"),
        (1, with_fields(candidates=[]), "line 2: it has 0 results, the settings ask for 1"),
        (1, with_fields(*RESULT, budget=0.5), "line 2: budget=0.5 stands where the settings have 0.7"),
        (1, with_fields(*RESULT, candidate={"kind": "dense"}), "line 2: candidate={'kind': 'dense'} stands where"),
        (
            1,
            with_fields(*RESULT, cost=[None] * 4),
            "line 2: cost must be null where there is no pattern, and nowhere else",
        ),
        (
            1,
            with_fields(*RESULT, error=[-0.1] * 4),
            "line 2: error=[-0.1, -0.1, -0.1, -0.1] must be a list",
        ),
        (1, with_fields(*RESULT, cost=[-1] * 4), "each a finite number of at least 0 or null"),
        (1, with_fields(*RESULT, density=[-1] * 4), "line 2: density=[-1, -1, -1, -1] must be"),
        (1, with_fields(output_norms=[-1.0] * 4), "line 2: output_norms=[-1.0, -1.0, -1.0, -1.0] must be"),
        (1, with_fields(*RESULT, error=["x"] * 4), "line 2: error=['x', 'x', 'x', 'x'] must be a list of 4 entries"),
        (
            1,
            with_fields(*RESULT, patterns=[{"kind": "a_shape"}] * 4),
            "line 2: missing field 'sink_size', 'window_size'",
        ),
        (1, with_fields(*RESULT, "patterns", 0, kind="dense"), "line 2: kind='dense' must be 'a_shape'"),
        (1, with_fields(*RESULT, "patterns", 0, sink_size=0), "line 2: sink_size=0 must be from 1 to"),
        (1, '{"layer": 0, "candidates": [], "output_norms": [NaN]}', "line 2: not JSON: NaN is no number"),
    ],
)
def test_a_damaged_or_foreign_journal_is_refused_in_a_sentence(model, journal, line, change, sentence):
    lines = journal.read_text().splitlines()
    lines[line] = change if isinstance(change, str) else json.dumps(change(json.loads(lines[line])))
    journal.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=f"journal: .*{re.escape(sentence)}"):
        search(model, journal=journal, candidates=CANDIDATES[:1])


def test_a_layer_more_than_the_model_has_is_refused(model, journal):
    head, layer = (json.loads(line) for line in journal.read_text().splitlines())
    lines = [head, *(layer | {"layer": index} for index in range(NUM_LAYERS + 1))]
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match="line 4: the model has 2 layers, and this is one more"):
        search(model, journal=journal, candidates=CANDIDATES[:1])


def test_a_journal_of_another_search_or_of_other_weights_is_refused(model, journal, monkeypatch):
    with pytest.raises(ValueError, match=r"a search with other settings \(budgets\[0\]: 0.7 there, 0.6 here\): remove"):
        search(model, journal=journal, candidates=CANDIDATES[:1], budget=0.6)
    with monkeypatch.context() as patched:
        patched.setattr(model, "_state", jax.tree.map(lambda x: x + 0.5, model._state))
        with pytest.raises(ValueError, match=r"other settings \(weights: '[0-9a-f]{16}' there, '[0-9a-f]{16}' here\)"):
            search(model, journal=journal, candidates=CANDIDATES[:1])
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    lines[1]["output_norms"][0] *= 1.5
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match="layer 0 gives other outputs than when the search began"):
        search(model, journal=journal, candidates=CANDIDATES[:1])
