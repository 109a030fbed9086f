"""``keyreduce recover --mode lora|full`` on tiny models, alone and under torchrun."""

import json
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from tiny_models import edit_config, tensors_of
from transformers import AutoModelForCausalLM

from keyreduce.checkpoint.folder import open_folder
from keyreduce.recovery.training.run import RecoveryTrainer

REPOSITORY = Path(__file__).parents[2]
WORK = Path("keyreduce-out")
FEW = ("--num-batches", 4, "--batch-size", 4, "--seq-len", 40, "--text", "text.txt", "--device", "cpu")


@pytest.fixture
def pruned(keyreduce, tiny_folder):
    """The folder of a tiny DeltaNet that was pruned into the work folder; and some text."""
    Path("text.txt").write_text("".join(f"value {n} is {n * n}, yes\n" for n in range(300)))
    keyreduce("prune", "--model", tiny_folder("delta_net"), "--method", "l2", "--ratio", 0.5, "--json").json()
    return tiny_folder("delta_net")


def start_torchrun(python: str, nodes: list[str], arguments: tuple, folder: Path = Path()) -> subprocess.Popen:
    """Start the processes of one node, with options that say which, in a folder."""
    paths = [REPOSITORY, REPOSITORY / "flash-linear-attention", *filter(None, [os.environ.get("PYTHONPATH")])]
    temporary = (folder / "temporary").resolve()
    temporary.mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    command = [python, "-m", "torch.distributed.run", *nodes, "-m", "keyreduce", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def under_torchrun(python: str, *arguments: object) -> subprocess.CompletedProcess:
    return ended(start_torchrun(python, ["--standalone", "--nproc-per-node=2"], arguments))


def ended(started: subprocess.Popen) -> subprocess.CompletedProcess:
    try:
        out, err = started.communicate(timeout=600)
    finally:
        started.kill()
    return subprocess.CompletedProcess(started.args, started.returncode, out, err)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_it_ends_as_an_ordinary_checkpoint_that_says_how_it_was_made(keyreduce, pruned, mode):
    arguments = ("recover", "--mode", mode, "--teacher", pruned, "--distill-weight", 0.5, *FEW)
    result = keyreduce(*arguments, "--json").json()
    assert result["made"] and result["mode"] == mode and result["tokens"] == 4 * 4 * 40
    assert Path(result["dense"]) == pruned
    folder = WORK / "recovered"
    assert not (WORK / "recovered.training").exists()
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")
    before, after = tensors_of(WORK / "pruned"), tensors_of(folder)
    assert {name: tensor.shape for name, tensor in before.items()} == {n: tensor.shape for n, tensor in after.items()}
    assert any(not after[name].equal(before[name]) for name in after)
    assert torch.isfinite(AutoModelForCausalLM.from_pretrained(folder)(torch.arange(40)[None]).logits).all()
    assert keyreduce("verify", folder, "--json").json()["is_whole"]
    record = json.loads((folder / "keyreduce.json").read_text())
    (entry,) = record["repairs"]
    assert record["identity"] == open_folder(folder).identity
    assert entry["inputs"]["mode"] == mode and entry["inputs"]["options"]["distill_weight"] == 0.5
    assert entry["inputs"]["teacher"] == open_folder(pruned).identity
    assert [tokens for tokens, _ in entry["losses"]] == [160, 320, 480, 640]
    assert f"- {mode}: train" in (folder / "README.md").read_text()

    again = keyreduce(*arguments, "--json")
    assert again.json() == result | {"made": False} and "is there already, from the same inputs" in again.err
    other = keyreduce(*arguments, "--lr", 0.1)
    assert other.code == 2 and "differs in options" in other.err


def test_a_teacher_is_any_model_of_the_same_vocabulary(keyreduce, pruned, tiny_folder):
    teacher = tiny_folder("gated_deltanet")
    result = keyreduce("recover", "--mode", "full", "--teacher", teacher, *FEW, "--json").json()
    assert Path(result["teacher"]) == teacher and Path(result["dense"]) == pruned


def test_nought_is_a_value(keyreduce, pruned):
    nought = ("--warmup", 0, "--distill-weight", 0)
    keyreduce("recover", "--mode", "full", "--teacher", pruned, *nought, *FEW, "--json").json()
    (entry,) = json.loads((WORK / "recovered/keyreduce.json").read_text())["repairs"]
    assert entry["inputs"]["options"]["warmup"] == entry["inputs"]["options"]["distill_weight"] == 0


@pytest.mark.parametrize(
    ("mode", "sharing"), [("full", ("--distill-weight", 0.5)), ("lora", ("--shard", "--gradient-checkpointing"))]
)
def test_two_processes_train_as_one_does(keyreduce, python, pruned, mode, sharing):
    arguments = ("recover", "--mode", mode, *FEW)
    alone = keyreduce(*arguments, *(sharing if mode == "full" else ()), "--json").json()
    keyreduce("convert-dcp", WORK / "pruned", "dcp", "--json").json()
    of_dcp = ("--compressed", "dcp", "--output", "both")
    done = under_torchrun(python, *arguments, *sharing, *of_dcp, "--json")
    assert done.returncode == 0, done.stderr
    assert not list(Path("temporary").glob("keyreduce*"))  # the folders into which the DCP was converted
    assert json.loads(done.stdout)["loss_last"] == pytest.approx(alone["loss_last"], rel=1e-4)
    folders = (WORK / "recovered", Path("both"))
    records = [json.loads((folder / "keyreduce.json").read_text())["repairs"][0] for folder in folders]
    losses = [[loss for _, loss in record["losses"]] for record in records]
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert records[0]["inputs"] == records[1]["inputs"]
    one, two = map(tensors_of, folders)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-3, rtol=1e-2)
    assert done.stderr.count("step 4 of 4") == 1


