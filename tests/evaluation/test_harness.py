"""lm-evaluation-harness on tiny models, with tasks and data of this file: no network."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import build, edit_tensors, save

from keyreduce.api.evaluate import EvaluateRequest
from keyreduce.checkpoint.dcp import write_dcp
from keyreduce.checkpoint.find import find_model
from keyreduce.checkpoint.folder import open_folder
from keyreduce.cli import eval as command
from keyreduce.cli.console import Console
from keyreduce.errors import KeyreduceError
from keyreduce.evaluation.harness import (
    TaskMetric,
    Tasks,
    find_tasks,
    main_metrics,
    run_tasks,
    task_metrics,
    write_results,
)
from keyreduce.models.loading import LoadedModel, load_model

pytest.importorskip("lm_eval", reason="needs the extra: harness")

QUESTIONS = [
    {"question": "for i in", "choices": ["range(9):", "x", "the state"], "label": 0},
    {"question": "import", "choices": ["low", "os", "rank as r"], "label": 1},
    {"question": "def f(x):\n    return", "choices": ["x + 1", "12", "none of it"], "label": 2},
    {"question": "keys", "choices": ["and values", "a", "bb"], "label": 0},
]
PAGES = ["the state is low-rank, and é 四 😀 are bytes", "x y z", "def f(x):\n    return x\n" * 5]
SEPARATOR = 256

CHOICE = """
task: own_choice
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
ROLLING = """
task: own_pages
dataset_path: json
dataset_kwargs: {data_files: {test: PAGES}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
"""
WRITING = """
task: own_writing
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 6, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
ABSENT = """
task: own_absent
dataset_path: json
dataset_kwargs: {data_files: {test: /no/such/file.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
"""


@pytest.fixture(scope="module")
def own_tasks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = {"QUESTIONS": QUESTIONS, "PAGES": [{"page": page} for page in PAGES]}
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    for task in (CHOICE, ROLLING, WRITING, ABSENT):
        for name in rows:
            task = task.replace(name, str(folder / f"{name}.jsonl"))
        (folder / f"{task.split()[1]}.yaml").write_text(task)
    return folder


@pytest.fixture(scope="module", autouse=True)
def without_network(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        import datasets
        import huggingface_hub.constants

        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        # The harness describes the machine after each run, by starting a dozen programs.
        patch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "a machine")
        yield


@pytest.fixture(scope="module")
def everything(own_tasks) -> Tasks:
    """Our tasks without those of the harness, which take seconds to find."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(own_tasks), include_defaults=False)
    assert manager.all_tasks == ["own_absent", "own_choice", "own_pages", "own_writing"]
    return Tasks((), manager)


def of(everything: Tasks, *names: str) -> Tasks:
    return Tasks(names, everything.manager)


def load(folder: Path) -> LoadedModel:
    return load_model(folder, torch.device("cpu"), torch.float32)


@torch.no_grad()
def slow_cost(model: torch.nn.Module, context: list[int], continuation: list[int]) -> float:
    """The log-probability of a continuation, one token at a time, in float64."""
    total, tokens = 0.0, list(context)
    for token in continuation:
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
        total += float(logits.double().log_softmax(dim=-1)[token])
        tokens.append(token)
    return total


@pytest.mark.parametrize("model_type", ["delta_net", "gated_deltanet", "delta_net_2"])
def test_figures_agree_with_the_definition(everything, tiny_folder, model_type):
    loaded = load(tiny_folder(model_type))
    loaded.tokenizer.pad_token = None
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    results = run_tasks(loaded, of(everything, "own_choice", "own_pages"), batch_size=3)
    found = {(one.task, one.metric): one.value for one in task_metrics(results)}

    right = normalized = 0
    for row in QUESTIONS:
        costs = [
            slow_cost(loaded.model, list(row["question"].encode()), list(f" {choice}".encode()))
            for choice in row["choices"]
        ]
        lengths = [len(choice) for choice in row["choices"]]
        right += max(range(3), key=lambda one: costs[one]) == row["label"]
        normalized += max(range(3), key=lambda one: costs[one] / lengths[one]) == row["label"]
    assert found["own_choice", "acc"] == pytest.approx(right / len(QUESTIONS))
    assert found["own_choice", "acc_norm"] == pytest.approx(normalized / len(QUESTIONS))

    cost = sum(slow_cost(loaded.model, [SEPARATOR], list(page.encode())) for page in PAGES)
    words, num_bytes = sum(len(page.split()) for page in PAGES), sum(len(page.encode()) for page in PAGES)
    # A page that ends in a space counts one empty word more, as the harness splits it.
    words += sum(page[-1].isspace() for page in PAGES)
    assert found["own_pages", "word_perplexity"] == pytest.approx(math.exp(-cost / words), rel=1e-4)
    assert found["own_pages", "bits_per_byte"] == pytest.approx(-cost / num_bytes / math.log(2), rel=1e-5)
    after = loaded.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert loaded.tokenizer.pad_token is None


def test_what_is_written_is_what_the_harness_writes(everything, tiny_folder, tmp_path, monkeypatch):
    """Against the harness alone, which loads the folder by itself, and saves its results as its command does."""
    import lm_eval
    from lm_eval.loggers import EvaluationTracker

    folder = tiny_folder("delta_net")
    tasks = of(everything, "own_choice")
    results = run_tasks(load(folder), tasks, num_fewshot=1, limit=2, batch_size=2, command="keyreduce eval")
    write_results(tmp_path / "ours.json", results)
    ours = json.loads((tmp_path / "ours.json").read_text())

    tracker = EvaluationTracker(output_path=str(tmp_path / "theirs.json"))
    returned = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": "float32"},
        tasks=["own_choice"],
        task_manager=tasks.manager,
        num_fewshot=1,
        limit=2,
        batch_size=2,
        device="cpu",
        evaluation_tracker=tracker,
    )
    tracker.save_results_aggregated(returned, returned.pop("samples"))
    (written,) = tmp_path.glob("theirs_*.json")
    theirs = json.loads(written.read_text())

    provenance = ours.pop("keyreduce")
    assert list(ours) == list(theirs)
    assert ours["config"].pop("model") == str(folder) and theirs["config"].pop("model") == "hf"
    assert ours.pop("model_source") == "CUSTOM" and theirs.pop("model_source") == "hf"
    for name in ("date", "total_evaluation_time_seconds", "start_time", "end_time"):
        ours.pop(name, None), theirs.pop(name, None)
    assert ours == theirs
    assert ours["n-samples"]["own_choice"]["effective"] == 2 and ours["n-shot"]["own_choice"] == 1

    assert provenance["identity"] == open_folder(folder).identity
    assert (provenance["model"], provenance["command"]) == (str(folder), "keyreduce eval")
    assert (provenance["tasks"], provenance["num_fewshot"], provenance["limit"]) == (["own_choice"], 1, 2)
    assert provenance["versions"]["lm_eval"] == theirs["lm_eval_version"]
    assert "dense" not in provenance


def test_a_dcp_gives_the_same(everything, tiny_folder, tmp_path):
    folder = tiny_folder("gated_deltanet")
    write_dcp(open_folder(folder), tmp_path / "dcp" / "step-0")
    tasks = of(everything, "own_pages")
    one, other = (run_tasks(load(find_model(str(path))), tasks) for path in (folder, tmp_path / "dcp"))
    assert one["results"] == other["results"]
    assert one["task_hashes"] == other["task_hashes"] and one["task_hashes"]["own_pages"]
    assert one["keyreduce"]["identity"] == other["keyreduce"]["identity"]


def test_texts_of_several_lengths_are_written_in_one_batch(everything, tiny_folder):
    tasks = of(everything, "own_writing")
    loaded = load(tiny_folder("delta_net"))
    assert [one.metric for one in task_metrics(run_tasks(loaded, tasks, batch_size=1))] == ["exact_match"]
    texts = []
    for batch_size in (1, 3):
        outputs = []
        with pytest.MonkeyPatch.context() as patch:
            generate = loaded.model.generate

            def record(*positional, **options):
                outputs.extend(made := generate(*positional, **options))  # noqa: B023
                return made

            patch.setattr(loaded.model, "generate", record)
            run_tasks(loaded, tasks, batch_size=batch_size)
        texts.append(sorted(bytes(token for token in row.tolist()[-6:] if token < 256) for row in outputs))
    assert texts[0] == texts[1] and len(texts[0]) == len(QUESTIONS)


def test_a_pruned_model_says_what_it_was_made_from(everything, tiny_copy):
    folder = tiny_copy()
    (folder / "keyreduce.json").write_text(json.dumps({"dense": "owner/dense"}))
    provenance = run_tasks(load(folder), of(everything, "own_choice"), limit=1)["keyreduce"]
    assert provenance["dense"] == "owner/dense"


def test_logits_that_are_not_finite_are_refused(everything, tiny_copy):
    folder = tiny_copy()
    edit_tensors(folder, lambda tensors: tensors["lm_head.weight"][3].fill_(1e38))
    loaded = load(folder)
    with pytest.raises(KeyreduceError, match="hold NaN or inf"):
        run_tasks(loaded, of(everything, "own_choice"), limit=1)
    assert not loaded.model._forward_hooks


def test_data_that_cannot_be_had_is_told_in_one_line(everything, tiny_folder):
    with pytest.raises(KeyreduceError, match=r"lm-evaluation-harness stopped: .*file\.jsonl") as told:
        run_tasks(load(tiny_folder("delta_net")), of(everything, "own_absent"))
    assert "\n" not in str(told.value)


def test_stdout_is_left_to_the_command(everything, tiny_folder, capsys, monkeypatch):
    loaded = load(tiny_folder("delta_net"))
    monkeypatch.setattr(loaded.model, "tie_weights", lambda: print("a remark"))
    run_tasks(loaded, of(everything, "own_choice"), limit=1)
    out, err = capsys.readouterr()
    assert out == "" and "a remark" in err and "already-initialized" not in err


@pytest.fixture
def index(monkeypatch):
    """Of the harness's thousands of tasks those of the paper alone, which takes a tenth of the time."""
    import lm_eval.tasks

    own = Path(lm_eval.tasks.__file__).parent
    folders = [own / name for name in ("wikitext", "lambada", "piqa", "hellaswag", "winogrande", "arc")]

    class Index(lm_eval.tasks.TaskManager):
        def __init__(self, include_path=None):
            super().__init__(include_path=[*folders, *filter(None, [include_path])], include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Index)


def test_names_of_tasks(index, own_tasks):
    assert find_tasks(["paper"]).names == (
        "wikitext",
        "lambada_openai",
        "piqa",
        "hellaswag",
        "winogrande",
        "arc_easy",
        "arc_challenge",
    )
    names = find_tasks(["arc_*", "piqa", "arc_easy"]).names
    assert {"arc_challenge", "arc_easy"} < set(names) and names[-1] == "piqa" and len(set(names)) == len(names)
    file = str(own_tasks / "own_choice.yaml")
    assert find_tasks([file]).names == (file,)
    assert find_tasks(["own_*", "piqa"], own_tasks).names[1:] == ("own_choice", "own_pages", "own_writing", "piqa")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["wikitxt"], "no task 'wikitxt'; did you mean wikitext?"),
        (["piqa", "zzzz"], "no task 'zzzz' "),
        (["zzzz_*"], "no task 'zzzz_"),
        (["no such.yaml"], "no file no such.yaml"),
        ([], "name a task"),
    ],
)
def test_names_that_are_none(index, names, message):
    with pytest.raises(KeyreduceError) as told:
        find_tasks(names)
    assert message in str(told.value) and "\n" not in str(told.value)


