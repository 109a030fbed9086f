"""What ``keyreduce calibrate`` writes, and when there is nothing to do, or nothing that could be done."""

from pathlib import Path

import pytest

from keyreduce.api.calibrate import CalibrateRequest
from keyreduce.api.calibrate import run as calibrate
from keyreduce.calibration import run
from keyreduce.calibration.file import read_record, read_statistics
from keyreduce.cli.console import Console
from keyreduce.errors import KeyreduceError


@pytest.fixture
def write(tiny_folder, tmp_path):
    """A function that calibrates a tiny model into a file and returns the command's JSON object."""
    (tmp_path / "text.txt").write_text("the state is low-rank " * 4)

    def call(target: Path = tmp_path / "sums", *, overwrite: bool = False, **options) -> dict:
        request = CalibrateRequest(
            model=str(tiny_folder("delta_net")),
            text=(tmp_path / "text.txt",),
            output=target,
            num_batches=1,
            batch_size=2,
            seq_len=16,
            device="cpu",
            overwrite=overwrite,
            **options,
        )
        return calibrate(request, Console(as_json=True)).to_json()

    return call


@pytest.fixture
def no_work(monkeypatch):
    monkeypatch.setattr(run, "load_model", lambda *arguments, **options: pytest.fail("that is too late"))


def test_a_file_with_gradients_serves_who_asks_for_none(write, tmp_path, capsys):
    made = write(gradients=True)
    assert (made["made"], made["gradients"]) == (True, True)
    assert "calibrating delta_net on cpu (float32, with gradients)" in capsys.readouterr().err
    assert read_record(tmp_path / "sums")["inputs"]["gradients"] is True
    assert read_statistics(tmp_path / "sums").layers[1].taylor is not None
    for options in ({"gradients": True}, {"gradients": False}, {}):
        assert write(**options) == made | {"made": False}


def test_a_file_without_gradients_does_not_serve_who_asks_for_them(write, tmp_path):
    assert write()["gradients"] is False
    assert write()["made"] is False
    with pytest.raises(KeyreduceError, match=r"made from other inputs \(it differs in gradients\); pass `overwrite`"):
        write(gradients=True)
    assert write(gradients=True, overwrite=True)["made"]
    assert read_statistics(tmp_path / "sums").layers[0].taylor is not None


def test_a_file_with_gradients_of_other_inputs_serves_nobody(write, tmp_path):
    write(gradients=True)
    (tmp_path / "text.txt").write_text("other words " * 10)
    with pytest.raises(KeyreduceError, match=r"it differs in text\)"):
        write()


@pytest.mark.usefixtures("no_work")
def test_an_output_that_cannot_be_written_is_refused_before_the_work(write, tmp_path):
    with pytest.raises(KeyreduceError, match="cannot write to .*text.txt: Not a directory"):
        write(tmp_path / "text.txt" / "sums")
    (tmp_path / "folder").mkdir()
    with pytest.raises(KeyreduceError, match="is a folder, where a file is to be written"):
        write(tmp_path / "folder", overwrite=True)
