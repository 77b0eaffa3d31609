import json
from pathlib import Path

import pytest

from megatron_dion_tools.data.files import is_current, read_documents, staged_output
from megatron_dion_tools.errors import ToolError

RECIPE = {"size": 3, "names": ["a", "b"]}


def write_output(manifest: Path) -> None:
    with staged_output(manifest, RECIPE) as (folder, facts):
        (folder / "data.bin").write_bytes(b"abc")
        facts["bytes"] = 3


def write_half_and_be_interrupted(manifest: Path) -> None:
    with staged_output(manifest, RECIPE) as (folder, _):
        (folder / "data.bin").write_bytes(b"half")
        raise KeyboardInterrupt


def test_output_is_current_until_recipe_or_file_changes(tmp_path: Path) -> None:
    manifest = tmp_path / "out" / "data.json"
    assert not is_current(manifest, RECIPE)
    write_output(manifest)
    assert is_current(manifest, RECIPE)
    assert not is_current(manifest, {**RECIPE, "size": 4})
    (tmp_path / "out" / "data.bin").write_bytes(b"abd")
    assert not is_current(manifest, RECIPE)
    (tmp_path / "out" / "data.bin").unlink()
    assert not is_current(manifest, RECIPE)


def test_manifest_has_the_facts(tmp_path: Path) -> None:
    write_output(tmp_path / "data.json")
    assert json.loads((tmp_path / "data.json").read_text())["bytes"] == 3


@pytest.mark.parametrize("content", ["", "{", "[]", '{"recipe": 1}', "null"])
def test_damaged_manifest_is_not_current(tmp_path: Path, content: str) -> None:
    (tmp_path / "data.json").write_text(content)
    assert not is_current(tmp_path / "data.json", RECIPE)


def test_interrupted_output_leaves_what_was_there(tmp_path: Path) -> None:
    manifest = tmp_path / "data.json"
    write_output(manifest)
    with pytest.raises(KeyboardInterrupt):
        write_half_and_be_interrupted(manifest)
    assert is_current(manifest, RECIPE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.bin", "data.json"]


def test_documents_come_in_order_from_text_and_json_lines(tmp_path: Path) -> None:
    text, lines = tmp_path / "one.txt", tmp_path / "two.jsonl"
    text.write_text("first\n\nstill first\n")
    lines.write_text('{"text": "second", "name": "x"}\n\n{"text": "third"}\n')
    documents = [document["text"] for document in read_documents([text, lines], ["text"], "")]
    assert documents == ["first\n\nstill first\n", "second", "third"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "good"}\n{"text": \n', r"input\.jsonl:2: not JSON"),
        (b'{"text": "good"}\n\n{"body": "bad"}\n', r"input\.jsonl:3: no key 'text'.*body"),
        (b"{}\n", r"input\.jsonl:1: no key 'text' \(there are: none\)"),
        (b'["text"]\n', r"input\.jsonl:1: not a JSON object"),
        (b'{"text": 3}\n', r"input\.jsonl:1: the value of 'text' is not a string"),
        (b'{"text": "\xff"}\n', r"input\.jsonl: not UTF-8"),
    ],
)
def test_faulty_json_lines_are_told_with_their_place(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "input.jsonl"
    path.write_bytes(content)
    with pytest.raises(ToolError, match=message):
        list(read_documents([path], ["text"], ""))


def test_text_file_has_one_key(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("content")
    with pytest.raises(ToolError, match="title body"):
        list(read_documents([tmp_path / "one.txt"], ["title", "body"], ""))