def test_nodes_that_share_no_folder_are_refused(python, pruned):
    """A checkpoint is of all processes: without its files some would begin anew where others go on."""
    other = Path("other")
    other.mkdir()
    shutil.copytree(WORK, other / WORK)
    shutil.copy("text.txt", other)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    nodes = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=localhost", f"--master-port={port}"]
    arguments = ("recover", "--mode", "full", *FEW)
    folders = (Path(), other)
    started = [
        start_torchrun(python, [*nodes, f"--node-rank={n}"], arguments, folder) for n, folder in enumerate(folders)
    ]
    for done in map(ended, started):
        assert done.returncode != 0
        assert "not all processes see keyreduce-out/recovered.training: put --output" in done.stderr, done.stderr
    assert not [*Path().rglob("recovered*")]


@pytest.mark.gpu
@pytest.mark.parametrize("sharing", [(), ("--shard",), ("--micro-batch", 1, "--gradient-checkpointing")])
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_two_gpus_train_as_one_does(keyreduce, python, pruned, mode, sharing):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    arguments = ("recover", "--mode", mode, "--teacher", pruned, "--lr", 0.01, *FEW[:-1], "cuda")
    alone = keyreduce(*arguments, "--json").json()
    done = under_torchrun(python, *arguments, *sharing, "--output", "both", "--json")
    assert done.returncode == 0, done.stderr
    # What is computed in bfloat16 has three digits, and Adam's steps are as long where a gradient is next to nothing.
    assert json.loads(done.stdout)["loss_last"] == pytest.approx(alone["loss_last"], rel=0.03)
    before, one, two = map(tensors_of, (WORK / "pruned", WORK / "recovered", Path("both")))
    moved, apart = (sum(float((one[n].float() - other[n].float()).norm() ** 2) for n in one) for other in (before, two))
    assert apart < 0.5**2 * moved


def test_from_a_dcp_it_is_the_same_as_from_the_folder(keyreduce, pruned):
    keyreduce("convert-dcp", "--json").json()
    keyreduce("recover", "--mode", "lora", *FEW, "--json").json()
    keyreduce("recover", "--mode", "lora", "--compressed", WORK / "dcp", "--output", "of-dcp", *FEW, "--json").json()
    of_folder, of_dcp = tensors_of(WORK / "recovered"), tensors_of(Path("of-dcp"))
    assert of_folder.keys() == of_dcp.keys()
    assert all(of_folder[name].equal(of_dcp[name]) for name in of_folder)
    back = keyreduce("convert-dcp", "of-dcp", "again", "--json").json()
    assert Path(back["converted"]) == Path("again/step-0")


def test_after_an_interruption_the_same_command_goes_on(keyreduce, pruned, monkeypatch):
    arguments = ("recover", "--mode", "full", "--save-every", 1, *FEW)
    keyreduce(*arguments, "--output", "unbroken", "--json").json()
    calls, plain = [], RecoveryTrainer.compute_loss

    def killed(self, *given, **more):
        calls.append(None)
        if len(calls) == 3:
            held = [WORK / f".{name}.lock" for name in ("recovered", "recovered.training")]
            assert all(path.is_file() for path in held)
            raise KeyboardInterrupt
        return plain(self, *given, **more)

    monkeypatch.setattr(RecoveryTrainer, "compute_loss", killed)
    assert keyreduce(*arguments).code != 0
    assert sorted(path.name for path in WORK.iterdir()) == ["pruned", "recovered.training"]
    assert (WORK / "recovered.training/checkpoint-2").is_dir()
    monkeypatch.setattr(RecoveryTrainer, "compute_loss", plain)
    other = keyreduce(*arguments, "--lr", 0.5)
    assert other.code == 2 and "holds checkpoints of a training from other inputs" in other.err
    on = keyreduce(*arguments)
    assert on.code == 0 and "resuming from" in on.err
    unbroken, resumed = tensors_of(Path("unbroken")), tensors_of(WORK / "recovered")
    assert all(resumed[name].equal(unbroken[name]) for name in unbroken)


def test_bad_input_is_one_line_and_leaves_nothing(keyreduce, pruned, tiny_copy, tiny_folder):
    other = tiny_copy("other")
    edit_config(other, vocab_size=300)
    before = sorted(WORK.rglob("*"))
    for arguments, told in (
        (("--mode", "magic"), "take one of auto, least-squares, reconstruct, lora, full"),
        (("--mode", "least-squares", "--lora-rank", 3), "takes no --lora-rank; leave it out, or take --mode lora"),
        (("--mode", "full", "--lora-rank", 3), "takes no --lora-rank"),
        (("--mode", "full", "--scope", "mixer"), "takes no --scope"),
        (("--mode", "full", "--repeats", 0.5), "takes no --repeats"),
        (("--mode", "lora", "--lora-targets", "w_proj"), "w_proj matches no linear layer"),
        (("--mode", "full", "--teacher", other), "its vocabulary has 300 tokens, not 264"),
        (("--mode", "full", "--model", tiny_folder("gated_deltanet"), "--distill-weight", 1), "was not made from"),
        (("--mode", "full", "--seq-len", 100_000), "which do not fill one row"),
        (("--mode", "full", "--micro-batch", 3), "does not divide"),
        (("--mode", "full", "--shard"), "under torchrun"),
        (("--mode", "full", "--output", WORK / "pruned", "--overwrite"), "is, or holds, the model itself"),
        (("--mode", "full", "--compressed", pruned, "--distill-weight", 1), "name that with --teacher"),
    ):
        result = keyreduce("recover", *FEW, *arguments)
        assert (result.code, result.out) == (2, ""), (arguments, result.err)
        assert told in result.err, result.err
        assert sorted(WORK.rglob("*")) == before, arguments
