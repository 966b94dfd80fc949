"""Pattern files in folders and archives: found, read in memory, or refused in one sentence."""

import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from releases import CONFIGS, NAMES, QWEN2, QWEN25, TINY, make_folder, make_tar, make_zip, refusal
from small_models import NUM_HEADS, NUM_LAYERS

from minference_jax import AShape, read_patterns
from minference_jax.patterns.registry import resolve_patterns
from minference_jax.patterns.release import find_file


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


@settings(max_examples=300)
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


@settings(max_examples=200)
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
