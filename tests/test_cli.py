"""The command line: what it prints, what it refuses and how."""

import io
import itertools
import json
import os
import subprocess
import sys

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_models import CONTEXT, NUM_HEADS, NUM_LAYERS, write_model

from minference_jax import AShape, BlockSparse, Dense, ModelPatterns, VerticalSlash, load, write_patterns
from minference_jax.cache import POLICIES
from minference_jax.cli import convert_command, main
from minference_jax.cli.generate_command import until_stop
from minference_jax.cli.parser import ATTENTION_NAMES, KV_CACHES, LINEAR_NAMES
from minference_jax.cli.progress import Steps
from minference_jax.generate import attend
from minference_jax.measure import ChosenAttention, compare, greedy_tokens
from minference_jax.models import fp8

pytestmark = pytest.mark.usefixtures("oracle_first")
TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune. " * 3
QUESTION = "\n\n---\n\nQuestion about the text above: Who?"
ASKED = TEXT.rstrip() + QUESTION
PROMISED = {
    *("model", "tokens", "attention", "implementation", "density", "dense_seconds", "sparse_seconds", "speedup"),
    *("greedy_agreement", "max_logit_difference", "peak_bytes", "text", "dense_text", "device", "versions"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "hf")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files that prompts and patterns are read from."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "prompt.txt").write_text(TEXT)
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    (folder / "empty.txt").write_text(" \n")
    (folder / "broken.json").write_text("[{")
    heads = (VerticalSlash(vertical_size=30, slash_size=50), AShape(sink_size=8, window_size=16), Dense(), Dense())
    write_patterns(ModelPatterns(layers=(heads,) * NUM_LAYERS, source="a test"), folder / "fits.json")
    uneven = (heads, heads, (BlockSparse(num_blocks=2),) * NUM_HEADS)
    write_patterns(ModelPatterns(layers=uneven, source="a test"), folder / "other.json")
    return folder


@pytest.fixture
def run(model, files, monkeypatch, capsys):
    """Runs the command line among the files; gives exit code, standard output and standard error."""
    monkeypatch.chdir(files)

    def runs(command, *more):
        words = [str(model) if word == "MODEL" else word for word in (*command.split(), *more)]
        code = main(words)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return runs


PREFILL = "prefill --model MODEL --max-new-tokens 6 --repeats 1"


def prefill(run, options, *more):
    code, out, err = run(f"{PREFILL} --json {options}", *more)
    assert (code, err) == (0, "")
    return json.loads(out)


def test_names_of_the_light_parser_are_those_of_the_library():
    assert set(ATTENTION_NAMES) == set(attend.ATTENTION_NAMES)
    assert tuple(LINEAR_NAMES) == fp8.LINEAR
    assert tuple(POLICIES) == KV_CACHES


def test_json_is_one_object_with_what_is_promised(run):
    facts = prefill(run, "--prompt-file prompt.txt --pattern fits.json")
    assert facts.keys() >= PROMISED
    assert (facts["attention"], facts["implementation"], facts["pattern"]) == ("minference", "xla", "fits.json")
    assert facts["density_min"] < facts["density"] < facts["density_max"] == 1
    assert facts["speedup"] == facts["dense_seconds"] / facts["sparse_seconds"]
    assert facts["peak_bytes"] > 2**20


def test_attention_that_keeps_everything_agrees_with_dense(run):
    for attention in ("dense", "vertical_slash --vertical-size 512 --slash-size 512"):
        facts = prefill(run, f"--prompt-file prompt.txt --attention {attention}")
        assert (facts["density"], facts["greedy_agreement"]) == (1, 1)
        assert facts["text"] == facts["dense_text"]
        assert facts["max_logit_difference"] < 1e-4


def test_linear_layers_are_8_bit_where_asked_for(run):
    exact, fast = (prefill(run, f"--prompt-file prompt.txt --attention dense{more}") for more in ("", " --linear fp8"))
    assert (exact["linear"], fast["linear"]) == (None, "fp8")
    assert fast["greedy_agreement"] == 1  # dense against dense of the same weights
    code, out, _ = run(f"{PREFILL} --prompt-file prompt.txt --attention dense --linear fp8")
    assert (code, out.splitlines()[0].endswith("float32, linear layers of fp8")) == (0, True)


@pytest.mark.parametrize("sizes", ["a_shape --sink-size 8 --window-size 16", "block_sparse --num-blocks 1"])
def test_uniform_attention_takes_its_sizes(run, sizes):
    facts = prefill(run, f"--prompt-file prompt.txt --attention {sizes}")
    assert facts["density"] < 1
    assert facts["max_logit_difference"] > 0
    for number in sizes.split()[2::2]:
        assert f"={number}" in facts["pattern"]


def test_report_shows_both_answers(run):
    facts = prefill(run, "--prompt-file prompt.txt --attention a_shape --sink-size 1 --window-size 2")
    code, out, err = run(f"{PREFILL} --prompt-file prompt.txt --attention a_shape --sink-size 1 --window-size 2")
    assert (code, err) == (0, "")
    assert f"{facts['tokens']} tokens" in out
    for name, text in (("dense", facts["dense_text"]), ("a_shape", facts["text"])):
        assert out.partition(f"{name} answers:\n")[2].strip().startswith(text.strip().splitlines()[0])


@pytest.mark.parametrize("name", ["int8", "host"])
def test_a_cache_policy_is_of_the_attention_and_is_told(run, name):
    options = f"--prompt-file prompt.txt --attention dense --kv-cache {name}"
    facts = prefill(run, options)
    assert (facts["kv_cache"], facts["greedy_tokens"], facts["max_logit_difference"] < 1e-4) == (name, 6, True)
    code, out, err = run(f"generate --model MODEL --max-new-tokens 6 {options}")
    assert (code, out.strip(), err) == (0, facts["text"].strip(), "")
    assert run(f"compile --model MODEL --lengths 9 --kv-cache {name}x")[0] == 2


def test_a_prompt_is_read_in_chunks_where_asked(run):
    options = "--prompt-file prompt.txt --attention dense --chunk-size 128"
    whole, facts = prefill(run, options.removesuffix(" --chunk-size 128")), prefill(run, f"{options} --kv-cache int8")
    assert (whole["chunk_size"], facts["chunk_size"], facts["tokens"] > 128) == (None, 128, True)
    assert facts["max_logit_difference"] > 0  # later chunks have read what the cache holds
    assert facts["dense_text"] == whole["dense_text"]
    code, out, err = run(f"generate --model MODEL --max-new-tokens 6 {options} --kv-cache int8")
    assert (code, out.strip(), err) == (0, facts["text"].strip(), "")
    assert ", 128 at a time\n" in run(f"{PREFILL} {options}")[1]
    for command in ("prefill", "generate"):
        for more, message in (
            ("snapkv --chunk-size 128", "takes kv_cache='plain'"),
            ("int8 --chunk-size 9", "multiple"),
        ):
            code, out, err = run(f"{command} --model nowhere --prompt x --kv-cache {more}")
            assert (code, out, message in err) == (2, "", True)


def test_prompt_and_question_go_through_the_chat_template(run, model, monkeypatch):
    language_model = load(model)
    expected = len(language_model.encode_chat(ASKED))
    assert prefill(run, "--prompt-file prompt.txt --question Who?")["tokens"] == expected
    plain = prefill(run, "--prompt-file prompt.txt --question Who? --no-chat-template")
    assert (plain["tokens"], plain["chat_template"]) == (len(ASKED), False)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert prefill(run, "--prompt-file - --question Who?")["tokens"] == expected


def test_prompt_is_cut_only_where_asked(run):
    code, out, err = run(f"{PREFILL} --prompt", "x" * CONTEXT)
    assert (code, out) == (2, "")
    assert "526 in all" in err
    assert "has room for 512; --max-prompt-tokens N keeps the first N tokens" in err
    facts = prefill(run, "--max-prompt-tokens 100 --no-chat-template --question Who? --prompt", "x" * CONTEXT)
    assert facts["tokens"] == 100 + len(QUESTION)


def test_answers_are_compared_over_dense_attentions_answer(run, monkeypatch):
    """With every token a stop token both answers end at once: the stop token itself is what is compared."""
    monkeypatch.setattr("minference_jax.loading.load_stop_tokens", lambda source: tuple(range(257)))
    facts = prefill(run, "--prompt-file prompt.txt")
    assert (facts["greedy_tokens"], facts["greedy_agreement"], facts["text"]) == (1, 1, "")


def test_sparse_answer_goes_on_as_long_as_the_dense_one(model):
    language_model = load(model)
    prefilled = language_model.prefill(language_model.encode(TEXT), attention="dense")
    tokens = greedy_tokens(language_model, prefilled, 8, at_least=1)
    language_model.stop_tokens = frozenset(tokens[1:2])
    assert greedy_tokens(language_model, prefilled, 8, at_least=1) == tokens[:2]
    assert greedy_tokens(language_model, prefilled, 8, at_least=5) == tokens[:5]


def test_compilation_is_timed_apart_and_only_where_there_is_one(model):
    jax.clear_caches()  # other tests may have compiled the same
    language_model = load(model)
    attention = ChosenAttention("dense", None, "dense")
    options = {"attention": attention, "implementation": None, "repeats": 2}
    first = compare(language_model, [1, 2, 3] * 90, max_new_tokens=1, **options)
    assert first.dense.compile_seconds > 0
    assert first.sparse.compile_seconds is None
    assert len(first.dense.seconds) == len(first.sparse.seconds) == 2


def test_generate_streams_the_answer(run, model):
    language_model = load(model)
    command = "generate --model MODEL --prompt-file prompt.txt --max-new-tokens 12 --attention dense"
    code, out, err = run(command)
    (expected,) = language_model.generate([language_model.encode_chat(TEXT)], attention="dense", max_new_tokens=12)
    assert (code, out, err) == (0, expected.text + "\n", "")
    stop = expected.text[4]
    _, out, _ = run(
        f"generate --model MODEL --prompt-file prompt.txt --max-new-tokens 12 --attention dense --stop={stop}"
    )
    assert out == expected.text.partition(stop)[0] + "\n"


def test_seed_draws_the_same_answer_again(run):
    command = "generate --model MODEL --prompt hello --max-new-tokens 12 --temperature 2 --top-p 0.99 --seed"
    first, again, other = (run(f"{command} {seed}")[1] for seed in (1, 1, 2))
    assert first == again != other


@given(st.text("ab", max_size=30), st.lists(st.integers(0, 30)), st.lists(st.text("ab", min_size=1, max_size=4)))
def test_stop_text_ends_the_answer_however_the_pieces_fall(text, cuts, stops):
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(edges)]
    places = [text.find(stop) for stop in stops if stop in text]
    given_out = "".join(until_stop(pieces, stops))
    if not places:
        assert given_out == text
    else:  # the earliest that was complete when its last piece came
        assert text.startswith(given_out)
        assert not any(stop in given_out for stop in stops)


