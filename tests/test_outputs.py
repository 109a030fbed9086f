"""Outputs appear whole or not at all, and nothing else is touched."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from keyreduce.errors import KeyreduceError
from keyreduce.outputs import (
    appearing,
    claimed,
    is_already_made,
    read_json,
    refuse_source,
    refuse_unwritable,
    write_json,
)


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
            pytest.raises(KeyreduceError, match=r"where a .* is to be written"),
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
    with pytest.raises(KeyreduceError, match=r"where a .* is to be written; give another output"):
        refuse_unwritable(tmp_path / "old", folder=not folder)
    (tmp_path / "file").touch()
    for name in ("file/new", "file/new/below"):
        with pytest.raises(KeyreduceError, match=r"cannot write to .*file: Not a directory; give another output$"):
            refuse_unwritable(tmp_path / name, folder=folder)


def test_a_folder_without_permissions_is_told_before(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # whoever runs the tests may be allowed anything
    with pytest.raises(KeyreduceError, match=r"cannot write to .*: Permission denied"):
        refuse_unwritable(tmp_path / "below" / "new", folder=False)


def test_the_current_folder_is_never_replaced(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    for target in (".", "..", tmp_path / "a"):
        with pytest.raises(KeyreduceError, match="current folder"), appearing(target, folder=True, overwrite=True):
            pytest.fail("the block must not run")


def test_what_a_killed_run_left_is_removed_and_what_a_running_one_makes_is_not(tmp_path):
    left_over = tmp_path / ".target.partial" / ".made" / "target" / "half"
    left_over.mkdir(parents=True)
    with appearing(tmp_path / "target", folder=True):
        assert not left_over.exists()
        (tmp_path / ".target.partial" / ".made" / "target" / "mine").touch()
        with (
            ThreadPoolExecutor(1) as pool,
            pytest.raises(KeyreduceError, match=r"another run is writing .*target right"),
        ):
            pool.submit(appearing(tmp_path / "target", folder=True).__enter__).result()
    assert os.listdir(tmp_path) == ["target"] and os.listdir(tmp_path / "target") == ["mine"]


def test_a_folder_that_had_stepped_aside_when_its_run_was_killed_comes_back(tmp_path):
    aside = tmp_path / ".target.partial" / ".made" / "target.old"
    aside.mkdir(parents=True)
    (aside / "old").touch()
    with pytest.raises(KeyreduceError, match="exists; pass `overwrite`"), appearing(tmp_path / "target", folder=True):
        pytest.fail("the block must not run")
    assert os.listdir(tmp_path) == ["target"] and os.listdir(tmp_path / "target") == ["old"]


@pytest.mark.parametrize("folder", [True, False])
def test_a_claim_holds_from_before_the_work_to_its_end(tmp_path, folder):
    target = tmp_path / "a" / "target"
    with claimed(target, folder=folder) as claim:
        (claim.scratch / "target").mkdir()  # whatever its name, an intermediate result is left alone
        with appearing(target, folder=folder) as made:  # as a function does that knows of no claim
            fill(made, folder)
        assert content_of(target, folder) == "new"
        with ThreadPoolExecutor(1) as pool, pytest.raises(KeyreduceError, match="another run is writing"):
            pool.submit(appearing(target, folder=folder, overwrite=True).__enter__).result()
        with pytest.raises(RuntimeError), claim.appearing(overwrite=True) as made:
            fill(made, folder, "half")
            raise RuntimeError
        with claim.appearing(overwrite=True) as made:
            fill(made, folder, "newest")
        assert (claim.scratch / "target").is_dir()
    assert content_of(target, folder) == "newest"
    assert os.listdir(tmp_path / "a") == ["target"]


def test_only_the_first_process_of_torchrun_claims(tmp_path):
    target = tmp_path / "a" / "target"
    with claimed(target, folder=True), claimed(target, folder=True, by_this_process=False):
        assert sorted(os.listdir(tmp_path / "a")) == [".target.lock", ".target.partial"]
    with claimed(target, folder=True, by_this_process=False):
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_locks_is_written_to(tmp_path, monkeypatch, number):
    def none(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    with appearing(tmp_path / "a" / "target", folder=True) as made:
        fill(made, True)
    assert os.listdir(tmp_path / "a") == ["target"] and content_of(tmp_path / "a" / "target", True) == "new"


_CONTENDER = """
import os, sys, time
from pathlib import Path
from keyreduce.errors import KeyreduceError
from keyreduce.outputs import claimed

target, witness = Path(sys.argv[1]), Path(sys.argv[2])
counts = {"held": 0, "refused": 0}
end = time.monotonic() + 1.5
while time.monotonic() < end:
    try:
        with claimed(target, folder=True) as claim:
            os.close(os.open(witness, os.O_CREAT | os.O_EXCL))  # fails where another one is in here
            (claim.scratch / "mine").touch(exist_ok=False)
            time.sleep(0.001)
            witness.unlink()
            counts["held"] += 1
    except KeyreduceError as error:
        assert "another run is writing" in str(error), error
        counts["refused"] += 1
print(counts["held"], counts["refused"])
"""


def test_of_many_processes_one_at_a_time_holds_an_output_and_the_others_are_refused(tmp_path):
    """Its parents come and go meanwhile, since none of them makes it."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", _CONTENDER, tmp_path / "out" / "a" / "target", tmp_path / "witness"]
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    told = [process.communicate(timeout=60)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert sum(int(held) for held, _ in told) > 20 and sum(int(refused) for _, refused in told) > 20
    # A parent may be left: who has made it leaves it to who is in it, and that one has not made it.
    assert {path.name for path in tmp_path.rglob("*")} <= {"out", "a"}


_DISK = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree")


def stopped_at(call: int, strike, run) -> bool:
    """Run a function in a fork in which ``strike`` is called at that touch of the disk; whether it came to that."""
    child = os.fork()
    if child == 0:
        count = 0

        def audit(event, _):
            nonlocal count
            count += event in _DISK
            if event in _DISK and count == call:
                strike()

        sys.addaudithook(audit)
        with contextlib.suppress(KeyboardInterrupt):
            run()
        os._exit(0 if count < call else 1)
    return os.waitpid(child, 0)[1] != 0


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("strike", [kill, interrupt])
@pytest.mark.parametrize("folder", [True, False])
@pytest.mark.parametrize("old", [True, False])
def test_a_run_that_is_stopped_at_any_call_leaves_the_old_or_the_new(tmp_path, strike, folder, old):
    target = tmp_path / "out" / "target"

    def make(content: str) -> None:
        with appearing(target, folder=folder, overwrite=True) as made:
            fill(made, folder, content)

    seen = set()
    for call in range(1, 200):
        shutil.rmtree(target.parent, ignore_errors=True)
        if old:
            make("old")
        if not stopped_at(call, strike, lambda: make("new")):
            break
        seen.add(content_of(target, folder) if target.exists() else None)
        # Only what is killed may leave a folder aside, which the next run puts back.
        assert target.exists() or not old or (strike is kill and folder)
        with contextlib.suppress(RuntimeError), appearing(target, folder=folder, overwrite=True):
            raise RuntimeError
        assert target.exists() or not old
        make("newest")
        assert content_of(target, folder) == "newest"
        assert os.listdir(target.parent) == ["target"]
    assert 5 < call < 199
    assert {"old" if old else None, "new"} <= seen


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


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="there is no file system of processes")
def test_a_file_system_that_takes_no_files_is_not_taken_for_another_run():
    with pytest.raises(KeyreduceError, match="cannot write to /proc: .*; give another output"):
        refuse_unwritable(Path("/proc/x"), folder=True)
