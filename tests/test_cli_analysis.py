"""`minference-jax search` and `inspect`: what they print and write, and what they refuse."""

import json
import re
import sys

import numpy as np
import pytest
from small_models import NUM_HEADS, NUM_LAYERS, write_model

from minference_jax import AShape, VerticalSlash, calibration_prompts, load, read_patterns, search_patterns
from minference_jax.cli import main, search_command
from minference_jax.cli.values import head_pattern
from minference_jax.patterns import uniform_patterns
from minference_jax.search import CandidateResult, LayerResult, SearchResult, compare

TEXT = "The quick brown fox jumps over the lazy dog while it rains on the plain. " * 6
SEARCH = (
    "search out.json --model MODEL --candidates a_shape:1,4 vertical_slash:4,1 --budget 0.75 --levels 1 --length 450"
)
pytestmark = pytest.mark.usefixtures("oracle_first")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "hf")


@pytest.fixture
def run(model, tmp_path, monkeypatch, capsys):
    """Runs the command line in an empty folder; gives exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT[:430])
    (tmp_path / "empty.txt").write_text(" ")
    (tmp_path / "folder.png").mkdir()

    def runs(command, *more):
        words = [str(model) if word == "MODEL" else word for word in (*command.split(), *more)]
        code = main(words)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    runs.model, runs.folder = model, tmp_path
    return runs


def test_search_writes_what_it_found_in_both_formats_and_says_so(run, model, tmp_path):
    code, out, err = run(SEARCH, "--published", "published.json")
    assert (code, err) == (0, "")
    patterns = read_patterns(tmp_path / "out.json")
    patterns.check(NUM_LAYERS, NUM_HEADS)
    assert (patterns.model, patterns.score_direction) == (str(model), "lower_is_better")
    assert read_patterns(tmp_path / "published.json").layers == patterns.layers
    first, *lines = out.splitlines()
    assert re.match(r"reads 2 prompts of up to 4\d\d tokens; activations take ", first)
    for index in range(NUM_LAYERS):
        assert lines[index].startswith(f"layer {index:3}: error ")
    assert "a_shape 1 4" in out
    assert lines[-1] == "written to out.json; what was compared is in out.json.journal"
    code, out, err = run(SEARCH)
    assert (code, out) == (2, "")
    assert "out.json exists: name another file, or give --overwrite" in err
    code, out, _ = run(f"{SEARCH} --overwrite --published published.json")
    assert code == 0
    assert out.splitlines()[1:] == lines
    assert sorted(path.name for path in tmp_path.glob("*.json*")) == ["out.json", "out.json.journal", "published.json"]
    code, out, err = run("prefill --model MODEL --pattern out.json --prompt hello --repeats 1 --json")
    assert re.fullmatch(
        r"out\.json \(search at 0.75 of dense attention's tiles on 2 prompts of up to 4\d\d tokens\)",
        json.loads(out)["pattern"],
    )


def test_patterns_of_another_model_or_granularity_are_said_or_refused(run, tmp_path):
    head = {"kind": "vertical_slash", "vertical_size": 30, "slash_size": 50}
    facts = {"format": "minference-jax/patterns", "version": 1, "model": "some/Other", "source": "a search"}
    facts |= {"slash_granularity": "block", "layers": [[head] * NUM_HEADS] * NUM_LAYERS}
    (tmp_path / "p.json").write_text(json.dumps(facts))
    wanted, said = "--prompt hello --pattern p.json --json", "p.json (a search), searched for some/Other"
    prefill, inspect = f"prefill --model MODEL {wanted} --repeats 1", f"inspect --model MODEL {wanted} --no-time"
    for command in (prefill, inspect):
        code, out, _ = run(f"{command} --slash-granularity block")
        assert (code, json.loads(out)["pattern"]) == (0, said)
    evaluate = "evaluate perplexity --model MODEL --text text.txt --lengths 128 --attentions found=p.json"
    code, _, err = run(f"{evaluate} --slash-granularity block")
    assert (code, err) == (0, f"found: {said}\n")
    assert run("patterns check p.json --model MODEL")[1].endswith("searched for some/Other, slash granularity block\n")
    for command in (prefill, inspect, evaluate, f"generate --model MODEL {wanted.removesuffix(' --json')}"):
        code, out, err = run(command)
        assert (code, out) == (2, "")
        assert "searched for slash_granularity='block', the call asks for 'line': give" in err
    (tmp_path / "p.json").write_text(json.dumps(facts | {"model": f"elsewhere/{run.model.name}"}))
    assert "searched for" not in run("patterns check p.json --model MODEL")[1]


@pytest.mark.parametrize("more", [[], ["--overwrite"]], ids=["new", "overwrite"])
def test_an_interrupted_search_goes_on_with_the_same_command(run, monkeypatch, tmp_path, more):
    old = {"out.json": "an older answer", "out.json.journal": "and its journal"} if more else {}
    for name, text in old.items():
        (tmp_path / name).write_text(text)

    def stops(*args, finished, **options):
        def first_only(layer):
            finished(layer)
            raise KeyboardInterrupt

        return search_patterns(*args, finished=first_only, **options)

    with monkeypatch.context() as patch:
        patch.setattr(search_command, "search_patterns", stops)
        code, out, err = run(SEARCH, *more)
    assert code == 130
    assert out.splitlines()[1].startswith("layer   0: ")
    assert err == "interrupted: the same command goes on behind the last finished layer\n"
    assert (tmp_path / "out.json").exists() == bool(more)
    assert {name: (tmp_path / name).read_text() for name in old} == old  # nothing is lost
    code, out, err = run(SEARCH, "--progress", *more)
    assert code == 0
    assert out.splitlines()[1].startswith("layer   1: ")
    assert "layer 1, a_shape" in err
    assert len(read_patterns(tmp_path / "out.json").layers) == NUM_LAYERS
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.json", "out.json.journal"]


def test_an_older_answer_stays_where_the_arguments_of_an_overwriting_search_are_refused(run, tmp_path):
    old = {"out.json": "an older answer", "out.json.journal": "and its journal"}
    for name, text in old.items():
        (tmp_path / name).write_text(text)
    for wrong in (["--budget", "0.6", "--levels", "2"], ["--levels", "1.1"], ["--implementation", "abacus"]):
        code, _, _ = run(f"{SEARCH} --overwrite", *wrong)
        assert code == 2
        assert {path.name: path.read_text() for path in tmp_path.glob("out*")} == old


def test_search_hands_on_levels_cost_granularity_and_the_generated_prompts(run, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "dense_milliseconds", lambda layer: float(NUM_HEADS))
    monkeypatch.setattr(compare, "head_milliseconds", lambda *_: np.full(NUM_HEADS, 0.3))
    options = "--candidates vertical_slash:30,50 --levels 0.8 1.2 --budget 0.7 --cost time --slash-granularity block"
    prompts = "--num-prompts 3 --seed 5 --length 450"
    code, out, err = run(f"search t.json --model MODEL {options} {prompts} --no-chat-template")
    assert (code, err) == (0, "")
    assert out.startswith("reads 3 prompts of up to ")
    assert "vertical_slash 30 50 at 0.84" in out
    settings = json.loads((tmp_path / "t.json.journal").read_text().splitlines()[0])["settings"]
    assert settings["budgets"] == [0.7 * 0.8, 0.7 * 1.2]
    assert (settings["cost"], settings["slash_granularity"]) == ("time", "block")
    told = load(run.model)
    plain = calibration_prompts(told, 450, count=3, seed=5, chat=False)
    assert settings["prompt_lengths"] == [len(prompt) for prompt in plain]
    assert told.tokenizer.decode(plain[0]).startswith("This JSON object")
    assert told.tokenizer.decode(calibration_prompts(told, 450, seed=5)[0]).startswith("[user] This JSON object")


def test_the_line_of_a_layer_that_alone_is_above_the_budget_says_what_it_costs_at_least():
    a_shape = AShape(sink_size=1, window_size=4)
    results = [CandidateResult(a_shape, 0.8, (a_shape,), (cost,), (cost,), (0.1,)) for cost in (0.9, 0.8)]
    assert "cost 0.800" in search_command.line(LayerResult(0, tuple(results), (1.0,)), 0.4)


def test_search_takes_prompts_from_files(run, tmp_path):
    (tmp_path / "more.txt").write_text(TEXT[5:420])
    options = (
        "search f.json --model MODEL --candidates a_shape:1,4 --budget 0.75 --levels 1 --prompt-file text.txt more.txt"
    )
    code, _, err = run(options, "--question", "Why?", "--max-prompt-tokens", "400")
    assert (code, err) == (0, "")
    header = json.loads((tmp_path / "f.json.journal").read_text().splitlines()[0])
    asked = "\n\n---\n\nQuestion about the text above: Why?"
    lengths = [len(f"[user] {text.rstrip()}{asked}>") for text in (TEXT[:400], TEXT[5:405])]
    assert header["settings"]["prompt_lengths"] == lengths
    assert {type(head) for row in read_patterns(tmp_path / "f.json").layers for head in row} == {AShape}


INSPECT = "inspect --model MODEL --prompt-file text.txt --attention a_shape --sink-size 2 --window-size 70 --no-time"


def test_inspect_gives_every_head_and_the_passages_as_json(run):
    code, out, err = run(f"{INSPECT} --json --of 1,2 --passages 3 --passage-size 32")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert len(facts["heads"]) == NUM_LAYERS * NUM_HEADS
    assert {"layer", "head", "pattern", "mass", "error", "density", "expected_ms"} == facts["heads"][0].keys()
    assert all(0 < row["mass"] < 1 and row["density"] < 1 for row in facts["heads"])
    assert facts["passages_of"] == {"layer": 1, "head": 2}
    assert len(facts["passages"]) == 3
    for passage in facts["passages"]:
        assert passage["heads_reading"] == 0
        assert passage["text"] in f"[user] {TEXT[:430]}>"
        assert len(passage["text"]) == 32


def test_inspect_prints_tables_and_draws(run, tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need the extra plots")
    code, out, err = run(f"{INSPECT} --heat-maps heads.png --head-map 1,3 head.png")
    assert (code, err) == (0, "")
    assert "passages that the whole model leaves out for the last queries" in out
    assert "0 of 8" in out
    for name in ("heads.png", "head.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    code, every, _ = run(f"{INSPECT} --heads")
    assert every.count("a_shape 2 70") == NUM_LAYERS * NUM_HEADS


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("search", "the following arguments are required: OUTPUT"),
        ("search out.json --budget 1", "'1' must be a number above 0 and below 1"),
        ("search out.json --candidates diagonal:3", "must begin with one of a_shape, vertical_slash, block_sparse"),
        ("search out.json --candidates a_shape:3", "needs its sizes: a_shape:SINK_SIZE,WINDOW_SIZE"),
        ("search out.json --published old.json", "--published needs --no-dense-heads or --levels 1"),
        ("search out.json --levels 1 --published old.json --slash-granularity block", "has no place for it"),
        ("search out.json --published old.json --levels 1 --dense-heads", "--published needs --no-dense-heads"),
        ("search out.json --no-dense-heads --published ./out.json", "is the output itself: name another file"),
        ("search out.json --question Why?", "--question goes with --prompt-file"),
        ("search out.json --prompt-file text.txt --seed 3", "--seed is for generated prompts"),
        ("search out.json --prompt-file absent.txt", "absent.txt: No such file or directory"),
        ("search out.json --model MODEL --prompt-file empty.txt", "empty.txt is empty"),
        ("search nowhere/out.json", "nowhere is no folder"),
        ("search .", ". is a folder: name a file"),
        ("search /", "/ is a folder: name a file"),
        ("search out.json --levels 1 1", "levels=[1.0, 1.0] must be different multiples of budget=0.3"),
        ("search out.json --model nowhere --levels 4", "each above 0 and below 1"),
        ("search out.json --model nowhere --candidates a_shape:1,4 a_shape:1,4", "is given twice"),
        ("search out.json --model nowhere --candidates a_shape:1,4 a_shape:2,8", "has the proportions of AShape(sink"),
        ("search out.json --model MODEL --length 3", "length=3 is too short, the shortest takes "),
        ("inspect --prompt x --model nowhere --heat-maps folder.png", "folder.png is a folder: name a file"),
        ("inspect --prompt x --model nowhere --head-map 0,0 absent/a.png", "absent is no folder, so a.png can't"),
        ("search text.txt", "text.txt exists"),
        ("search out.json --model MODEL --length 999", "longer than the 512 that the model can read"),
        ("search out.json --levels 1 --published out.json.journal", "is the journal of the output: name another file"),
        ("search out.json --levels 1 --published out.json.journal.part", "is the journal of the output"),
        ("search text.txt --overwrite --prompt-file text.txt", "text.txt is read and would be written, too"),
        ("search out.json --tiles out.json.journal", "out.json.journal is read and would be written, too"),
        ("search .. --overwrite", ".. is a folder: name a file"),
        ("search out.json --slash-granularity block --candidates a_shape:1,4", "goes with vertical_slash"),
        ("inspect --prompt x --heat-maps heads.xyz", "heads.xyz: a picture's name ends in one of"),
        ("inspect --prompt x --head-map 0,0 head", "head: a picture's name ends in one of"),
        ("inspect --prompt x --heat-maps a.svg --head-map 0,0 ./a.svg", "a.svg is named for two pictures"),
        ("inspect --prompt x --attention dense", "invalid choice: 'dense'"),
        ("inspect --prompt x --model MODEL --of 2", "--of: layer 2 is not one of 0 to 1"),
        ("inspect --prompt x --model MODEL --of 0,1,2", "must be LAYER or LAYER,HEAD"),
        ("inspect --prompt x --head-map 3 head.png", "--head-map needs LAYER,HEAD and FILE"),
        (f"inspect --model MODEL --prompt {'x' * 600}", "has room for 512"),
    ],
)
def test_users_mistake_is_one_sentence_and_exit_code_2(run, command, sentence):
    code, out, err = run(command)
    assert (code, out) == (2, "")
    assert err.startswith("minference-jax: error: ")
    assert err.count("\n") == 1
    assert sentence in err


def test_a_budget_that_nothing_keeps_is_said_after_the_first_layer(run):
    command = "search out.json --model MODEL --budget 0.1 --candidates vertical_slash:4,1"
    code, out, err = run(f"{command} --no-dense-heads")
    assert (code, len(out.splitlines())) == (2, 1)
    assert "layer 0, head 0: every candidate costs more than the budget of 0.1 (0.2 at its largest level)" in err
    (run.folder / "out.json.journal").unlink()
    code, out, err = run(command)
    assert (code, len(out.splitlines())) == (2, 1)
    assert "1 of 2 layers: the cheapest results cost 1.000 in the mean, more than budget=0.1: give" in err


def test_an_output_without_a_name_and_one_that_can_not_be_written_are_refused(run, monkeypatch):
    assert run("search", "")[::2] == (2, "minference-jax: error: '' is no name of a file: name one\n")
    monkeypatch.setattr("os.access", lambda *_: False)
    for command in ("search out.json", "inspect --prompt x --model nowhere --heat-maps a.svg"):
        code, out, err = run(command)
        assert (code, out) == (2, "")
        assert "nothing can be written in .: name a file elsewhere" in err


def test_a_search_with_a_budget_too_small_for_its_prompts_says_so(run):
    a_shape = AShape(sink_size=1, window_size=4)

    def found(error):
        one = [CandidateResult(a_shape, 0.15, (None,), (None,), (None,), (None,))]
        one.append(CandidateResult(a_shape, 0.3, (a_shape,), (0.3,), (0.3,), (error,)))
        return SearchResult(uniform_patterns(1, 1), (LayerResult(0, tuple(one), (1.0,)),), ((one[1],),))

    assert "no candidate keeps within 0.15 at any head" in search_command.summary(found(0.1))
    assert "keeps within 0.3" not in search_command.summary(found(0.1))
    assert "too small" not in search_command.summary(found(0.2))
    assert "the mean error is above 0.2: the budget is too small for these prompts" in search_command.summary(
        found(0.21)
    )


def test_pictures_are_refused_before_anything_is_computed_where_they_can_not_be_drawn(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = run("inspect --prompt x --model nowhere --heat-maps heads.png")
    assert (code, out) == (2, "")
    assert "pip install 'minference-jax[plots]'" in err


def test_the_candidates_of_the_command_line_are_patterns():
    assert head_pattern("vertical_slash:30,2048") == VerticalSlash(vertical_size=30, slash_size=2048)
