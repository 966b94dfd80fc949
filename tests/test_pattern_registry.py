"""The pattern registry: which published file is for a model, and why."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from releases import CONFIGS, IDS, NAMES, QWEN2, QWEN25, TINY, make_folder, make_tar
from small_models import CONFIG, CONTEXT, NUM_HEADS, NUM_LAYERS, write_model

from minference_jax import AShape, LanguageModel, load, measure, read_patterns
from minference_jax.cli import main
from minference_jax.patterns.published import PUBLISHED
from minference_jax.patterns.registry import choose_published, config_signature, resolve_patterns

RELEASE = Path(__file__).parent / "../../shared/data/minference_configs"


def config_of(row, context, **more):
    """What a config.json of a model of the row says."""
    return {
        "model_type": row.model_types[0],
        "num_hidden_layers": row.num_layers,
        "num_attention_heads": row.num_heads,
        "vocab_size": row.vocab_size,
        "max_position_embeddings": context,
        **more,
    }


def config_named(model, **more):
    return config_of(
        *next((row, context) for row in PUBLISHED for context in row.models if model in row.models[context]), **more
    )


# --- which file -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct"),
        ("qwen/QWEN2.5-7b-instruct", "Qwen/Qwen2.5-7B-Instruct"),
        ("somebody/Qwen2.5-7B-Instruct-1M", "Qwen/Qwen2.5-7B-Instruct-1M"),
        ("glm-4-9b-chat-1m", "THUDM/glm-4-9b-chat-1m"),
        ("zai-org/glm-4-9b-chat-1m-hf", "THUDM/glm-4-9b-chat-1m"),
        ("/models/Meta-Llama-3.1-8B-Instruct/", "meta-llama/Llama-3.1-8B-Instruct"),
        ("models/llama-3.1-70b-instruct", "meta-llama/Llama-3.1-70B-Instruct"),
        (Path("models/Yi-9B-200K"), "01-ai/Yi-9B-200K"),
        ("/hub/models--Qwen--Qwen2-7B-Instruct/snapshots/f2826a00", "Qwen/Qwen2-7B-Instruct"),
        ("models/qwen2.5-7b-instruct-q4_k_m.gguf", "Qwen/Qwen2.5-7B-Instruct"),
        ("Meta-Llama-3.1-8B-Instruct.IQ4_XS.gguf", "meta-llama/Llama-3.1-8B-Instruct"),
        ("Qwen2.5-14B-Instruct-1M-f16.gguf", "Qwen/Qwen2.5-14B-Instruct-1M"),
    ],
)
def test_a_model_is_known_by_the_last_part_of_its_name_in_any_casing(name, model):
    choice = choose_published(name)
    assert choice.file == IDS[model]
    assert choice.why.startswith("the model is called ")
    assert choice.why.rpartition(" ")[2] in str(name)


@pytest.mark.parametrize(
    "name",
    ["Qwen/Qwen2.5-7B", "Qwen2.5-7B-Instruct-AWQ", "Qwen2.5-7B-Instruct-Q4_K_M", "Qwen/Qwen2.5-7B-Instruct/old", "7B"],
)
def test_a_name_that_is_only_like_that_of_a_model_is_not_its_name(name):
    with pytest.raises(
        ValueError,
        match="its name is not that of a model that has one, and no config was there; give a pattern file itself",
    ):
        choose_published(name)


def test_later_files_of_a_release_come_before_the_first_ones():
    assert "_v2" in IDS["meta-llama/Llama-3.1-8B-Instruct"]
    assert NAMES - set(IDS.values()) == {IDS["meta-llama/Llama-3.1-8B-Instruct"].replace("_v2", "")}


@pytest.mark.parametrize("model", sorted(set(IDS) - {"Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2-7B-Instruct"}))
def test_a_config_alone_tells_every_model_but_two(model):
    choice = choose_published("models/mine", config_named(model))
    assert choice.file == IDS[model]
    assert choice.why.startswith("its config (model_type ")


def test_a_config_of_two_models_is_refused_with_both(tmp_path):
    config = config_named("Qwen/Qwen2-7B-Instruct")
    with pytest.raises(ValueError, match=r"is that of Qwen2-7B-Instruct and of Qwen2.5-7B-Instruct, and its name does"):
        choose_published(tmp_path, config)


def test_the_users_name_comes_before_the_configs_and_that_before_its_sizes():
    config = config_named("01-ai/Yi-9B-200K", _name_or_path="/data/models--Qwen--Qwen2-7B-Instruct/snapshots/1")
    choices = [
        choose_published("Qwen2.5-7B-Instruct", config),
        choose_published("mine", config),
        choose_published("mine", config | {"_name_or_path": "checkpoints/of-mine"}),
    ]
    assert [choice.file for choice in choices] == [QWEN25, QWEN2, IDS["01-ai/Yi-9B-200K"]]
    assert choices[0].why == "the model is called Qwen2.5-7B-Instruct"
    assert choices[1].why == "its config calls the model Qwen2-7B-Instruct"
    assert choices[2].why == (
        "its config (model_type 'llama', 48 layers of 32 heads, vocabulary 64000, context 262144) is that of Yi-9B-200K"
    )


@pytest.mark.parametrize("name", ["", ".", None, 3, ["Qwen2.5-7B-Instruct"]])
def test_a_name_in_a_config_that_says_nothing_is_passed_over(name, tmp_path, monkeypatch):
    (tmp_path / "Qwen2.5-7B-Instruct").mkdir()
    monkeypatch.chdir(tmp_path / "Qwen2.5-7B-Instruct")
    config = config_named("01-ai/Yi-9B-200K", _name_or_path=name)
    assert choose_published("/models/mine", config).file == IDS["01-ai/Yi-9B-200K"]
    assert choose_published(".", config).file == QWEN25  # the folder that . stands for


def test_chatglms_own_config_names_are_read():
    config = {
        "model_type": "chatglm",
        "num_layers": 40,
        "num_attention_heads": 32,
        "padded_vocab_size": 151_552,
        "seq_length": 1_048_576,
    }
    assert choose_published("mine", config).file == IDS["THUDM/glm-4-9b-chat-1m"]
    assert config_signature({}) == (None,) * 5


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "mistral"},
        {"num_hidden_layers": 47},
        {"num_attention_heads": "32"},
        {"vocab_size": [64_000]},
        {"max_position_embeddings": 4096},
        {"max_position_embeddings": None},
    ],
    ids=str,
)
def test_a_config_that_differs_anywhere_is_not_that_of_a_model(change):
    config = config_named("01-ai/Yi-9B-200K", _name_or_path="checkpoints/7") | change
    with pytest.raises(
        ValueError, match="no published pattern file can be chosen for mine: neither its name, the name "
    ):
        choose_published("mine", config)


# --- a model and the command line -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model whose folder has the name of a published one."""
    return write_model(tmp_path_factory.mktemp("models") / "Qwen2-7B-Instruct")