def test_what_cannot_be_done_is_told_before_anything_is_read(index, tmp_path, monkeypatch):
    with pytest.raises(KeyreduceError, match=r"no folder .*absent of tasks"):
        find_tasks(["piqa"], tmp_path / "absent")
    for name, value in {"TORCHELASTIC_RUN_ID": "one", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(KeyreduceError, match="leave out torchrun"):
        find_tasks(["piqa"])
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(KeyreduceError, match=r"pip install 'keyreduce\[harness\]'"):
        find_tasks(["piqa"])


def test_which_figures_a_table_shows():
    entries = {
        "arc_challenge": {
            "alias": "arc_challenge",
            "sample_len": 3,
            "acc,none": 0.25,
            "acc_stderr,none": 0.125,
            "acc_norm,none": 0.5,
            "acc_norm_stderr,none": "N/A",
        },
        "own": {"exact_match,strict": math.nan, "exact_match_stderr,strict": 0.0, "f1,none": 1},
    }
    found = task_metrics({"results": entries})
    assert found == [
        TaskMetric("arc_challenge", "acc", 0.25, 0.125),
        TaskMetric("arc_challenge", "acc_norm", 0.5, None),
        TaskMetric("own", "exact_match,strict", None, 0.0),
        TaskMetric("own", "f1", 1.0, None),
    ]
    assert main_metrics(found) == [found[1], found[2]]


def test_text_is_written_as_it_is(tmp_path):
    content = {"configs": {"a": "[1,   2]", "é": [1.0, math.inf]}}
    write_results(tmp_path / "results.json", content)
    assert (tmp_path / "results.json").read_text() == json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    with pytest.raises(KeyreduceError, match="exists"):
        write_results(tmp_path / "results.json", content)


@pytest.mark.parametrize("limit", [0, -1, math.nan, math.inf])
def test_a_limit_must_leave_something(limit):
    with pytest.raises(KeyreduceError, match="`limit` is"):
        EvaluateRequest(limit=limit)
    assert (EvaluateRequest(limit=0.5).limit, EvaluateRequest(limit=3).limit) == (0.5, 3)


def test_the_table_of_two_models(everything, tiny_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "argv", ["/bin/keyreduce", "eval"])
    monkeypatch.setattr("keyreduce.evaluation.harness.find_tasks", lambda names, _: of(everything, *names))
    output = tmp_path / "out" / "eval.json"
    request = EvaluateRequest(
        model=str(tiny_folder("delta_net")),
        compressed=str(save(build("delta_net", seed=1), tmp_path / "other")),
        tasks=("own_choice", "own_pages"),
        num_batches=1,
        seq_len=64,
        output=output,
        device="cpu",
    )
    command.show(request, Console(as_json=False))
    out = capsys.readouterr().out
    entries = json.loads(output.read_text())["models"]
    for entry in entries:
        written = json.loads(Path(entry["tasks_file"]).read_text())
        assert entry["tasks"] == [one._asdict() for one in task_metrics(written)]
        assert written["keyreduce"]["command"] == "keyreduce eval"
        assert Path(entry["tasks_file"]) == tmp_path / "out" / f"eval-tasks-{entry['label']}.json"
    (row,) = (line.split() for line in out.splitlines() if line.split()[:2] == ["own_pages", "bits_per_byte"])
    dense, pruned = (entry["tasks"][-1]["value"] for entry in entries)
    assert row[2:] == [f"{dense:.3f}", f"{pruned:.3f}", f"{pruned - dense:+.4f}"]
    monkeypatch.setenv("WORLD_SIZE", "8")  # as clusters set it for one process too
    command.show(replace(request, compressed=None, work=tmp_path, overwrite=True), Console(as_json=False))
    out = capsys.readouterr().out
    assert "difference" not in out and f"{dense:.3f}" in out
