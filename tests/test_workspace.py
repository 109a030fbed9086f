"""Outputs appear whole or not at all, and nothing else is touched."""

import json
import os

import pytest

from keyreduce.errors import KeyreduceError
from keyreduce.outputs import appearing, is_already_made, read_json, refuse_source, refuse_unwritable, write_json


def fill(made, folder: bool, content: str = "new") -> None:
    (made / "content" if folder else made).write_text(content)


def content_of(target, folder: bool) -> str:
    return (target / "content" if folder else target).read_text()


@pytest.mark.parametrize("folder", [True, False])
def test_appears_at_the_end_with_its_parents(tmp_path, folder):
    target = tmp_path / "a" / "b"
    with appearing(target, folder=folder) as made:
        fill(made, folder)
        assert not target.exists()
    assert content_of(target, folder) == "new"
    assert [path.name for path in target.parent.iterdir()] == ["b"]


@pytest.mark.parametrize("folder", [True, False])
def test_an_error_leaves_nothing(tmp_path, folder):
    with pytest.raises(RuntimeError), appearing(tmp_path / "a" / "b", folder=folder) as made:
        fill(made, folder)
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", [True, False])
def test_what_exists_is_replaced_only_if_asked_and_only_at_the_end(tmp_path, folder):
    target = tmp_path / "target"
    for content in ("old", "new"):
        with appearing(target, folder=folder, overwrite=content == "new") as made:
            fill(made, folder, content)
        assert content_of(target, folder) == content
    with pytest.raises(KeyreduceError, match="`overwrite`"), appearing(target, folder=folder):
        pytest.fail("the block must not run")
    with pytest.raises(RuntimeError), appearing(target, folder=folder, overwrite=True) as made:
        fill(made, folder, "newest")
        raise RuntimeError
    assert content_of(target, folder) == "new"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("folder", [True, False])
def test_a_link_is_written_through(tmp_path, folder):
    with appearing(tmp_path / "real", folder=folder) as made:
        fill(made, folder, "old")
    (tmp_path / "link").symlink_to("real")
    with appearing(tmp_path / "link", folder=folder, overwrite=True) as made:
        fill(made, folder)
    assert (tmp_path / "link").is_symlink()
    assert content_of(tmp_path / "real", folder) == "new"


def test_a_folder_is_never_replaced_by_a_file_nor_the_other_way_round(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for name, folder in (("folder", False), ("file", True)):
        with (
            pytest.raises(KeyreduceError, match="where a .* is to be written"),
            appearing(tmp_path / name, folder=folder, overwrite=True),
        ):
            pytest.fail("the block must not run")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.parametrize("folder", [True, False])
def test_a_place_that_could_not_be_written_to_is_told_before(tmp_path, folder):
    (tmp_path / "old").mkdir() if folder else (tmp_path / "old").touch()
    for name in ("new", "old", "new/below"):
        refuse_unwritable(tmp_path / name, folder=folder)
    assert os.listdir(tmp_path) == ["old"]
    with pytest.raises(KeyreduceError, match="where a .* is to be written; give another output"):
        refuse_unwritable(tmp_path / "old", folder=not folder)
    (tmp_path / "file").touch()
    for name in ("file/new", "file/new/below"):
        with pytest.raises(KeyreduceError, match=r"cannot write to .*file: Not a directory; give another output$"):
            refuse_unwritable(tmp_path / name, folder=folder)


def test_a_folder_without_permissions_is_told_before(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # whoever runs the tests may be allowed anything
    with pytest.raises(KeyreduceError, match="cannot write to .*: Permission denied"):
        refuse_unwritable(tmp_path / "below" / "new", folder=False)


def test_the_current_folder_is_never_replaced(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    for target in (".", "..", tmp_path / "a"):
        with pytest.raises(KeyreduceError, match="current folder"), appearing(target, folder=True, overwrite=True):
            pytest.fail("the block must not run")


def test_what_a_killed_run_left_is_removed_and_what_a_running_one_makes_is_not(tmp_path):
    left_over = tmp_path / ".target.partial" / "target" / "half"
    left_over.mkdir(parents=True)
    with appearing(tmp_path / "target", folder=True):
        assert not left_over.exists()
        (tmp_path / ".target.partial" / "target" / "mine").touch()
        with pytest.raises(KeyreduceError, match="another run is writing .*target right now"):
            with appearing(tmp_path / "target", folder=True):
                pytest.fail("the block must not run")
    assert os.listdir(tmp_path) == ["target"] and os.listdir(tmp_path / "target") == ["mine"]


def test_a_folder_that_had_stepped_aside_when_its_run_was_killed_comes_back(tmp_path):
    aside = tmp_path / ".target.partial" / "target.old"
    aside.mkdir(parents=True)
    (aside / "old").touch()
    with pytest.raises(KeyreduceError, match="exists; pass `overwrite`"), appearing(tmp_path / "target", folder=True):
        pytest.fail("the block must not run")
    assert os.listdir(tmp_path) == ["target"] and os.listdir(tmp_path / "target") == ["old"]


@pytest.mark.parametrize("folder", [True, False])
def test_permissions_are_those_of_any_new_file(tmp_path, folder):
    with appearing(tmp_path / "target", folder=folder) as made:
        fill(made, folder)
    reference = tmp_path / "reference"
    reference.mkdir() if folder else reference.touch()
    assert (tmp_path / "target").stat().st_mode == reference.stat().st_mode


def test_json_is_read_as_it_was_written_with_numbers_on_one_line(tmp_path):
    content = {"kept": [[0, 2], [1, 12]], "text": "[1,\n 2]", "none": None, "x": [1.5, -2e-7], "empty": []}
    write_json(tmp_path / "a.json", content)
    assert read_json(tmp_path / "a.json") == content
    assert "[0, 2]" in (tmp_path / "a.json").read_text()


@pytest.mark.parametrize(
    ("text", "told"),
    [('{"a": ', "not valid JSON"), ("[1]", "no JSON object"), ("\xff", "cannot be read"), ("[" * 10**5, "damaged")],
)
def test_json_that_is_none_is_refused(tmp_path, text, told):
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(KeyreduceError, match=told):
        read_json(tmp_path / "a.json")
    with pytest.raises(KeyreduceError, match="there is no file"):
        read_json(tmp_path / "b.json")


def test_what_an_existing_output_means(tmp_path):
    inputs = {"seed": 0, "model": "x"}
    assert not is_already_made(tmp_path / "none", None, inputs, overwrite=False)
    assert is_already_made(tmp_path, json.loads(json.dumps(inputs)), inputs, overwrite=False)
    assert not is_already_made(tmp_path, inputs, inputs, overwrite=True)
    with pytest.raises(KeyreduceError, match=r"differs in seed\); pass `overwrite`"):
        is_already_made(tmp_path, {"seed": 1, "model": "x"}, inputs, overwrite=False)
    with pytest.raises(KeyreduceError, match="keyreduce did not write it"):
        is_already_made(tmp_path, None, inputs, overwrite=False)


def test_a_source_is_not_replaced(tmp_path):
    (tmp_path / "models" / "dense").mkdir(parents=True)
    source = tmp_path / "models" / "dense"
    (tmp_path / "link").symlink_to(source)
    for target in (source, source.parent, tmp_path / "link", source / ".." / "dense"):
        with pytest.raises(KeyreduceError, match="is, or holds, the model itself"):
            refuse_source(target, source)
    for target in (source / "pruned", source.parent / "dense2", tmp_path / "other"):
        refuse_source(target, source)
