"""Every checkpoint of a folder, measured by processes: stand-ins for them here, but for one run of the real thing."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from tiny_models import build, edit_config, edit_tensors, save

from keyreduce.api import many, tasks
from keyreduce.api.evaluate import EvaluateRequest
from keyreduce.api.many import metrics_of
from keyreduce.api.request import Report
from keyreduce.checkpoint.dcp import write_dcp
from keyreduce.checkpoint.find import find_checkpoints
from keyreduce.checkpoint.folder import open_folder
from keyreduce.errors import KeyreduceError
from keyreduce.processes import Job, Outcome

SEPARATOR = 256


@pytest.fixture
def base(tmp_path, tiny_folder) -> Path:
    """A DeltaNet of cost 8.0, a Gated DeltaNet of 4.0, a DCP of two steps, and what is none of them."""
    folder = tmp_path / "base"
    for name, model_type, cost in (("b", "delta_net", 8.0), ("deep/a", "gated_deltanet", 4.0)):
        save(build(model_type), folder / name)
        edit_config(folder / name, cost=cost)
    for step in (2, 10):
        write_dcp(open_folder(folder / "b"), folder / "run" / f"step-{step}")
    (folder / "run" / "step-11").mkdir()
    (folder / "empty").mkdir()
    (folder / "config only").mkdir()
    (folder / "config only" / "config.json").write_text("{}")
    save(build("delta_net"), folder / ".c.partial" / "c")
    return folder


@pytest.fixture
def calls(monkeypatch) -> Callable[[], list[EvaluateRequest]]:
    """A function: the requests since it was called last. What carries them out writes a figure of the model's config;
    models whose config asks for it fail."""
    requests: list[EvaluateRequest] = []

    def carry_out(folder: Path) -> None:
        task = json.loads((folder / "task.json").read_text())
        assert [step["verb"] for step in task["steps"].values()] == ["evaluate"]
        request = EvaluateRequest.of_json(task["steps"]["eval"]["request"])
        requests.append(request)
        config = json.loads((Path(request.model) / "config.json").read_text())
        (folder / "log.txt").write_text("what was said")
        if config.get("fails"):
            tasks.write_failure(folder, "it is too large")
            return
        if not config.get("silent"):
            entry = {
                "label": "dense",
                "folder": request.model,
                "predictions": 9,
                "perplexity_per_token": config["cost"],
            }
            request.output.write_text(json.dumps({"models": [entry]}))
        (folder / "result.json").write_text("{}")

    def run_jobs(jobs: Sequence[Job], *, workers: int, devices: Sequence[str]) -> list[Outcome]:
        for job in jobs:
            for folder in job.argv[3:]:
                carry_out(Path(folder))
        return [Outcome(job, 0, 0.0, "") for job in jobs]

    def read() -> list[EvaluateRequest]:
        found = requests[:]
        requests.clear()
        return found

    monkeypatch.setattr(tasks, "run_jobs", run_jobs)
    return read


def test_checkpoints_are_found(base):
    found = find_checkpoints(base)
    assert list(found) == ["b", "deep/a", "run/step-10", "run/step-2"]
    assert all(Path(folder) == base / name for name, folder in found.items())
    assert find_checkpoints(base / "b") == {"b": str(base / "b")}
    assert list(find_checkpoints(base / "run")) == ["step-10", "step-2"]


def test_links_are_followed_once(base, tmp_path):
    (base / "around").symlink_to(base)
    (base / "to b").symlink_to(base / "b")
    save(build("delta_net"), tmp_path / "elsewhere")
    (base / "to elsewhere").symlink_to(tmp_path / "elsewhere")
    found = find_checkpoints(base)
    assert len(set(map(os.path.realpath, found.values()))) == len(found) == 5
    assert "to elsewhere" in found


@pytest.mark.parametrize(("name", "message"), [("empty", "holds no checkpoint"), ("absent", "there is no folder")])
def test_a_folder_without_checkpoints(base, name, message):
    with pytest.raises(KeyreduceError, match=message):
        find_checkpoints(base / name)


@pytest.fixture
def measure(base, tmp_path) -> Callable[..., Report]:
    """A function: measure the two models that are no DCP, with the request changed as it says."""
    for step in ("step-2", "step-10"):
        (base / "run" / step / ".metadata").unlink()
    (tmp_path / "text.txt").write_text("x" * 100)
    given = {"base": base, "work": tmp_path / "work", "text": tmp_path / "text.txt", "seq_len": 64, "device": "cpu"}
    return lambda **changes: many.run(EvaluateRequest(**given | changes))


def states(result: Report) -> dict[str, str]:
    return {entry["name"]: entry["state"] for entry in result.content["models"]}


def test_what_is_done_is_kept(base, tmp_path, calls, measure):
    result = measure(seed=5)
    assert states(result) == {"deep/a": "measured", "b": "measured"}
    assert [entry["name"] for entry in result.content["models"]] == ["deep/a", "b"]  # the best first
    assert [entry["figures"] for entry in result.content["models"]] == [
        {"perplexity_per_token": 4.0},
        {"perplexity_per_token": 8.0},
    ]
    assert result.to_json() == json.loads((tmp_path / "work" / "eval.json").read_text())
    many.refuse_failed(result.content["models"])
    folder = tmp_path / "work" / "eval"
    for request in calls():
        name = Path(request.model).relative_to(base).as_posix()
        assert request == EvaluateRequest(
            model=str(base / name),
            work=folder / f"{name}.files",
            output=folder / f"{name}.json",
            text=tmp_path / "text.txt",
            seq_len=64,
            seed=5,
            device="cpu",
            overwrite=True,
        )
    written = json.loads((folder / "deep" / "a.json").read_text())
    assert written["models"][0]["perplexity_per_token"] == 4.0
    assert written["inputs"]["identity"] == open_folder(base / "deep" / "a").identity

    again = measure(seed=5)
    assert calls() == []
    assert states(again) == {"b": "kept", "deep/a": "kept"}
    assert [entry["figures"] for entry in again.content["models"]] == [
        entry["figures"] for entry in result.content["models"]
    ]


@pytest.mark.parametrize(
    ("change", "redone"),
    [
        ({"seq_len": 32}, {"a", "b"}),
        ("text", {"a", "b"}),
        ({"overwrite": True}, {"a", "b"}),
        ("weights", {"b"}),
        ("result", {"b"}),
        ("inputs", {"b"}),
        ("version", {"a", "b"}),
    ],
)
def test_what_changed_is_done_again(base, tmp_path, calls, measure, monkeypatch, change, redone):
    measure()
    calls()
    result = tmp_path / "work" / "eval" / "b.json"
    if change == "weights":
        edit_tensors(base / "b", lambda tensors: tensors["lm_head.weight"].mul_(2))
    elif change == "text":
        (tmp_path / "text.txt").write_text("another text")
    elif change == "result":
        result.write_text(result.read_text()[:-20])
    elif change == "inputs":
        content = json.loads(result.read_text())
        result.write_text(json.dumps({"models": [], "inputs": content["inputs"]}))
    elif change == "version":
        monkeypatch.setattr(many, "__version__", "99.0")
    again = measure(**(change if isinstance(change, dict) else {}))
    assert {Path(request.model).name for request in calls()} == redone
    assert all(entry["figures"] for entry in again.content["models"])


def test_one_that_fails_leaves_the_others(base, tmp_path, calls, measure):
    for name, change in (("fails", {"fails": True}), ("silent", {"silent": True}), ("damaged", {})):
        save(build("delta_net"), base / name)
        edit_config(base / name, **change)
    (base / "damaged" / "model.safetensors").write_bytes(b"short")
    result = measure(jobs=2)
    failed = dict.fromkeys(("damaged", "fails", "silent"), "failed")
    assert states(result) == {"deep/a": "measured", "b": "measured", **failed}
    assert [entry["name"] for entry in result.content["models"]][:2] == ["deep/a", "b"]
    damaged, fails, silent = result.content["models"][2:]
    assert (fails["message"], fails["figures"]) == ("it is too large", {})
    assert Path(fails["log"]).read_text() == "what was said"
    assert "there is no file" in silent["message"]
    assert "model.safetensors" in damaged["message"] and "log" not in damaged
    assert not any("result" in entry for entry in result.content["models"][2:])
    assert {Path(request.model).name for request in calls()} == {"a", "b", "fails", "silent"}
    with pytest.raises(KeyreduceError, match=r"3 of 5 models could not be measured, damaged among them: .*safetensors"):
        many.refuse_failed(result.content["models"])
    edit_config(base / "fails", fails=False, cost=1.0)
    assert measure().content["models"][0]["name"] == "fails"
    assert {Path(request.model).name for request in calls()} == {"fails", "silent"}


def test_the_dense_model_is_what_the_others_are_compared_with(tmp_path, base, calls, measure):
    save(build("delta_net_2"), tmp_path / "model")
    edit_config(tmp_path / "model", cost=2.0)
    result = measure(model=str(tmp_path / "model"))
    assert [(entry["name"], entry["state"], entry["figures"]) for entry in result.content["models"]] == [
        ("dense", "measured", {"perplexity_per_token": 2.0}),
        ("deep/a", "measured", {"perplexity_per_token": 4.0, "perplexity_increase": 1.0}),
        ("b", "measured", {"perplexity_per_token": 8.0, "perplexity_increase": 3.0}),
    ]
    save(build("delta_net"), base / "dense")
    edit_config(base / "dense", cost=3.0)
    assert "dense-model" in states(measure(model=str(tmp_path / "model")))


def test_each_has_a_gpu(calls, measure, monkeypatch):
    seen = []
    stand_in = tasks.run_jobs
    monkeypatch.setattr(tasks, "run_jobs", lambda jobs, **how: seen.append(how) or stand_in(jobs, **how))
    monkeypatch.setattr(tasks, "gpus", lambda: ["4", "6"])
    monkeypatch.setattr("keyreduce.devices.pick_device", lambda device: torch.device("cuda"))
    measure(device=None)
    assert seen == [{"workers": 2, "devices": ["4", "6"]}]
    assert {request.device for request in calls()} == {"cuda"}


def test_an_output_that_is_there(tmp_path, calls, measure):
    (tmp_path / "own.json").touch()
    with pytest.raises(KeyreduceError, match=r"own\.json exists; pass `overwrite`"):
        measure(output=tmp_path / "own.json")
    assert calls() == []
    measure(output=tmp_path / "own.json", overwrite=True)
    assert json.loads((tmp_path / "own.json").read_text())["models"]


def test_metrics_of_a_result():
    task = {"task": "hellaswag", "stderr": None}
    tasks = [task | {"metric": "acc", "value": 0.25}, task | {"metric": "acc_norm", "value": 0.5}]
    tasks.append({"task": "own", "metric": "f1", "value": None, "stderr": None})
    entry = {"label": "dense", "predictions": 3, "bits_per_byte": 2.0, "perplexity_per_token": None, "tasks": tasks}
    assert metrics_of({"models": [entry, {"bits_per_byte": 9.0}]}) == {"bits_per_byte": 2.0, "hellaswag acc_norm": 0.5}


def test_a_process_measures_the_model(python, tmp_path, monkeypatch):
    """The real thing on one model, against the definition of perplexity; variables of the shell do not reach it."""
    for name in ("COMPRESSED_BASE", "COMPRESSED_MODEL", "BASE_MODEL_DIR", "TASKS"):
        monkeypatch.setenv(name, "nonsense")
    monkeypatch.setenv("WORLD_SIZE", "2")  # some clusters set it; torchrun sets more than that
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("sys.executable", python)
    model, content = build("delta_net"), "the state is low-rank\n" * 20
    (tmp_path / "text.txt").write_text(content)
    save(model, tmp_path / "base" / "tiny")
    how = {"text": tmp_path / "text.txt", "seq_len": 70, "num_batches": 0, "device": "cpu"}
    result = many.run(EvaluateRequest(base=tmp_path / "base", work=tmp_path / "work", **how))
    many.refuse_failed(result.content["models"])

    tokens = torch.tensor([SEPARATOR, *content.encode()])
    rows = tokens[: len(tokens) // 70 * 70].reshape(-1, 70)
    with torch.no_grad():
        logits = model(rows).logits.double()
    cost = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    assert result.content["models"][0]["figures"]["perplexity_per_token"] == pytest.approx(cost.exp().item(), rel=1e-5)