def test_a_model_takes_its_patterns_from_a_folder_or_a_release(model, tmp_path):
    release = make_tar(tmp_path / "m-1.tar.gz", {f"m-1/{CONFIGS}/{QWEN2}": json.dumps(TINY).encode()})
    for source in (make_folder(tmp_path / "files", QWEN2), str(release)):
        patterns = load(model, patterns=source).patterns
        assert patterns.layers == ((AShape(sink_size=4, window_size=8),) * NUM_HEADS,) * NUM_LAYERS
        assert patterns.source.endswith(f"{QWEN2}, because the model is called Qwen2-7B-Instruct")


def test_a_model_that_a_published_file_does_not_fit_is_refused_with_the_reason(model, tmp_path):
    with pytest.raises(ValueError, match="because the model is called Qwen2-7B-Instruct: patterns for 1 layers"):
        load(model, patterns=make_folder(tmp_path / "files", QWEN2, content=TINY[:1]))


def test_a_model_that_no_published_file_is_for_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is that of a model with one; give a pattern file itself") as error:
        load(write_model(tmp_path / "mine"), patterns=make_folder(tmp_path / "files", QWEN2))
    assert f"model_type 'llama', {NUM_LAYERS} layers of {NUM_HEADS} heads" in str(error.value)
    assert f"context {CONTEXT})" in str(error.value)


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs the command line with no way to the network; gives exit code, standard output and standard error."""
    monkeypatch.setattr("socket.socket.connect", lambda *unused: pytest.fail("the network was used"))

    def runs(*words):
        code = main([str(word) for word in words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return runs


def test_resolve_says_what_was_chosen_and_why(run, model, tmp_path):
    folder = make_folder(tmp_path, QWEN2, QWEN25)
    file = f"{folder / QWEN2}: {NUM_LAYERS} layers of {NUM_HEADS} heads\n"
    why = "because the model is called Qwen2-7B-Instruct\n"
    assert run("patterns", "resolve", model, folder) == (0, f"{file}{why}fits {model}\n", "")
    code, out, err = run("patterns", "resolve", "Qwen/Qwen2-7B-Instruct", folder)
    assert (code, err) == (0, "")
    assert out.startswith(file + why)
    assert "has no config here, so whether they fit was not checked" in out
    assert run("patterns", "resolve", model, folder / QWEN25)[1].splitlines()[1] == "because it was given itself"


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (
            "organisation/unknown",
            TINY,
            "can be chosen for organisation/unknown: its name is not that of a model that has",
        ),
        ("no id at all", TINY, "can be chosen for no id at all: its name is not"),
        ("MODEL", TINY[:1], "do not fit a model of 2 layers of 4 heads: layer 1, head 0 of the model has no pattern"),
        ("MODEL", [], "num_layers=0 must be"),
    ],
)
def test_resolve_refuses_in_one_sentence(run, model, tmp_path, name, content, sentence):
    folder = make_folder(tmp_path, QWEN2, content=content)
    code, out, err = run("patterns", "resolve", model if name == "MODEL" else name, folder)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert sentence in err


def test_resolve_reads_no_weights(run, tmp_path):
    folder = make_folder(tmp_path / "files", QWEN2)
    make_folder(tmp_path / "Qwen2-7B-Instruct", "config.json", content=CONFIG)
    assert run("patterns", "resolve", tmp_path / "Qwen2-7B-Instruct", folder)[0] == 0
    make_folder(tmp_path / "Qwen2-7B-Instruct", "config.json", content={})
    assert "does not say how many layers" in run("patterns", "resolve", tmp_path / "Qwen2-7B-Instruct", folder)[2]


def test_resolve_reads_the_metadata_of_a_gguf_file(run, tmp_path):
    file = tmp_path / "mine.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(131_072)
    writer.add_vocab_size(128_256)
    writer.add_block_count(32)
    writer.add_head_count(32)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("output_norm.weight", np.ones(64, np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    content = [{"31": ["stream_llm", 4, 8, None]}] * 32
    folder = make_folder(tmp_path, IDS["meta-llama/Llama-3.1-8B-Instruct"], content=content)
    code, out, err = run("patterns", "resolve", file, folder)
    assert (code, err) == (0, "")
    assert "context 131072) is that of Llama-3.1-8B-Instruct\nfits " in out


def test_a_hub_id_in_the_cache_is_known_by_its_config_too(run, tmp_path, monkeypatch):
    name = "organisation/mine"
    make_folder(tmp_path / "cached", "config.json", content=config_named("01-ai/Yi-9B-200K"))
    cached = {(name, "config.json"): str(tmp_path / "cached/config.json")}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *asked: cached[asked])
    folder = make_folder(tmp_path, IDS["01-ai/Yi-9B-200K"], content=[{"31": ["stream_llm", 4, 8, None]}] * 48)
    code, out, err = run("patterns", "resolve", name, folder)
    assert (code, err) == (0, "")
    assert out.endswith(f"context 262144) is that of Yi-9B-200K\nfits {name}\n")


def test_prefill_and_generate_say_what_was_chosen_and_why(run, model, tmp_path, monkeypatch):
    folder = make_folder(tmp_path, QWEN2)
    options = ("--model", model, "--prompt", "hello", "--pattern", folder, "--max-new-tokens", 2)
    said = f"{folder / QWEN2}, because the model is called Qwen2-7B-Instruct"
    answer = measure.Answer(implementation="xla", compile_seconds=None, seconds=(1.0,), tokens=(), text="")
    comparison = measure.Comparison(
        dense=answer,
        sparse=answer,
        compared=1,
        agreed=1,
        max_logit_difference=0.0,
        density=None,
        peak_bytes=None,
        peak_of="device",
    )
    monkeypatch.setattr("minference_jax.cli.prefill_command.compare", lambda *unused, **options: comparison)
    code, out, err = run("prefill", *options)
    assert (code, err) == (0, "")
    assert f"\npattern      {said}\n" in out
    monkeypatch.setattr(LanguageModel, "prefill", lambda *unused, **options: None)
    monkeypatch.setattr(LanguageModel, "stream", lambda *unused, **options: iter(["answer"]))
    assert run("generate", *options) == (0, "answer\n", f"patterns: {said}\n")


# --- the published files themselves -----------------------------------------------------------------------------------


@pytest.mark.skipif(not RELEASE.is_dir(), reason="the published pattern files are not beside this checkout")
@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row.file[:24])
def test_every_published_file_has_the_layers_and_heads_of_its_models(row):
    read_patterns(RELEASE / row.file).check(row.num_layers, row.num_heads)
    for ids in row.models.values():
        for model in ids:
            assert Path(resolve_patterns(RELEASE, model).place).name == row.file


@pytest.mark.skipif(not RELEASE.is_dir(), reason="the published pattern files are not beside this checkout")
def test_every_published_file_is_in_the_table():
    assert {path.name for path in RELEASE.glob("*.json")} == NAMES
    assert len(PUBLISHED) == 14
