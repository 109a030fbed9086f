"""The Python API: modules in memory give what folders give, bit by bit, and the dense one stays as it is."""

import json
import math
import subprocess
import sys
from pathlib import Path

import hybrid_models
import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import keyreduce
from keyreduce.api.calibrate import CalibrateRequest
from keyreduce.api.calibrate import run as run_calibrate
from keyreduce.api.prune import PruneRequest
from keyreduce.api.prune import run as run_prune
from keyreduce.api.recover import RecoverRequest
from keyreduce.api.recover import run as run_recover
from keyreduce.calibration.file import read_statistics
from keyreduce.errors import KeyreduceError

TEXTS = [
    "Keys are written, values are read. " * 12,
    "What a state holds is of low rank. " * 12,
    "So it may be cut. " * 20,
]
AMOUNT = {"num_batches": 4, "batch_size": 2, "seq_len": 24}


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """The same texts as a file."""
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return file


def folder_of(model_type: str, path: Path) -> Path:
    if model_type in tiny_models.FAMILIES:
        return tiny_models.save(tiny_models.build(model_type), path)
    return hybrid_models.store(hybrid_models.build(model_type), path)


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder)


def parameters_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    ours, theirs = parameters_of(one), parameters_of(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("model_type", [*tiny_models.FAMILIES, "kda", "qwen3_next", "olmo_hybrid"])
def test_modules_give_what_folders_give(model_type, tmp_path, texts):
    folder = folder_of(model_type, tmp_path / "dense")
    dense = load(folder)
    before = parameters_of(dense)
    statistics = keyreduce.calibrate(dense, TEXTS, **AMOUNT)
    small = keyreduce.prune(dense, method="rrqr", target=("key", "value"), ratio=(0.5, "0.25"), statistics=statistics)

    run_calibrate(CalibrateRequest(model=str(folder), output=tmp_path / "sums", text=[texts], device="cpu", **AMOUNT))
    theirs = read_statistics(tmp_path / "sums")
    for layer, sums in statistics.layers.items():
        for name, tensor in sums.tensors().items():
            assert torch.equal(tensor, theirs.layers[layer].tensors()[name]), name
    request = PruneRequest(
        model=str(folder), method="rrqr", target="key,value", ratio="0.5,0.25", calibration=tmp_path / "sums",
        output=tmp_path / "pruned", verify="load",
    )  # fmt: skip
    run_prune(request)
    assert_same(small, load(tmp_path / "pruned"))
    assert type(small) is type(dense)
    assert {name: torch.equal(tensor, before[name]) for name, tensor in dense.named_parameters()} == dict.fromkeys(
        before, True
    )
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(small(tokens).logits, load(tmp_path / "pruned")(tokens).logits)


@pytest.mark.parametrize("mode", ["auto", "least-squares", "reconstruct"])
def test_recovery_in_memory_is_that_of_folders(mode, tmp_path, texts):
    folder = folder_of("delta_net", tmp_path / "dense")
    dense = load(folder)
    settings = AMOUNT | ({"steps": 3} if mode == "reconstruct" else {})
    small = keyreduce.prune(dense, method="l2", ratio=0.5)
    before = parameters_of(dense)
    assert keyreduce.recover(small, teacher=dense, texts=TEXTS, mode=mode, **settings) is small
    run_prune(PruneRequest(model=str(folder), method="l2", ratio="0.5", output=tmp_path / "pruned"))
    folders = {"compressed": str(tmp_path / "pruned"), "output": tmp_path / "recovered"}
    taken = "least-squares" if mode == "auto" else mode
    request = RecoverRequest(mode=taken, **folders, text=[texts], device="cpu", **settings)
    run_recover(request)
    assert_same(small, load(tmp_path / "recovered"))
    refitted, cut = (one.model.layers[0].attn.o_proj.weight for one in (small, load(tmp_path / "pruned")))
    assert not torch.equal(refitted, cut)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.named_parameters())


def test_auto_is_what_the_device_of_a_module_decides():
    dense = tiny_models.build("delta_net")
    small = keyreduce.prune(dense, method="l2", ratio=0.5)
    with pytest.raises(KeyreduceError, match="^on a CPU `mode` auto is least-squares, which takes no `steps`; leave"):
        keyreduce.recover(small, teacher=dense, texts=TEXTS, steps=3)


def test_training_a_module_changes_it_in_place(tmp_path):
    dense = load(folder_of("delta_net", tmp_path / "dense"))
    small = keyreduce.prune(dense, method="l2", ratio=0.5)
    before = parameters_of(small)
    amount = {"num_batches": 2, "batch_size": 2, "seq_len": 16}
    keyreduce.recover(small, teacher=dense, texts=TEXTS, mode="lora", lora_rank=2, device="cpu", **amount)
    changed = {name for name, tensor in small.named_parameters() if not torch.equal(tensor, before[name])}
    assert changed and all("_proj.weight" in name for name in changed)


def test_folders_go_through_the_same_functions(tmp_path):
    folder = folder_of("gated_deltanet", tmp_path / "dense")
    statistics = keyreduce.calibrate(folder, TEXTS, output=tmp_path / "sums", device="cpu", **AMOUNT)
    pruned = keyreduce.prune(folder, method="energy", ratio=0.5, statistics=statistics, output=tmp_path / "pruned")
    assert pruned == tmp_path / "pruned"
    recovered = keyreduce.recover(pruned, texts=TEXTS, output=tmp_path / "recovered", device="cpu", **AMOUNT)
    assert json.loads((recovered / "keyreduce.json").read_text())["repairs"][0]["inputs"]["mode"] == "least-squares"
    cost = keyreduce.evaluate(recovered, TEXTS, num_batches=0, seq_len=24, device="cpu")
    module = keyreduce.evaluate(load(recovered), TEXTS, num_batches=0, seq_len=24)
    assert cost == module
    assert cost.predictions > 100
    with pytest.raises(KeyreduceError, match="give `output`"):
        keyreduce.recover(pruned, texts=TEXTS)


