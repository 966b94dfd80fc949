"""Every prompt, letter by letter, built here from what RULER and InfiniteBench publish, at sizes one can read."""

import json
import re
from itertools import pairwise
from random import Random

import pytest

from minference_jax.evaluate import ruler, ruler_words
from minference_jax.evaluate.infinitebench import _TASKS, _asker
from minference_jax.evaluate.infinitebench_tasks import SYNTHETIC
from minference_jax.evaluate.metrics import METRICS
from minference_jax.evaluate.ruler import ESSAY, NO_CORPUS, QA, _recipe
from minference_jax.evaluate.ruler_qa import read_hotpotqa, read_squad
from minference_jax.evaluate.samples import _plain

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
VT_ASKED = "Find all variables that are assigned the value"
WORDS = {"adjective": ("red", "wet"), "noun": ("fox", "sea"), "verb": ("run",)}


def plain(question):
    return _plain(question.messages) + question.answer_prefix


@pytest.fixture(autouse=True)
def few_words(monkeypatch):
    def words(*kinds):
        return tuple(sorted(word for kind in kinds for word in WORDS[kind]))

    monkeypatch.setattr(ruler.ruler_needles, "word_list", words)
    monkeypatch.setattr(ruler_words, "word_list", lambda *kinds: tuple(f"word{i:02}" for i in range(60)))


def ask(task, units, essays=None, sources=None, length=4096, index=0):
    recipe = _recipe(task, length, essays, sources or {})
    return recipe, recipe.ask(Random(3), units, index)


def needle_text(kind, keys, context, several):
    """The template of RULER's niah, for one value asked for or for several."""
    if several:
        return (
            f"Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz "
            f"you about the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {keys} mentioned "
            f"in the provided text? The special magic {kind} for {keys} mentioned in the provided text are"
        )
    one = kind[:-1]
    return (
        f"A special magic {one} is hidden within the following text. Make sure to memorize it. I will quiz you about "
        f"the {one} afterwards.\n{context}\nWhat is the special magic {one} for {keys} mentioned in the provided text? "
        f"The special magic {one} for {keys} mentioned in the provided text is"
    )


@pytest.mark.parametrize("task", [*NO_CORPUS[:3], *ESSAY])
def test_needles_of_ruler(task):
    kind = "uuids" if task in ("niah_single_3", "niah_multikey_3") else "numbers"
    essays = "One tree.  Two\ntrees. Three trees!" if task in ESSAY else None
    recipe, question = ask(task, 6 if essays else 4, essays)
    text = plain(question)
    needles = re.findall(r"One of the special magic (\w+) for (\S+) is: ([0-9a-f-]+)\.", text)
    assert {found for found, _, _ in needles} == {kind}
    form = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}" if kind == "uuids" else r"[1-9][0-9]{6}"
    assert all(re.fullmatch(form, value) for _, _, value in needles)
    hidden = {"niah_multikey_1": 4, "niah_multivalue": 4, "niah_multiquery": 4, "niah_multikey_2": 5}
    assert len(needles) == (hidden | {"niah_multikey_3": 5}).get(task, 1)
    lines = [f"One of the special magic {kind} for {key} is: {value}." for _, key, value in needles]
    context = text.split("afterwards.\n")[1].split("\nWhat ")[0]
    if task in ESSAY:
        for line in lines:
            context = context.replace(line, "")
        assert context.split() == ["One", "tree.", "Two", "trees.", "Three", "trees!"]
    else:
        expected = sorted(lines if task != "niah_single_1" else [NOISE] * 4 + lines)
        assert sorted(context.split("\n")) == expected
    several = len(question.answers) > 1
    assert several == (task in ("niah_multivalue", "niah_multiquery"))
    asked = [next(key for _, key, value in needles if value == answer) for answer in question.answers]
    keys = asked[0] if task != "niah_multiquery" else ", ".join(asked[:3]) + ", and " + asked[3]
    context = text.split("afterwards.\n")[1].split("\nWhat ")[0]
    assert text == needle_text(kind, keys, context, several)
    assert (recipe.max_new_tokens, recipe.metric) == (128, "contains_all")


def test_needle_before_the_first_sentence_has_a_space_before_it_as_published(monkeypatch):
    monkeypatch.setattr(ruler.ruler_needles, "DEPTHS", (0,))
    _, question = ask("niah_single_2", 2, "One tree.")
    assert "afterwards.\n One of the special magic numbers" in plain(question)


