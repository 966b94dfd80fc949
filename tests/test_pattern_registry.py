"""The pattern registry: which published file is for a model, why, and how it is found where the user has it."""

import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import CONFIG, CONTEXT, NUM_HEADS, NUM_LAYERS, write_model

from minference_jax import AShape, LanguageModel, load, read_patterns
from minference_jax.cli import main, measure
from minference_jax.patterns.published import PUBLISHED
from minference_jax.patterns.registry import choose_published, config_signature, resolve_patterns
from minference_jax.patterns.release import find_file

RELEASE = Path(__file__).parent / "../../shared/data/minference_configs"
TINY = [{str(head): ["stream_llm", 4, 8, 0.5] for head in range(NUM_HEADS)}] * NUM_LAYERS
NAMES = {row.file for row in PUBLISHED}
IDS = {model: row.file for row in PUBLISHED for ids in row.models.values() for model in ids}
QWEN25, QWEN2 = IDS["Qwen/Qwen2.5-7B-Instruct"], IDS["Qwen/Qwen2-7B-Instruct"]
CONFIGS = "minference/configs"


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


def make_folder(folder, *names, content=TINY):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(json.dumps(content))
    return folder


def make_tar(path, members):
    """A .tar.gz of {path in it: bytes, or the TarInfo of something that is no file}."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = 0 if info is content else len(content)
            tar.addfile(info, None if info is content else io.BytesIO(content))
    return path


def make_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def refusal(*arguments):
    """The sentence with which a path is refused."""
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the caller looks at the message
        resolve_patterns(*arguments)
    assert type(error.value) is ValueError
    assert "\n" not in str(error.value)
    return str(error.value)


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


# --- where it is ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [".", "configs", CONFIGS])
def test_the_file_is_found_in_a_folder(tmp_path, inside):
    make_folder(tmp_path / inside, QWEN25, QWEN2)
    found = resolve_patterns(tmp_path, "Qwen2-7B-Instruct")
    assert found.place == str(tmp_path / inside / QWEN2)
    assert found.patterns.source == f"{found.place}, because the model is called Qwen2-7B-Instruct"
    assert found.raw == Path(found.place).read_bytes()
    assert found.patterns == read_patterns(found.place)


@pytest.mark.parametrize("top", ["", "minference-0.1.6.0/", "./"])
@pytest.mark.parametrize(
    ("make", "ending"), [(make_tar, ".tar.gz"), (make_tar, ".tgz"), (make_zip, ".ZIP"), (make_zip, ".whl")]
)
def test_the_file_is_read_within_an_archive_and_nothing_is_unpacked(tmp_path, make, ending, top):
    members = {
        f"{top}setup.py": b"",
        f"{top}{CONFIGS}/{QWEN25}": b"[]",
        f"{top}{CONFIGS}/{QWEN2}": json.dumps(TINY).encode(),
    }
    archive = make(tmp_path / f"release{ending}", members)
    found = resolve_patterns(archive, "Qwen2-7B-Instruct")
    assert found.patterns.layers == ((AShape(sink_size=4, window_size=8),) * NUM_HEADS,) * NUM_LAYERS
    assert found.place == f"{archive}/{top}{CONFIGS}/{QWEN2}"
    assert list(tmp_path.iterdir()) == [archive]


def test_a_pattern_file_is_used_as_it_is_whatever_the_model(tmp_path):
    file = make_folder(tmp_path, QWEN25) / QWEN25
    found = resolve_patterns(file, "any model", {})
    assert (found.place, found.patterns.source, found.why) == (str(file), str(file), "it was given itself")
    assert found.patterns == read_patterns(file)


def test_a_release_without_the_file_says_which_it_has(tmp_path):
    make_folder(tmp_path / "some", QWEN25, "other.json")
    make_folder(tmp_path / "none", "other.json")
    members = {f"m/{CONFIGS}/{name}": b"[]" for name in (QWEN25, "other.json")}
    archives = make_tar(tmp_path / "m.tar.gz", members), make_zip(tmp_path / "m.zip", members)
    for source in (tmp_path / "some", *archives):
        assert refusal(source, "Qwen2-7B-Instruct") == (
            f"{source} has no {QWEN2}, which is needed because the model is called Qwen2-7B-Instruct; "
            f"in {source} there are {QWEN25}"
        )
    assert refusal(tmp_path / "none", "Qwen2-7B-Instruct").endswith("there is no published pattern file")


def link(kind, target):
    info = tarfile.TarInfo(f"m/{CONFIGS}/{QWEN2}")
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "odd",
    [link(tarfile.SYMTYPE, "/etc/hostname"), link(tarfile.LNKTYPE, "real.json"), link(tarfile.FIFOTYPE, "")],
    ids=["symlink", "hard link", "pipe"],
)
def test_what_is_no_plain_file_in_a_tar_is_not_followed(tmp_path, odd):
    archive = make_tar(tmp_path / "m.tar.gz", {"real.json": json.dumps(TINY).encode(), odd.name: odd})
    assert refusal(archive, "Qwen2-7B-Instruct").endswith("there is no published pattern file")


def test_a_link_in_a_zip_is_not_followed(tmp_path):
    info = zipfile.ZipInfo(f"m/{CONFIGS}/{QWEN2}")
    info.external_attr = 0o120777 << 16
    archive = make_zip(tmp_path / "m.zip", {info: "/etc/hostname"})
    assert refusal(archive, "Qwen2-7B-Instruct").endswith("there is no published pattern file")


@pytest.mark.parametrize(
    "place", ["", "a/b/minference/configs/", "../minference/configs/", "/minference/configs/", "configs/"]
)
def test_a_file_elsewhere_in_an_archive_is_not_taken(tmp_path, place):
    for make, ending in ((make_tar, "tgz"), (make_zip, "zip")):
        archive = make(tmp_path / f"m.{ending}", {f"{place}{QWEN2}": json.dumps(TINY).encode()})
        assert refusal(archive, "Qwen2-7B-Instruct").endswith("there is no published pattern file")


def test_a_file_twice_in_an_archive_is_refused(tmp_path):
    members = {f"{top}/{CONFIGS}/{QWEN2}": json.dumps(TINY).encode() for top in ("a", "b")}
    for archive in (make_tar(tmp_path / "m.tgz", members), make_zip(tmp_path / "m.zip", members)):
        assert f"{archive} has {QWEN2} 2 times; give the right one itself" in refusal(archive, "Qwen2-7B-Instruct")


@pytest.mark.parametrize("make", [make_tar, make_zip])
def test_a_damaged_pattern_file_in_an_archive_is_refused_by_its_place(tmp_path, make):
    archive = make(tmp_path / ("m.tgz" if make is make_tar else "m.whl"), {f"m/{CONFIGS}/{QWEN2}": b"[{"})
    assert refusal(archive, "Qwen2-7B-Instruct").startswith(f"{archive}/m/{CONFIGS}/{QWEN2}: not JSON: ")


def test_an_archive_that_is_too_large_unpacked_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("minference_jax.patterns.release.MAX_BYTES", 20_000)
    monkeypatch.setattr("minference_jax.patterns.files.MAX_BYTES", 20_000)
    members = {f"m/{CONFIGS}/{QWEN2}": bytes(20_001)}
    tar, zipped = make_tar(tmp_path / "m.tgz", members), make_zip(tmp_path / "m.zip", members)
    assert "it has more than 20000 bytes; unpack it and give the folder" in refusal(tar, "Qwen2-7B-Instruct")
    assert "more than 20000 bytes is too long for a pattern file" in refusal(zipped, "Qwen2-7B-Instruct")
    assert tar.stat().st_size < 1000


def test_an_encrypted_or_oddly_packed_member_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "odd.zip", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr(f"m/{CONFIGS}/{QWEN2}", json.dumps(TINY))
    assert "is compressed by another method than deflate" in refusal(tmp_path / "odd.zip", "Qwen2-7B-Instruct")
    raw = make_zip(tmp_path / "locked.zip", {f"m/{CONFIGS}/{QWEN2}": json.dumps(TINY)}).read_bytes()
    place = raw.index(b"PK\x01\x02") + 8  # flags of the central directory
    locked = bytearray(raw)
    locked[place] |= 1
    locked[6] |= 1
    (tmp_path / "locked.zip").write_bytes(locked)
    assert "encrypted" in refusal(tmp_path / "locked.zip", "Qwen2-7B-Instruct")


@pytest.mark.parametrize("ending", [".tar.gz", ".zip"])
@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"\x1f\x8b", b"\x1f\x8b\x08" + bytes(40), b"PK\x03\x04" + bytes(40)], ids=repr
)
def test_what_is_no_archive_is_refused_by_its_name(tmp_path, ending, raw):
    archive = tmp_path / f"m{ending}"
    archive.write_bytes(raw)
    assert refusal(archive, "Qwen2-7B-Instruct").startswith(f"{archive} ")


@settings(max_examples=300, deadline=None)
@given(data=st.data(), packed=st.booleans())
def test_a_damaged_archive_is_read_right_or_refused_in_one_sentence(tmp_path_factory, data, packed):
    folder = tmp_path_factory.getbasetemp()
    members = {f"m/{CONFIGS}/{QWEN2}": json.dumps(TINY).encode(), "m/README": bytes(2000)}
    archive = make_tar(folder / "damaged.tgz", members) if packed else make_zip(folder / "damaged.zip", members)
    raw = bytearray(archive.read_bytes())
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] ^= data.draw(st.integers(1, 255))
    archive.write_bytes(raw[: data.draw(st.sampled_from([len(raw), place]))])
    try:
        found = resolve_patterns(archive, "Qwen2-7B-Instruct")
    except ValueError:
        assert str(archive) in refusal(archive, "Qwen2-7B-Instruct")
    else:
        assert found.raw == members[f"m/{CONFIGS}/{QWEN2}"]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_tar_of_which_the_headers_are_nonsense_is_read_or_refused_in_one_sentence(tmp_path_factory, data):
    """Damage that the checksum of gzip does not see: whoever wrote the archive wrote it so."""
    archive = tmp_path_factory.getbasetemp() / "nonsense.tgz"
    long_name = f"{'m' * 120}/{CONFIGS}/{QWEN2}"
    with tarfile.open(
        archive, "w:gz", format=data.draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    ) as tar:
        info = tarfile.TarInfo(long_name)
        info.size = len(json.dumps(TINY))
        tar.addfile(info, io.BytesIO(json.dumps(TINY).encode()))
    raw = bytearray(gzip.decompress(archive.read_bytes())[:3000])
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.sampled_from(b"\x00 019=x\n\xff\x80LSg"))
    for start in range(0, len(raw) - 511, 512):  # make the checksums right again
        header = raw[start : start + 512]
        if header[257:262] == b"ustar":
            header[148:156] = b" " * 8
            raw[start + 148 : start + 156] = b"%06o\0 " % sum(header)
    archive.write_bytes(gzip.compress(raw, 1))
    try:
        find_file(archive, QWEN2, NAMES)
    except ValueError as error:
        message = str(error)
    else:
        return
    assert message.startswith(f"{archive} ")
    assert "\n" not in message


def test_a_path_that_is_not_there_is_the_systems_own_error(tmp_path):
    for name in ("nowhere", "nowhere.json", "nowhere.tar.gz", "nowhere.whl"):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            resolve_patterns(tmp_path / name, "Qwen2-7B-Instruct")


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
    answer = measure.Answer(implementation="xla", compile_seconds=None, seconds=(1.0,), result=None, tokens=(), text="")
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