def test_a_model_keeps_its_mode_and_device_and_dtype(tmp_path):
    dense = load(folder_of("gated_deltanet", tmp_path / "dense")).to(torch.bfloat16).train()
    dense.get_parameter("model.layers.0.attn.A_log").data = torch.full((4,), 0.123456789)
    small = keyreduce.prune(dense, method="l2", ratio=0.25)
    assert small.training and small.dtype == torch.bfloat16
    assert torch.equal(small.get_parameter("model.layers.0.attn.A_log"), torch.full((4,), 0.123456789))


def test_what_cannot_be_is_said_in_one_line(tmp_path):
    dense = load(folder_of("delta_net", tmp_path / "dense"))
    statistics = keyreduce.calibrate(dense, TEXTS, **AMOUNT)
    other = load(tiny_models.save(tiny_models.build("delta_net", num_heads=4), tmp_path / "other"))
    with pytest.raises(KeyreduceError, match="`statistics` are of a model of other sizes"):
        keyreduce.prune(other, method="energy", statistics=statistics)
    with pytest.raises(KeyreduceError, match="`method` energy needs `statistics`"):
        keyreduce.prune(dense, method="energy")
    with pytest.raises(KeyreduceError, match="`ratio` is 2; it is the share to remove"):
        keyreduce.prune(dense, method="l2", ratio=2)
    with pytest.raises(KeyreduceError, match="`texts` is one string"):
        keyreduce.evaluate(dense, "some text")
    with pytest.raises(KeyreduceError, match="`texts` holds 1; it is a list of documents"):
        keyreduce.calibrate(dense, [1, 2])
    with pytest.raises(KeyreduceError, match="`texts` holds .*; it is a list of documents .* or of paths alone"):
        keyreduce.calibrate(dense, ["a", Path("b.txt")])
    with pytest.raises(TypeError, match="ratios"):
        keyreduce.prune(dense, ratios=0.5)
    del dense.config._name_or_path
    with pytest.raises(KeyreduceError, match="give `tokenizer`"):
        keyreduce.evaluate(tiny_models.build("delta_net"), TEXTS)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: keyreduce.calibrate(model, TEXTS),
        lambda model: keyreduce.prune(model, method="l2"),
        lambda model: keyreduce.prune(model, method="l2", output="out"),
        lambda model: keyreduce.recover(model, output="out"),
        lambda model: keyreduce.recover("folder", teacher=model, output="out"),
        lambda model: keyreduce.evaluate(model, TEXTS),
    ],
)
def test_what_is_no_model_is_said_in_one_line(call):
    with pytest.raises(KeyreduceError, match="a module of transformers, not a Sequential$"):
        call(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)))


def test_a_module_is_recovered_in_place_and_not_into_a_folder():
    model = tiny_models.build("delta_net")
    with pytest.raises(KeyreduceError, match="`output` is for a folder that is recovered"):
        keyreduce.recover(model, teacher=model, texts=TEXTS, output="out")


def test_a_tokenizer_that_was_given_serves_what_is_pruned_too(tmp_path):
    folder = folder_of("delta_net", tmp_path / "dense")
    dense = tiny_models.build("delta_net")
    statistics = keyreduce.calibrate(dense, TEXTS, tokenizer=AutoTokenizer.from_pretrained(folder), **AMOUNT)
    small = keyreduce.prune(dense, method="wanda", ratio=0.5, statistics=statistics)
    assert keyreduce.evaluate(small, TEXTS, num_batches=1, seq_len=24).predictions == 4 * 23


def test_the_import_loads_nothing_heavy():
    code = "import sys, keyreduce; print(sorted({'torch', 'transformers', 'fla', 'numpy', 'typer'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    assert set(dir(keyreduce)) >= {"calibrate", "prune", "recover", "evaluate", "KeyreduceError"}
    with pytest.raises(AttributeError, match="no attribute 'cut'"):
        keyreduce.cut  # noqa: B018


@pytest.mark.gpu
def test_a_module_on_a_gpu_is_pruned_there_as_on_a_cpu(tmp_path):
    folder = folder_of("delta_net", tmp_path / "dense")
    dense = load(folder).to("cuda", torch.bfloat16)
    before = parameters_of(dense)
    statistics = keyreduce.calibrate(dense, TEXTS, **AMOUNT)
    small = keyreduce.prune(dense, method="rrqr", ratio=0.5, statistics=statistics)
    on_cpu = keyreduce.prune(load(folder).to(torch.bfloat16), method="rrqr", ratio=0.5, statistics=statistics)
    assert small.device.type == "cuda"
    assert_same(small.cpu(), on_cpu)
    small = small.to("cuda")
    keyreduce.recover(small, teacher=dense, texts=TEXTS, steps=4, **AMOUNT)  # auto is a mode that takes steps there
    assert small.device.type == "cuda" and small.dtype == torch.bfloat16
    costs = [keyreduce.evaluate(one, TEXTS, num_batches=1, seq_len=24).perplexity for one in (dense, small)]
    assert all(1 < cost < math.inf for cost in costs)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.named_parameters())