def test_variable_tracking_of_ruler(monkeypatch):
    monkeypatch.setattr(ruler_words, "_EXAMPLE_NOISES", 5)  # with five lines there is one place for every assignment
    recipe, question = ask("vt", 5)
    text = plain(question)
    values = re.findall(r"VAR [A-Z]+ = ([0-9]{5}) ", text)
    names = re.findall(r"VAR ([A-Z]+) = ", text)
    assert [len(name) for name in names] == [3] * 5 + [5] * 5

    def block(names, value, space):
        lines = [
            f"VAR {names[0]} = {value}",
            *(f"VAR {new} = VAR {old} " for old, new in pairwise(names)),
        ]
        context = " ".join(f"{line} {NOISE}\n" for line in lines)
        return (
            f"Memorize and track the chain(s) of variable assignment hidden in the following text.{space[0]}{context}"
            f"{space[1]}Question: {VT_ASKED} {value} in the text above. Answer: According to the chain(s) of variable "
            f"assignment in the text above, 5 variables are assgined the value {value}, they are: "
        )

    example = block(names[:5], values[0], "  ") + " " + " ".join(names[:5])
    assert text == f" {example}\n\n\n\n" + block(names[5:], values[1], ("\n\n", "\n"))
    assert question.answers == tuple(names[5:])
    assert (recipe.max_new_tokens, recipe.metric) == (30, "contains_all")


@pytest.mark.parametrize(("length", "sizes"), [(4095, ((20, 3, 1), (6, 1))), (4096, ((40, 10, 3), (30, 3)))])
def test_common_words_of_ruler(length, sizes):
    recipe, question = ask("cwe", 12, length=length)
    text = plain(question)
    lists = re.findall(r"appear most often\.\n(.*)\nQuestion", text)

    def block(listed):
        return (
            "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
            f"that appear most often.\n{listed}\nQuestion: What are the 10 most common words in the above list? "
            "Answer: The top 10 words that appear most often in the list are:"
        )

    found = re.search(r"are:(1\. [^\n]*)\n", text)[1]
    assert text == f"{block(lists[0])}{found}\n{block(lists[1])}"
    (count, often, seldom), asked = sizes
    for listed, (words, high, low) in zip(lists, ((count, often, seldom), (12, *asked)), strict=True):
        listed = re.findall(r"(\d+)\. (\w+)", listed)
        assert [int(number) for number, _ in listed] == list(range(1, 10 * high + (words - 10) * low + 1))
    assert [word for _, word in listed].count(question.answers[0]) == asked[0]
    assert found == " ".join(f"{i}. {word}" for i, word in enumerate(re.findall(r"word\d\d", found), 1))
    assert (recipe.max_new_tokens, recipe.metric) == (120, "contains_all")


def test_frequent_words_of_ruler():
    recipe, question = ask("fwe", 100, length=200)  # four words, by 100 / rank^2 / zeta(2)
    text = plain(question)
    context = text.split("coded words. ")[1].split("\nQuestion")[0]
    assert text == (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        f"appeared coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
        "What are the three most frequently appeared words in the above coded text? Answer: According to the coded "
        "text above, the three most frequently appeared words are:"
    )
    words = context.split(" ")
    assert [words.count(word) for word in ("...", *question.answers)] == [60, 15, 6, 3]
    assert len(words) == 84
    assert all(re.fullmatch("[a-z]{6}", word) for word in question.answers)
    assert (recipe.max_new_tokens, recipe.metric) == (50, "contains_all")


@pytest.mark.parametrize("task", QA)
def test_questions_of_ruler(task, tmp_path):
    path = tmp_path / "data.json"
    if task == "qa_1":
        asked = {"question": "Where?", "is_impossible": False, "answers": [{"text": "here"}, {"text": "Here"}]}
        path.write_text(json.dumps({"data": [{"paragraphs": [{"context": "It is here.", "qas": [asked]}]}]}))
        source, document, answers = read_squad(path), "It is here.", ("here", "Here")
    else:
        content = [{"question": "Where?", "answer": "here", "context": [["Place", ["It is ", "here."]]]}]
        path.write_text(json.dumps(content))
        source, document, answers = read_hotpotqa(path), "Place\nIt is here.", ("here",)
    recipe, question = ask(task, 1, sources={task: source})
    only = (
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    )
    assert plain(question) == (
        f"{only}\n\nThe following are given documents.\n\nDocument 1:\n{document}\n\n{only}\n\nQuestion: Where? Answer:"
    )
    assert question.answers == answers
    assert (recipe.max_new_tokens, recipe.metric) == (32, "contains_any")