def test_patterns_are_shown_layer_by_layer(run):
    code, out, err = run("patterns show other.json")
    assert (code, err) == (0, "")
    lines = [line.split(maxsplit=1) for line in out.splitlines()]
    assert out.startswith("other.json: 3 layers of 4 heads\n")
    assert lines[2:] == [
        ["0-1", "2 x dense, 1 x a_shape 8 16, 1 x vertical_slash 30 50"],
        ["2", "4 x block_sparse 2"],
        ["all", "4 x block_sparse 2, 4 x dense, 2 x a_shape 8 16, 2 x vertical_slash 30 50"],
    ]


def test_patterns_are_checked_against_a_model(run, model):
    code, out, err = run("patterns check fits.json --model MODEL")
    assert (code, out, err) == (0, f"fits.json: 2 layers of 4 heads, fits {model}\n", "")
    code, out, err = run("patterns check other.json --model MODEL")
    assert (code, out) == (2, "")
    assert "layer 2, head 0 is not in the model" in err


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("", "the following arguments are required: COMMAND; see minference-jax --help"),
        ("fly", "invalid choice: 'fly'"),
        ("prefill", "one of the arguments --prompt --prompt-file is required; see minference-jax prefill --help"),
        ("prefill --prompt x --prompt-file y", "not allowed with argument"),
        ("prefill --prompt x --repeats 0", "'0' must be an integer of at least 1"),
        ("prefill --prompt x --linear int3", "invalid choice: 'int3'"),
        ("prefill --prompt x --attention flash", "invalid choice: 'flash'"),
        ("prefill --prompt-file absent.txt", "absent.txt: No such file or directory"),
        ("prefill --prompt-file .", ".: Is a directory"),
        ("prefill --prompt-file latin.txt", "latin.txt is not UTF-8 text"),
        ("prefill --prompt-file empty.txt", "the prompt is empty"),
        ("prefill --prompt x --model nowhere", "nowhere does not exist"),
        ("prefill --prompt x --model prompt.txt", "prompt.txt is not a model"),
        ("prefill --prompt x --num-blocks 3", "--num-blocks does not go with --attention minference"),
        ("prefill --prompt x --attention a_shape --slash-size 3", "--slash-size does not go with --attention a_shape"),
        ("prefill --prompt x --attention dense --pattern fits.json", "--pattern goes with --attention minference"),
        ("prefill --prompt x --model MODEL --pattern absent.json", "absent.json: No such file or directory"),
        ("prefill --prompt x --model MODEL --pattern broken.json", "broken.json: not JSON"),
        ("prefill --prompt x --model MODEL --pattern other.json", "do not fit a model of 2 layers of 4 heads"),
        ("prefill --prompt x --model MODEL --implementation abacus", "implementation='abacus' is not one of"),
        ("generate --prompt x --model MODEL --seed 3", "--seed has no effect at --temperature 0"),
        ("generate --prompt x --model MODEL --temperature 1 --seed 99999999999999999999", "must be between 0 and"),
        ("generate --prompt x --model nowhere --top-p 0.5", "top_p=0.5 has no effect at temperature=0"),
        ("generate --prompt x --stop=", "--stop needs a text that is not empty"),
        ("convert nowhere there", "nowhere does not exist"),
        ("patterns show absent.json", "absent.json: No such file or directory"),
        ("patterns check broken.json", "broken.json: not JSON"),
    ],
)
def test_users_mistake_is_one_sentence_and_exit_code_2(run, command, sentence):
    code, out, err = run(command)
    assert (code, out) == (2, "")
    assert err.startswith("minference-jax: error: ")
    assert err.count("\n") == 1
    assert sentence in err


