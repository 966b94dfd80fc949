"""Prompts of the benchmarks: what they hold, how long they are, that each can be made again alone."""

import copy
import itertools
import json
import re
import sys
from types import SimpleNamespace

import pytest

from minference_jax.evaluate import ruler
from minference_jax.evaluate.infinitebench import infinitebench_samples, read_infinitebench
from minference_jax.evaluate.infinitebench_tasks import SYNTHETIC
from minference_jax.evaluate.metrics import METRICS
from minference_jax.evaluate.niah import niah_samples
from minference_jax.evaluate.ruler import ESSAY, NO_CORPUS, QA, ruler_samples
from minference_jax.evaluate.samples import Question, encoder
from minference_jax.generate.filling import most_that_fit

LENGTH = 12_000  # bytes, which are tokens here
CONTEXT = 16_384


@pytest.fixture(scope="module")
def model(model):
    """That of the other tests as one that may read so much; it never does here."""
    wide = copy.copy(model)
    wide.config = SimpleNamespace(max_length=CONTEXT)
    return wide


def text_of(model, sample):
    return model.tokenizer.decode(list(sample.prompt))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files in the formats of SQuAD 2.0 and HotpotQA."""
    folder = tmp_path_factory.mktemp("qa")
    articles = [
        {"paragraphs": [_paragraph(article, i) for i in range(8)]} for article in ("rivers", "towns", "kings", "birds")
    ]
    (folder / "squad.json").write_text(json.dumps({"data": articles}))
    several = [
        {
            "question": f"Which {i}?",
            "answer": f"answer {i}",
            "context": [
                [f"title {i} {j}", [f"Sentence {k} of answer {i} {j}. " for k in range(15)]] for j in range(10)
            ],
        }
        for i in range(6)
    ]
    (folder / "hotpotqa.json").write_text(json.dumps(several))
    return {"squad": folder / "squad.json", "hotpotqa": folder / "hotpotqa.json"}


def _paragraph(article, i):
    questions = [
        {"question": f"What of {article} {i}?", "is_impossible": False, "answers": [{"text": f"{article}-{i}"}]},
        {"question": "What is not said?", "is_impossible": True, "answers": []},
    ]
    return {"context": f"About {article} {i}: {article}-{i}. " + f"More of {article} {i}. " * 40, "qas": questions}


def materials(task, files, prose):
    """What a task of RULER needs, and nothing more."""
    needed = {"essays": prose * 4} if task in ESSAY else {}
    return (
        needed
        | ({"squad": files["squad"]} if task == "qa_1" else {})
        | ({"hotpotqa": files["hotpotqa"]} if task == "qa_2" else {})
    )


@pytest.mark.parametrize("task", [*NO_CORPUS, *ESSAY, *QA])
def test_ruler_prompts_fill_their_length_and_hold_the_answers(model, task, files, prose):
    samples = ruler_samples(model, [task], [LENGTH], samples=2, **materials(task, files, prose))
    first, second = samples
    assert len(samples) == 2
    assert first.prompt != second.prompt
    for sample in (first, second):
        text = text_of(model, sample)
        assert 0.8 * LENGTH < len(sample.prompt) + sample.max_new_tokens <= LENGTH
        assert all(answer in text for answer in sample.answers)
        assert METRICS[sample.metric](" and ".join(sample.answers), sample.answers) == 1
        assert text.startswith("[user] ")
        assert ">" in text[-300:]  # the answer's start stands after the header of the assistant
    (again,) = ruler_samples(model, [task], [LENGTH], samples=1, **materials(task, files, prose))
    assert first == again


def test_needles_are_among_their_haystack_once(model, files, prose):
    for task, pattern in (
        ("niah_single_1", r"One of the special magic numbers for \w+-[\w-]+ is: \d{7}\."),
        ("niah_multikey_3", r"One of the special magic uuids for [0-9a-f-]{36} is: [0-9a-f-]{36}\."),
        ("niah_multivalue", r"One of the special magic numbers for [\w -]+ is: \d{7}\."),
    ):
        (sample,) = ruler_samples(model, [task], [LENGTH], samples=1, **materials(task, files, prose))
        text = text_of(model, sample)
        needles = re.findall(pattern, text)
        assert len(needles) == len(set(needles))
        assert all(sum(answer in needle for needle in needles) == 1 for answer in sample.answers)
        if task == "niah_single_1":
            assert len(needles) == 1
            assert text.endswith("mentioned in the provided text is")
        elif task == "niah_multivalue":
            assert len(needles) == len(sample.answers) == 4
            assert text.endswith("mentioned in the provided text are")
        else:
            assert len(needles) > 20


def test_variables_are_assigned_in_one_chain(model):
    (sample,) = ruler_samples(model, ["vt"], [LENGTH], samples=1)
    asked = text_of(model, sample).rpartition("Memorize and track")[2]
    chain = re.findall(r"VAR (\w{5}) = (?:VAR )?(\w+)", asked)
    assert tuple(name for name, _ in chain) == sample.answers
    assert [source for _, source in chain[1:]] == list(sample.answers[:-1])
    assert f"assigned the value {chain[0][1]} in" in asked


def test_common_words_are_those_said_most(model):
    for length, often in ((3000, 6), (LENGTH, 30)):
        (sample,) = ruler_samples(model, ["cwe"], [length], samples=1)
        listed = text_of(model, sample).rpartition("Memorize the ones")[2]
        words = re.findall(r"\d+\. (.+?)(?= \d+\. |\nQuestion)", listed)
        counts = {word: words.count(word) for word in words}
        assert {word for word, count in counts.items() if count == often} == set(sample.answers)
        assert len(sample.answers) == 10
        assert max(count for word, count in counts.items() if word not in sample.answers) == (1 if often == 6 else 3)


def test_frequent_words_follow_the_dots(model):
    (sample,) = ruler_samples(model, ["fwe"], [LENGTH], samples=1)
    words = text_of(model, sample).split("coded words. ")[1].split("\nQuestion")[0].split()
    ranked = sorted(set(words), key=words.count, reverse=True)
    assert ranked[0] == "..."
    assert tuple(ranked[1:4]) == sample.answers


def test_needle_stands_at_its_depth(model, prose):
    made = niah_samples(model, prose, [3000, 5000], depths=5, rounds=2)
    samples = list(made)
    assert len(samples) == len(made) == 20
    assert [sample.index for sample in samples[:10]] == list(range(10))
    for sample in samples:
        text = text_of(model, sample)
        context = text[text.index("irrelevant).\n") + 13 : text.index("\n\nQuestion:")]
        needle = context.index("\nThe special magic ")
        whole = len(context) - len(context[needle:].partition(f"{sample.answers[0]}\n")[0]) - 8
        assert abs(needle / whole - sample.about["depth"]) < 0.02
        assert sample.length - 60 < len(sample.prompt) + sample.max_new_tokens <= sample.length
    assert len({sample.answers for sample in samples}) > 15
    assert text_of(model, samples[0])[200:300] != text_of(model, samples[5])[200:300]  # another round starts elsewhere


def test_needle_prompt_follows_a_template_of_the_users_own(model, prose):
    (sample,) = niah_samples(model, prose, [500], depths=1, template="{question} <{context}> {x}", chat=False)
    assert re.fullmatch(r"What is .* number\? <In year 0.*> \{x\}", text_of(model, sample), re.DOTALL)


@pytest.mark.parametrize("task", SYNTHETIC)
def test_synthetic_infinitebench_prompts_fill_their_length(model, task):
    first, second = infinitebench_samples(model, [task], [LENGTH], samples=2)
    assert first.prompt != second.prompt
    for sample in (first, second):
        assert 0.9 * LENGTH < len(sample.prompt) + sample.max_new_tokens <= LENGTH
        said = " ".join(map(str, sample.answers))
        assert METRICS[sample.metric](said, sample.answers) == 1
        assert METRICS[sample.metric]("", sample.answers) == 0


def test_synthetic_answers_are_right(model):
    samples = {sample.task: sample for sample in infinitebench_samples(model, list(SYNTHETIC), [LENGTH], samples=1)}
    tasks = {task: text_of(model, sample) for task, sample in samples.items()}
    answers = {task: sample.answers for task, sample in samples.items()}
    (key,) = re.findall(r"The pass key is (\d{5})\. Remember", tasks["passkey"])
    assert answers["passkey"] == (key,)
    (digits,) = answers["number_string"]
    assert len(digits) == 10
    assert digits in tasks["number_string"]
    asked = re.search(r'Key: "([^"]+)"', tasks["kv_retrieval"])[1]
    assert json.loads(re.search(r"\{.*\}", tasks["kv_retrieval"])[0])[asked] == answers["kv_retrieval"][0]
    expression = tasks["math_calc"].rpartition("Expression: ")[2].split(">")[0]
    parts = expression.split()
    values = [eval(" ".join(parts[: 2 * i + 1])) for i in range(len(parts) // 2 + 1)]
    assert answers["math_calc"] == tuple(values)
    assert min(values) >= 0
    code = tasks["code_run"].partition("Python code.\n\n")[2].partition("\n\nPlease")[0]
    call = re.search(r"exact value of (func_\d+\(-?\d+\))", tasks["code_run"])[1]
    scope = {}
    exec(code, scope)
    assert eval(call, scope) == answers["code_run"][0]
    numbers = sorted(set(json.loads(re.search(r"\[\d.*\]", tasks["math_find"])[0])))
    name = re.search(r"What is the (.*) in the following list", tasks["math_find"])[1]
    ranks = {"largest number": -1, "second largest number": -2, "third largest number": -3}
    ranks |= {"smallest number": 0, "second smallest number": 1, "third smallest number": 2}
    assert name in ranks, "this seed asks for the median, which test_formats checks: take another"
    assert answers["math_find"] == (numbers[ranks[name]],)


def test_questions_about_one_context_begin_alike(model):
    samples = list(infinitebench_samples(model, ["kv_retrieval"], [LENGTH], samples=5, questions=3))
    assert [sample.context for sample in samples] == [0, 0, 0, 3, 3]
    groups = [list(group) for _, group in itertools.groupby(samples, lambda sample: sample.context)]
    for group in groups:
        texts = [text_of(model, sample).partition("\n\nKey:")[0] for sample in group]
        assert len(set(texts)) == 1
    assert len({sample.answers for sample in samples}) > 2


def test_files_of_infinitebench_are_read(model, tmp_path):
    lines = {
        "longbook_choice_eng": {"input": "Who?", "options": ["Ann", "Bob", "Cy", "Di"], "answer": ["Bob"]},
        "code_debug": {"input": "Which?", "options": ["f", "g", "h", "i"], "answer": ["h"]},
        "longbook_qa_eng": {"input": "Who?", "answer": ["Ann", "Anna"]},
        "longbook_qa_chn": {"input": "谁?", "answer": ["安"]},
        "longdialogue_qa_eng": {"input": "Which name?", "answer": ["ANN"]},
        "longbook_sum_eng": {"input": "", "answer": ["A book."]},
        "code_run": {"input": "the value of func_1(-3).", "answer": [7]},
        "math_find": {"input": "Only one number. The largest number of the list is: ", "answer": [9]},
        "kv_retrieval": {"input": 'Key: "a"\nThe value associated with the specified key is: ', "answer": ["b"]},
    }
    for task, fields in lines.items():
        path = tmp_path / f"{task}.jsonl"
        path.write_text(json.dumps({"id": 0, "context": "A long story. " * 9, **fields}) + "\n", "utf-8")
        (sample,) = read_infinitebench(model, path, task)
        text = text_of(model, sample)
        assert "A long story. A long story." in text
        said = " ".join(map(str, sample.answers[-1:]))
        if task != "longbook_sum_eng":
            assert METRICS[sample.metric](f"{said}.", sample.answers) == 1
        if fields.get("options"):
            assert sample.answers in (("Bob", "B"), ("h", "C"))
        if task in ("math_find", "kv_retrieval"):
            assert text.rpartition(">")[2].strip().startswith("The ")


def test_too_long_prompt_of_a_file_is_cut_only_where_asked(model, tmp_path):
    path = tmp_path / "longbook_qa_eng.jsonl"
    context = "".join(f"{i:04d} " for i in range(800))
    path.write_text(json.dumps({"context": context, "input": "Who?", "answer": ["Ann"]}) + "\n")
    with pytest.raises(ValueError, match=r"line 1: the prompt has 4\d\d\d tokens and its answer up to 40"):
        list(read_infinitebench(model, path, "longbook_qa_eng", length=1000))
    (sample,) = read_infinitebench(model, path, "longbook_qa_eng", length=1000, truncate_middle=True)
    assert len(sample.prompt) == 960
    text = text_of(model, sample)
    assert "0000 0001" in text
    assert "0799 \n\nQuestion: Who?" in text
    (whole,) = read_infinitebench(model, path, "longbook_qa_eng", length=10_000)
    assert sample.about["truncated_tokens"] == len(whole.prompt) - 960
    assert whole.about["truncated_tokens"] == 0


GOOD = json.dumps({"context": "Long.", "input": "Who?", "answer": ["Ann"]})
CHOICE = {"context": "Long.", "input": "Who?"}


@pytest.mark.parametrize(
    ("task", "content", "sentence"),
    [
        ("longbook_qa_eng", b"", "holds no sample"),
        ("longbook_qa_eng", b"\n \n", "holds no sample"),
        (
            "longbook_qa_eng",
            f"{GOOD}\n\n".encode() + '{"context": "café"}\n'.encode("latin-1"),
            "line 3: it is not UTF-8",
        ),
        ("longbook_qa_eng", f"{GOOD}\nno json\n", "line 2: it is not JSON"),
        ("longbook_qa_eng", "[]\n", "line 1: it must be an object whose context is a text"),
        ("longbook_qa_eng", '{"context": ["a"], "input": "b", "answer": "c"}\n', "line 1: it must be an object whose"),
        ("longbook_qa_eng", '{"context": "a", "input": "b"}\n', "line 1: answer=None must be there"),
        ("longbook_qa_eng", '{"context": "a", "input": "b", "answer": []}\n', r"answer=\[\] must be of type str"),
        ("longbook_qa_eng", '{"context": "a", "input": "b", "answer": [3]}\n', r"answer=\[3\] must be of type str"),
        ("longbook_qa_eng", '{"context": "a", "input": 3, "answer": ["c"]}\n', "input=3 must be a str"),
        ("math_find", '{"context": "a", "input": "The x of", "answer": ["3"]}\n', "must be of type int or float"),
        ("math_find", '{"context": "a", "input": "which?", "answer": [3]}\n', "does not hold The"),
        ("longbook_choice_eng", json.dumps(CHOICE | {"options": ["a"], "answer": ["a"]}), "must be four texts"),
        ("longbook_choice_eng", json.dumps(CHOICE | {"options": list("abcd"), "answer": ["x"]}), "one of the options"),
    ],
)
def test_damaged_file_of_infinitebench_is_refused_by_its_line_before_any_work(model, tmp_path, task, content, sentence):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"data.jsonl.*{sentence}"):
        read_infinitebench(model, path, task)


def test_summaries_ask_for_their_package_before_any_work(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    (tmp_path / "data.jsonl").write_text(GOOD)
    with pytest.raises(ValueError, match="needs rouge-score"):
        read_infinitebench(model, tmp_path / "data.jsonl", "longbook_sum_eng")


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda model: ruler_samples(model, ["niah"], [100]), "task 'niah' is not one of niah_single_1,"),
        (lambda model: ruler_samples(model, ["vt"], [100]), "vt: length=100 is too short"),
        (lambda model: ruler_samples(model, ["vt"], [0]), r"lengths\[0\]=0 must be an integer of at least 1"),
        (lambda model: ruler_samples(model, ["niah_single_2"], [4000]), "niah_single_2 needs prose"),
        (
            lambda model: ruler_samples(model, ["niah_single_2"], [4000], essays="A b."),
            "needs more material than there",
        ),
        (lambda model: ruler_samples(model, ["qa_1"], [4000]), "qa_1 needs the data set's own file: give squad"),
        (lambda model: niah_samples(model, "no end", [1000]), "the haystack has no sentence"),
        (lambda model: niah_samples(model, "One. Two.", [4000]), "niah: length=4000 needs more material"),
        (lambda model: niah_samples(model, "One. Two.", [100], rounds=0), "rounds=0 must be an integer"),
        (lambda model: niah_samples(model, "One. Two.", [100], template="{context}"), "must hold {context} and {quest"),
        (lambda model: infinitebench_samples(model, ["code_debug"], [900]), "task 'code_debug' is not one of passkey,"),
        (lambda model: infinitebench_samples(model, ["passkey"], [900], questions=2), "a context of passkey has one"),
        (lambda model: infinitebench_samples(model, ["passkey"], [900, 90]), "passkey: length=90 is too short"),
        (
            lambda model: infinitebench_samples(model, ["passkey"], [20_000]),
            "length=20000 is beyond the model's context",
        ),
        (lambda model: ruler_samples(model, ["vt", "fwe", "vt"], [4000]), "task 'vt' is given twice"),
        (lambda model: ruler_samples(model, ["vt"], [4000, 4000]), "length=4000 is given twice"),
        (lambda model: ruler_samples(model, ["vt"], [20_000]), "length=20000 is beyond the model's context of 16384"),
        (lambda model: ruler_samples(model, ["vt"], [4000], essays="A b."), "essays is for niah_single_2, .*, none of"),
        (lambda model: ruler_samples(model, ["vt"], [4000], squad="x"), "squad is for qa_1, none of which is among"),
        (lambda model: niah_samples(model, "One. Two.", [20_000]), "length=20000 is beyond the model's context"),
    ],
)
def test_what_cannot_be_made_is_said_in_a_sentence(model, call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(model)


def test_more_questions_than_a_file_has_are_refused(model, files):
    with pytest.raises(ValueError, match="samples=7 are asked for, the file of qa_2 has 6 questions"):
        ruler_samples(model, ["qa_2"], [LENGTH], samples=7, hotpotqa=files["hotpotqa"])


@pytest.mark.parametrize("content", ["[]", "{}", "no json", '{"data": [{"paragraphs": [{"qas": []}]}]}'])
def test_damaged_question_file_is_refused(model, tmp_path, content):
    (tmp_path / "file.json").write_text(content)
    with pytest.raises(ValueError, match=r"file\.json (is not a file of|has no question)"):
        ruler_samples(model, ["qa_2"], [4000], hotpotqa=tmp_path / "file.json")
    with pytest.raises(ValueError, match=r"file\.json (is not a file of|has no question)"):
        ruler_samples(model, ["qa_1"], [4000], squad=tmp_path / "file.json")


def test_words_of_ruler_ask_for_their_package(model, monkeypatch):
    ruler.ruler_needles.word_list.cache_clear()
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    with pytest.raises(ValueError, match=r"pip install 'minference-jax\[evaluate\]'"):
        ruler_samples(model, ["cwe"], [4000])


def test_plain_text_has_no_template_and_keeps_all_signs(model):
    question = Question(("Context.\n\nWhat?", " One.", "And?"), ("a",), "\n\nIt is")
    plain = model.tokenizer.decode(encoder(model, chat=False)(question))
    assert plain == "Context.\n\nWhat? One.\nAnd?\n\nIt is"
    chat = model.tokenizer.decode(encoder(model)(question))
    assert chat == "[user] Context.\n\nWhat?[assistant]  One.[user] And?>It is"


@pytest.mark.parametrize("most", [None, 700])
@pytest.mark.parametrize("least", [1, 5])
def test_largest_fit_is_found(least, most):
    for length in (35, 100, 101, 1999):
        count = most_that_fit(lambda n: 3 * n + 2, length, least=least, most=most, what="x")
        assert 3 * count + 2 <= length < 3 * (count + 1) + 2