def hidden(line):
    return ["".join([f"{NOISE}\n"] * i + [line] + [f"{NOISE}\n"] * (2 - i)) for i in range(3)]


def made(task, units):
    random = Random(5)
    context = SYNTHETIC[task].make(random, units)
    fields = {"context": context.text, **context.ask(random)}
    return context.text, fields, _asker(task)(fields)


@pytest.mark.parametrize(
    ("task", "name", "head", "digits"),
    [
        ("passkey", "pass key", "Find it and memorize it. I will quiz you about the important information.", 5),
        ("number_string", "sequence of digits", "Find it. I will quiz you about the important information there.", 10),
    ],
)
def test_hidden_digits_of_infinitebench(task, name, head, digits):
    context, _, question = made(task, 2)
    (key,) = question.answers
    assert re.fullmatch(f"[0-9]{{{digits}}}", key)
    assert context in hidden(f"The {name} is {key}. Remember it. {key} is the {name}.\n")
    assert plain(question) == (
        f"There is an important info hidden inside a lot of irrelevant text. {head}\n\n{context}\n\n"
        f"What is the {name}?\n\nThe {name} is"
    )


def test_keys_and_values_of_infinitebench():
    context, _, question = made("kv_retrieval", 4)
    pairs = json.loads(context.removeprefix("JSON data:\n"))
    assert context == "JSON data:\n" + json.dumps(pairs)
    (key,) = [key for key, value in pairs.items() if value == question.answers[0]]
    assert plain(question) == (
        f"Extract the value corresponding to the specified key in the JSON object below.\n\n{context}\n\n"
        f'Key: "{key}"\nThe value associated with the specified key is: '
    )


def test_numbers_of_infinitebench():
    for seed in range(12):
        random = Random(seed)
        context = SYNTHETIC["math_find"].make(random, 100)
        fields = {"context": context.text, **context.ask(random)}
        question = _asker("math_find")(fields)
        numbers = json.loads(context.text)
        name = re.search("The (.*) of the list is", fields["input"])[1]
        ranked = sorted(set(numbers))
        if name == "median":
            expected = sorted(numbers)[len(numbers) // 2]
        else:
            place = next(i for i, word in ((2, "third"), (1, "second"), (0, "")) if name.startswith(word))
            expected = ranked[::-1][place] if "largest" in name else ranked[place]
        assert len(numbers) == 201
        assert question.answers == (expected,)
        assert type(question.answers[0]) is int
        assert plain(question) == (
            f"What is the {name} in the following list?\n\n{context.text}\n\nYou should answer with only one number, "
            f"no other words. The {name} of the list is: "
        )


def test_expressions_and_code_of_infinitebench():
    context, _, question = made("math_calc", 3)
    assert plain(question) == (
        "Let us calculate the intermediate values of an expression.\n\nExpression: 1 + 3 + 4\nValues: [1, 4, 8]\n\n"
        f"Expression: 8 - 3 + 2 - 4\nValues: [8, 5, 7, 3]\n\nExpression: {context}\nValues:"
    )
    context, fields, question = made("code_run", 3)
    call = re.search(r"func_\d+\(-?\d+\)", fields["input"])[0]
    function = call.partition("(")[0]
    assert plain(question) == (
        f"There is a function called {function} in the following Python code.\n\n{context}\n\n"
        f"Please compute the exact value of {call}. The value of {call} is"
    )


def test_longest_answers_and_scores_of_infinitebench():
    assert {task: recipe[2:] for task, recipe in _TASKS.items()} == {
        "passkey": (6, "first_integer"),
        "number_string": (12, "first_integer"),
        "kv_retrieval": (50, "is_word"),
        "math_find": (3, "first_number"),
        "math_calc": (30000, "leading_integers"),
        "code_run": (5, "last_integer"),
        "code_debug": (5, "code_choice"),
        "longbook_sum_eng": (1200, "rouge_l_sum"),
        "longbook_choice_eng": (40, "choice"),
        "longbook_qa_eng": (40, "f1_words"),
        "longbook_qa_chn": (40, "f1_signs"),
        "longdialogue_qa_eng": (40, "is_name"),
    }
    assert {recipe.metric for recipe in _TASKS.values()} <= METRICS.keys()
