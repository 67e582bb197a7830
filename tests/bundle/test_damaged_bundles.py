"""Bundles that are no bundle, unsafe or changed: refused in one line, by the place in the zip."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from functools import partial
from pathlib import Path

import pytest
from reported import write_hang

from repro import bundle
from repro.bundle import assemble
from repro.bundle.archive import ArchiveError, unpack
from repro.commands.cli import main
from repro.exit_codes import CANNOT_TELL, EXPECTED, UNEXPECTED, USAGE

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def quick(monkeypatch):
    """Without torch's collect_env, which takes seconds and has a test of its own."""
    monkeypatch.setattr(assemble, "_environment", lambda recogniser: "not asked\n")


def contents(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_a_pipe_in_place_of_a_bundle_is_refused_in_one_line(tmp_path, capsys):
    os.mkfifo(tmp_path / "b.zip")
    for command in (["bundle", "--verify"], ["watch"], ["bundle"]):
        assert main([*command, str(tmp_path / "b.zip")]) == USAGE
        text = capsys.readouterr().err
        assert "b.zip" in text and text.count("\n") == 1, text
    assert main(["bundle", "--verify", str(tmp_path)]) == USAGE
    assert capsys.readouterr().err == f"repro: {tmp_path}:0: not a regular file\n"


def entry(
    names: str | list[str], data: bytes = b"x", mode: int = 0o100644, *, method: int = zipfile.ZIP_DEFLATED,
    claims: int = 0,
) -> bytes:  # fmt: skip
    """A zip of entries with these names; claims: the size that its directory says they have."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in [names] if isinstance(names, str) else names:
            info = zipfile.ZipInfo("placeholder")
            info.filename = name
            info.external_attr = mode << 16
            archive.writestr(info, data, method)
            info.file_size = claims or info.file_size
    return buffer.getvalue()


later = partial(partial, entry)
"""An entry that its test makes, because some take long to compress and all workers collect all tests."""


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (later("/etc/passwd"), "/etc/passwd is not a file of a bundle"),
        (later("C:/x"), "C:/x is not a file of a bundle"),
        (later("events/../../x"), "events/../../x is not a file of a bundle"),
        (later("events/rank000.wit", b"/etc/passwd", 0o120777), "events/rank000.wit is not a regular file but a link"),
        (later("deep/er/and/deeper"), "deep/er/and/deeper is not a file of a bundle"),
        (later("events/rank\x1b[2J.wit"), "events/rank␛[2J.wit is not a file of a bundle"),
        (later("events/rank000.wit", bytes(129 << 20)), "events/rank000.wit unpacks to 135266304 bytes"),
        (later("events/rank000.wit", bytes(9 << 20)), "events/rank000.wit unpacks to more than 200 times its size"),
        (
            later("control/config.json", bytes(2 << 20)),
            "control/config.json unpacks to 2097152 bytes, but at most 1048576",
        ),
        (later([f"fr/a{n}" for n in range(9)], bytes(9 << 20)), "the zip unpacks to more than 200 times its size"),
        (
            later("outputs/rank000.json", b"[]," * (2 << 20)),
            "outputs/rank000.json unpacks to 6291456 bytes, but at most",
        ),
        (later("../evil/"), "../evil is not a regular file"),
        (later("../evil/", b"", 0o40755), "../evil is not a file of a bundle"),
        (later("deep/er/and/deeper/", b"", 0o40755), "deep/er/and/deeper is not a file of a bundle"),
        (later("events", b"x"), "no MANIFEST.json"),
        (later(["events", "events/rank000.wit"]), "events is in the zip both as a file and as a folder"),
        (later([f"events/a{n}" for n in range(9)], b"x" * (1 << 20), claims=127 << 20), "unpacks to more than"),
        (
            later([f"events/a{n}" for n in range(9)], b"x" * 700_000, method=zipfile.ZIP_STORED, claims=127 << 20),
            "the entries up to events/a8 unpack to",
        ),
        (
            later("config.json", b"x" * 99, method=zipfile.ZIP_BZIP2),
            "config.json is compressed by a method that bundles do not use",
        ),
        (lambda: b"PK\x03\x04 no zip", "cannot be read"),
        (later("config.json"), "no MANIFEST.json"),
    ],
    ids=str.split(
        "absolute drive slip link foreign escape bomb ratio large values many folder-as-file folder-slip foreign-folder"
        " file-for-folder"
        " file-and-folder bombs many-bombs bzip2 torn no-manifest"
    ),
)
def test_a_zip_that_is_not_safe_is_refused_by_name(tmp_path, capsys, data, words):
    path = tmp_path / "bad.zip"
    path.write_bytes(data())
    for command in (["watch", str(path)], ["bundle", "--verify", str(path)]):
        assert main(command) == USAGE
        text = capsys.readouterr().err
        assert words in text and text.count("\n") == 1, text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.zip"]


def test_a_zip_that_lies_about_its_sizes_is_refused(tmp_path):
    data = bytearray(entry("events/rank000.wit", bytes(1 << 20)))
    at = data.rfind(b"PK\x01\x02")
    data[at + 24 : at + 28] = (100).to_bytes(4, "little")  # the uncompressed size in the directory
    (tmp_path / "liar.zip").write_bytes(data)
    (tmp_path / "into").mkdir()
    with pytest.raises(ArchiveError):
        unpack(tmp_path / "liar.zip", tmp_path / "into")


def test_a_bundle_with_a_flipped_bit_is_refused_in_one_line(tmp_path, quick, capsys):
    root, _ = write_hang(tmp_path)
    whole = bundle.make(root, tmp_path / "b.zip").path.read_bytes()
    refused = 0
    for at in range(40, len(whole), len(whole) // 20):
        path = tmp_path / "flipped.zip"
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        code = main(["bundle", "--verify", str(path)])
        captured = capsys.readouterr()
        assert code in (EXPECTED, UNEXPECTED, USAGE), captured
        assert "Traceback" not in captured.err and captured.err.count("\n") == (code == USAGE), captured
        refused += code != EXPECTED
    assert refused > 10


def test_names_in_a_manifest_and_a_witness_do_nothing_to_a_terminal(tmp_path, quick, capsys):
    root, _ = write_hang(tmp_path, layer="layer\x1b[2J\x9b31m")
    for command in (["watch", str(root)], ["report", str(root)]):
        main(command)
        text = "".join(capsys.readouterr())
        assert "layer␛[2J<U+009B>31m" in text and "\x1b" not in text and "\x9b" not in text
    files = contents(bundle.make(root, tmp_path / "b.zip").path)
    manifest = json.loads(files["MANIFEST.json"])
    manifest["files"]["\x1b[2Jgone"] = {"sha256": ""}
    files["MANIFEST.json"] = json.dumps(manifest).encode()
    with zipfile.ZipFile(tmp_path / "changed.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    for command in (["bundle", "--verify"], ["watch"]):
        main([*command, str(tmp_path / "changed.zip")])
        text = "".join(capsys.readouterr())
        assert "␛[2Jgone is missing" in text and "\x1b" not in text


def test_a_changed_file_is_named(tmp_path, quick, capsys):
    root, _ = write_hang(tmp_path)
    made = bundle.make(root, tmp_path / "b.zip")
    files = contents(made.path)
    files["verdict.json"] = files["verdict.json"].replace(b"extra", b"order")
    del files["fr/rank000.json"]
    with zipfile.ZipFile(tmp_path / "changed.zip", "w") as archive:
        for name, data in {**files, "logs/added.log": b"x"}.items():
            archive.writestr(name, data)
    assert main(["bundle", "--verify", str(tmp_path / "changed.zip")]) == UNEXPECTED
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["fr/rank000.json is missing", "logs/added.log is not in the manifest", "verdict.json was changed"]
    assert main(["watch", str(tmp_path / "changed.zip")]) == USAGE
    assert "fr/rank000.json is missing, and 2 more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "data", "where"),
    [
        ("config.json", b'{"scenario": "metadata_rebuild", "num_ranks": 1e9}', "config.json.num_ranks: "),
        ("config.json", b"{", "config.json:1: "),
        ("verdict.json", b"[]", "verdict.json:1: $: expected object, got array; "),
        ("events/rank003.wit", b"no witness", "events/rank003.wit:10: "),
    ],
)
def test_what_is_wrong_in_a_bundle_is_named_by_its_place_in_the_zip(tmp_path, quick, capsys, name, data, where):
    root, _ = write_hang(tmp_path)
    files = {**contents(bundle.make(root, tmp_path / "b.zip").path), name: data}
    manifest = json.loads(files["MANIFEST.json"])
    manifest["files"][name]["sha256"] = hashlib.sha256(data).hexdigest()
    files["MANIFEST.json"] = json.dumps(manifest).encode()
    with zipfile.ZipFile(tmp_path / "changed.zip", "w") as archive:
        for each, content in files.items():
            archive.writestr(each, content)
    code = main(["watch", str(tmp_path / "changed.zip")])
    captured = capsys.readouterr()
    if name == "config.json":
        assert (code, captured.out) == (USAGE, "") and captured.err.startswith(
            f"repro: {tmp_path}/changed.zip: {where}"
        ), captured
    else:
        assert code == CANNOT_TELL and f"\n{where}" in captured.out, captured
    assert "repro-bundle-" not in captured.out + captured.err