def test_model_without_tokenizer_cannot_read_text(run, tmp_path):
    code, _, err = run("prefill --prompt x --model", str(write_model(tmp_path / "ids", tokenizer=False)))
    assert code == 2
    assert "has no tokenizer files" in err


def test_model_without_chat_template_reads_plain_text(run, tmp_path):
    write_model(tmp_path / "plain", template=None)
    facts = prefill(run, "--prompt-file prompt.txt --model", str(tmp_path / "plain"))
    assert (facts["tokens"], facts["chat_template"]) == (len(TEXT), False)


def test_fault_of_ours_is_not_taken_for_the_users_mistake(run, monkeypatch):
    monkeypatch.setattr(convert_command, "convert_model", lambda *args, **options: int("not a number"))
    with pytest.raises(ValueError, match="not a number"):
        run("convert MODEL there")


def test_reader_that_has_enough_is_no_error(files):
    read_end, write_end = os.pipe()
    os.close(read_end)
    code = "import sys; from minference_jax.cli import main; sys.exit(main())"
    command = [sys.executable, "-P", "-c", code, "patterns", "show", str(files / "fits.json")]
    result = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, check=False)
    os.close(write_end)
    assert (result.returncode, result.stderr) == (0, b"")


def test_bars_are_drawn_on_standard_error_where_asked(run, capsys):
    code, out, err = run(f"{PREFILL} --prompt hello --json --progress")
    assert code == 0
    assert json.loads(out)["tokens"]
    assert "weights: 100%" in err
    for step in ("compile dense", "prefill minference, run 1 of 1", "decode minference"):
        assert step in err


def test_clock_of_a_long_step_runs_on(capsys, monkeypatch):
    monkeypatch.setattr("minference_jax.cli.progress._TICK_SECONDS", 0.01)
    with Steps(1, shown=True) as steps, steps.step("long"):
        drawn = capsys.readouterr().err
        for _ in range(1000):
            drawn += capsys.readouterr().err
            if drawn.count("long") > 3:
                break
            steps._over.wait(0.01)
    assert drawn.count("long") > 3
