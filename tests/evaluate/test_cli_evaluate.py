"""`minference-jax evaluate`: tables, records and pictures, and mistakes in one sentence."""

import argparse
import importlib.util
import json
import shutil

import pytest

from minference_jax import AShape, Dense, ModelPatterns, write_patterns
from minference_jax.cli import evaluate_command, evaluate_contenders, main
from minference_jax.cli.parser import build_parser
from minference_jax.evaluate import plot
from minference_jax.evaluate.journal import ENVIRONMENT
from minference_jax.evaluate.summary import FIELDS


@pytest.fixture(scope="module")
def files(tmp_path_factory, prose):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "prose.txt").write_text(prose)
    (folder / "short.txt").write_text("One. Two.")
    (folder / "latin.txt").write_bytes("café.".encode("latin-1"))
    heads = (AShape(sink_size=8, window_size=64), AShape(sink_size=8, window_size=64), Dense(), Dense())
    write_patterns(ModelPatterns(layers=(heads, heads), source="a test"), folder / "mixed.json")
    return folder


@pytest.fixture
def run(folder, files, monkeypatch, capsys):
    """Runs the command among the files; gives exit code, standard output and standard error."""
    monkeypatch.chdir(files)

    def runs(command):
        code = main(["evaluate", *(str(folder) if word == "MODEL" else word for word in command.split())])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return runs


NIAH = "niah --model MODEL --text prose.txt --lengths 607 --depths 2 --attentions mixed.json a_shape --no-chat-template"


def test_needles_are_asked_recorded_and_summed_up(run, files):
    (files / "n").mkdir(exist_ok=True)
    code, out, err = run(f"{NIAH} --output n/run.jsonl --summary n/all.jsonl")
    assert (code, err) == (0, "")
    assert [line.split()[:3] for line in out.splitlines()[1:]] == [
        ["niah", "607", name] for name in ("dense", "mixed.json", "a_shape")
    ]
    lines = [json.loads(line) for line in (files / "n" / "run.jsonl").read_text().splitlines()]
    assert lines[0]["settings"].items() >= {"suite": "niah", "depths": 2, "seed": 42, "dtype": "float32"}.items()
    assert {line["about"]["depth"] for line in lines[2:]} == {0.0, 1.0}
    rows = [json.loads(line) for line in (files / "n" / "all.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    for row in rows:
        assert row.keys() >= {*FIELDS, "suite", "model", "device", "jax", "commit", "date"}
    assert rows[1]["pattern"] == "mixed.json"
    assert 0 < rows[1]["density"] < 1
    assert [row["device"] for row in rows] == [lines[1]["environment"]["device"]] * 3
    size = (files / "n" / "run.jsonl").stat().st_size
    assert run(f"{NIAH} --output n/run.jsonl")[:2] == (0, out)  # all is there already
    assert (files / "n" / "run.jsonl").stat().st_size == size
    code, printed, _ = run(f"{NIAH} --output n/run.jsonl --json --confidence 0.5")
    again = [json.loads(line) for line in printed.splitlines()]
    assert (code, again[0]["confidence"]) == (0, 0.5)
    assert again[0]["high"] - again[0]["low"] < rows[0]["high"] - rows[0]["low"]
    code, out, err = run(f"{NIAH} --output n/run.jsonl --depths 3 --progress")
    assert (code, out) == (2, "")
    assert "with other settings (depths: 2 there, 3 here): remove it, or name another file" in err


def test_every_option_reaches_the_samples(model, files, monkeypatch):
    monkeypatch.chdir(files)
    (files / "template.txt").write_text("Look: {context} -- {question}")

    def samples(command):
        arguments = build_parser("minference-jax").parse_args(["evaluate", *command.split()])
        evaluate_command.check_options(arguments)
        found = list(evaluate_command.choose_samples(arguments, model, (files / "prose.txt").read_text()))
        return found, [model.tokenizer.decode(list(sample.prompt)) for sample in found]

    options = "--text prose.txt --lengths 500 600 --depths 3 --samples 2 --template template.txt --no-chat-template"
    found, texts = samples(f"niah {options}")
    assert [sample.length for sample in found] == [500] * 6 + [600] * 6
    assert all(text.startswith("Look: ") and " -- What is the" in text for text in texts)
    assert samples(f"niah {options} --seed 7")[1] != texts
    found, texts = samples("ruler --tasks niah_single_2 fwe --lengths 2000 --samples 2 --text prose.txt --seed 1")
    assert [sample.task for sample in found] == ["niah_single_2"] * 2 + ["fwe"] * 2
    assert "In year 0 it rained" in texts[0]
    found, _ = samples("infinitebench --tasks kv_retrieval --lengths 900 --samples 4 --questions 2")
    assert [sample.context for sample in found] == [0, 0, 2, 2]
    line = {"context": "word " * 900, "input": "Who?", "answer": ["Ann"]}
    (files / "longbook_qa_eng.jsonl").write_text(f"{json.dumps(line)}\n" * 3)
    found, _ = samples("infinitebench --data . --tasks longbook_qa_eng --lengths 999 --samples 2 --truncate-middle")
    assert [len(sample.prompt) for sample in found] == [959, 959]


def test_perplexity_is_told_by_attention(run, files):
    code, out, err = run(
        "perplexity --model MODEL --text prose.txt --lengths 500 --attentions mixed.json --output p.jsonl --progress"
    )
    assert code == 0
    assert " 2/2 " in err  # the bar knows how many there are
    assert [line.split()[2] for line in out.splitlines()[1:]] == ["dense", "mixed.json"]
    if importlib.util.find_spec("matplotlib"):
        assert (
            run(
                "perplexity --model MODEL --text prose.txt --lengths 500 --attentions mixed.json --output p.jsonl "
                "--plot p.svg"
            )[0]
            == 0
        )
        assert "<svg" in (files / "p.svg").read_text()


def test_needles_and_scores_are_drawn(files):
    pytest.importorskip("matplotlib")
    made = {"task": "vt", "length": 607, "index": 0, "context": 0, "score": 0.5, "density": 1.0}
    made |= {"pattern": None, "metric": "contains_all", "about": {}, "environment": dict.fromkeys(ENVIRONMENT)}
    plot([made | {"attention": name, "task": task} for name in ("dense", "x") for task in "abcde"], files / "k.png")
    assert (files / "k.png").read_bytes().startswith(b"\x89PNG")
    deep = [made | {"attention": "dense", "about": {"depth": depth}} for depth in (0, 0.5, 1)]
    plot(deep, files / "deep" / "map.pdf", title="needles")
    assert (files / "deep" / "map.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(ValueError, match="there is no record to plot"):
        plot([], files / "k.png")


def choices(*words, **changes):
    options = {"attentions": list(words), "implementation": "xla", "slash_granularity": "block"} | changes
    return evaluate_contenders.choose_contenders(argparse.Namespace(**options))


def test_attentions_are_named_and_sized(files, monkeypatch):
    monkeypatch.chdir(files)
    words = ["x=minference", "mixed.json", "a_shape:4,8", "wide=vertical_slash:30,60", "block_sparse:2", "a_shape"]
    found = {one.contender.name: one.contender for one in choices(*words)}
    assert list(found) == ["dense", "x", "mixed.json", "a_shape:4,8", "wide", "block_sparse:2", "a_shape"]
    assert found["mixed.json"].pattern.source == "mixed.json"
    assert found["a_shape:4,8"].pattern == AShape(sink_size=4, window_size=8)
    assert (found["wide"].attention, found["wide"].slash_granularity) == ("vertical_slash", "block")
    assert found["a_shape"].equal_cost_to == "x"
    assert {one.implementation for one in found.values()} == {"xla"}  # dense, which nobody named, too


def test_name_ends_at_its_sign_and_a_path_may_hold_one(files, monkeypatch):
    monkeypatch.chdir(files)
    (files / "a=b").mkdir(exist_ok=True)
    shutil.copy("mixed.json", "a=b/c=d.json")
    for word, name in (
        ("./a=b/c=d.json", "c=d.json"),
        ("x=./a=b/c=d.json", "x"),
        (f"{files}/a=b/c=d.json", "c=d.json"),
    ):
        assert choices(word)[1].contender.name == name
    with pytest.raises(FileNotFoundError):
        choices("a=b/c=d.json")  # a name, and another path


def test_patterns_of_a_folder_are_those_for_the_model(model, folder, tmp_path):
    """The folder holds a published file under the name that the model's config gives; it is chosen as by prefill."""
    published = tmp_path / "Llama_3.1_8B_Instruct_128k_kv_out_v32_fit_o_best_pattern_v2.json"
    heads = (AShape(sink_size=8, window_size=64),) * 4
    write_patterns(ModelPatterns(layers=(heads, heads), source="t"), published, format="published")
    (choice,) = choices(f"it={tmp_path}")[1:]
    assert choice.contender.pattern is None
    other = tmp_path / "Llama-3.1-8B-Instruct"
    shutil.copytree(folder, other)
    (_, found) = evaluate_contenders.with_patterns(choices(f"it={tmp_path}"), str(other), model)
    assert found.name == "it"
    assert "Llama_3.1_8B" in found.pattern.source
    with pytest.raises(ValueError, match="no published pattern file"):
        evaluate_contenders.with_patterns(choices(f"it={tmp_path}"), str(folder), model)


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("", "the following arguments are required: BENCHMARK; see minference-jax evaluate --help"),
        ("niah", "the following arguments are required: --text"),
        ("niah --text absent.txt", "absent.txt: No such file or directory"),
        ("niah --text latin.txt", "latin.txt is not UTF-8 text"),
        ("niah --text short.txt --model nowhere", "nowhere does not exist"),
        ("niah --text short.txt --model MODEL --lengths 2000", "niah: length=2000 needs more material than there is"),
        ("niah --text prose.txt --model MODEL --lengths 600 3000", "length=3000 is beyond the model's context of 2048"),
        ("niah --text prose.txt --lengths 0", "'0' must be an integer of at least 1"),
        (
            "niah --text prose.txt --output a.jsonl --summary ./a.jsonl",
            "--output and --summary are both ./a.jsonl: name another file",
        ),
        ("niah --text prose.txt --confidence 1.5", "confidence=1.5 must lie between 0 and 1"),
        ("niah --text prose.txt --attentions a_shape", "a_shape costs as much as a sparse attention named before it"),
        ("niah --text prose.txt --attentions a_shape:8", "needs its sizes: a_shape:SINK_SIZE,WINDOW_SIZE"),
        (
            "niah --text prose.txt --attentions vertical_slash",
            "needs its sizes: vertical_slash:VERTICAL_SIZE,SLASH_SIZE",
        ),
        ("niah --text prose.txt --attentions a_shape:0,8", "'0' must be an integer of at least 1"),
        ("niah --text prose.txt --attentions absent.json", "absent.json: No such file or directory"),
        ("niah --text prose.txt --attentions minference minference", "contenders must have names of their own"),
        ("niah --text prose.txt --plot map.xyz", "map.xyz: a picture's name ends in one of"),
        ("ruler --tasks niah --model MODEL", "task 'niah' is not one of niah_single_1"),
        ("ruler --tasks qa_1 --model MODEL --lengths 900", "qa_1 is made from a file that you have: give --squad FILE"),
        ("ruler --tasks niah_single_2 --model nowhere", "give --text FILE"),
        (
            "infinitebench --tasks longbook_qa_eng --model nowhere",
            "not made anew: give --data FOLDER",
        ),
        (
            "perplexity --text short.txt --model nowhere --output absent/n.jsonl",
            "--output: absent is no folder",
        ),
        ("perplexity --text short.txt --model nowhere --summary absent/n.jsonl", "--summary: absent is no folder"),
        ("infinitebench --tasks code_debug --model MODEL", "in which code_debug.jsonl is"),
        ("infinitebench --truncate-middle --model MODEL", "--truncate-middle goes with --data"),
        (
            "infinitebench --data . --tasks passkey --model MODEL --lengths 900",
            "passkey.jsonl: No such file or directory",
        ),
        ("infinitebench --data . --questions 2 --model MODEL", "--questions does not go with --data"),
        (
            "perplexity --text short.txt --model MODEL --lengths 600",
            "the text has 9 tokens, 1 excerpts of 600 need 600",
        ),
        ("perplexity --text prose.txt --output prose.txt --lengths 99", "--text and --output are both prose.txt"),
        (
            "perplexity --text prose.txt --output short.txt --model MODEL --lengths 99",
            "not the journal of an evaluation",
        ),
        (
            "niah --text prose.txt --attentions mixed.json --summary ./mixed.json",
            "--attentions mixed.json and --summary are",
        ),
        ("niah --text prose.txt --output .", "--output: . is a folder: name a file"),
        ("niah --text prose.txt --attentions a_shape:1,8 --slash-granularity block", "none has vertical-slash heads"),
        (
            "niah --text prose.txt --attentions minference x=minference --model MODEL --lengths 600",
            "are the same attention",
        ),
        ("niah --text prose.txt --whole-prompts", "unrecognized arguments: --whole-prompts"),
        ("ruler --text prose.txt", "--text is for niah_single_2, niah_single_3, niah_multikey_1,"),
        ("ruler --tasks qa_1 --squad a --hotpotqa b", "--hotpotqa is for qa_2, none of which is among --tasks"),
        ("infinitebench --data . --seed 1", "--seed does not go with --data: nothing is drawn"),
        ("infinitebench --whole-prompts", "--whole-prompts goes with --questions or --data"),
        ("infinitebench --data . --tasks code --model MODEL", "task 'code' is not one of passkey, number_string"),
        ("infinitebench --data . --tasks passkey --summary passkey.jsonl", "--data passkey and --summary are both"),
    ],
)
def test_mistake_is_one_sentence_and_exit_code_2(run, command, sentence):
    if "--plot" in command:
        pytest.importorskip("matplotlib")
    code, out, err = run(command)
    assert (code, out) == (2, "")
    assert err.startswith("minference-jax: error: ")
    assert err.count("\n") == 1
    assert sentence in err


def test_plot_asks_for_its_package_before_the_work(run, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    code, out, err = run("niah --text prose.txt --model MODEL --plot map.png")
    assert (code, out) == (2, "")
    assert "pip install 'minference-jax[plots]'" in err
