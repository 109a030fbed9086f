"""The folder that pruning leaves: what is in it, what it records, what it refuses, and who can load it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import FAMILIES, VOCABULARY, build, draw_tokens, edit_config, edit_tensors, save, tensors_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from keyreduce.calibration.statistics import LayerStatistics, Statistics
from keyreduce.checkpoint.folder import open_folder
from keyreduce.errors import KeyreduceError
from keyreduce.families import FAMILIES as TABLES
from keyreduce.pruning.methods import METHODS
from keyreduce.pruning.prune import make_plan, parameter_counts, read_record

REPOSITORY = Path(__file__).parents[2]
QUERY = "model.layers.1.attn.q_proj.weight"


def plan_of(folder: Path, *, method: str = "l1", keep: int = 4, statistics=None):
    return make_plan(open_folder(folder), METHODS[method], keep, seed=0, statistics=statistics, inputs={})


def blank_statistics(folder: Path, layers=(0, 1)) -> Statistics:
    source = open_folder(folder)
    sizes = TABLES[source.config["model_type"]].sizes(source.config)
    sums = LayerStatistics.zeros(32, sizes.key_heads, sizes.head_k_dim, torch.device("cpu"))
    return Statistics(source.identity, 0, dict.fromkeys(layers, sums), {})


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_folder_is_complete(tiny_folder, pruned, model_type):
    source = tiny_folder(model_type)
    target = pruned(source, 5)
    names = {path.name for path in source.iterdir()}
    assert {path.name for path in target.iterdir()} == names | {"keyreduce.json"}
    assert {path.name for path in target.parent.iterdir()} == {target.name}
    assert AutoTokenizer.from_pretrained(target)("é")["input_ids"] == [0xC3, 0xA9]
    sizes = TABLES[model_type].sizes(open_folder(source).config)
    assert TABLES[model_type].sizes(open_folder(target).config) == sizes._replace(head_k_dim=5)


def test_the_record_says_what_was_done(tiny_folder, pruned):
    source = tiny_folder("delta_net")
    record = read_record(pruned(source, 5))
    (step,) = record["steps"]
    assert record["dense"] == str(source)
    assert record["versions"]["torch"] == torch.__version__
    assert step["inputs"] == {"source": open_folder(source).identity, "method": "random", "keep": 5, "seed": 3}
    assert (step["before"]["head_k_dim"], step["after"]["head_k_dim"]) == (16, 5)
    assert [len(row) for row in step["kept"]["1"]] == [5, 5]
    assert read_record(source) == {}


def test_layers_and_seeds_draw_their_own_channels(tiny_folder, pruned):
    source = tiny_folder("delta_net")
    kept = [read_record(pruned(source, 5, seed=seed, name=str(seed)))["steps"][0]["kept"] for seed in (0, 1)]
    assert len({str(rows) for layers in kept for rows in layers.values()}) == 4
    assert read_record(pruned(source, 5, seed=0, name="again"))["steps"][0]["kept"] == kept[0]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_sharded_checkpoints_stay_sharded(tmp_path, tiny_folder, pruned, model_type):
    sharded = save(build(model_type), tmp_path / "sharded", max_shard_size="20KB")
    target, whole = pruned(sharded, 5), pruned(tiny_folder(model_type), 5, name="whole")
    assert len(open_folder(target).files) == len(open_folder(sharded).files) > 2
    expected, found = tensors_of(whole), tensors_of(target)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    tokens = draw_tokens(1, 12)
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(folder)(tokens).logits for folder in (target, whole)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_a_pruned_model_can_be_pruned_again(tiny_folder, pruned, model_type):
    source = tiny_folder(model_type)
    once = pruned(source, 9, method="l2", name="once")
    twice = pruned(once, 4, method="l2", name="twice")
    record = read_record(twice)
    assert record["dense"] == str(source)
    assert [step["after"]["head_k_dim"] for step in record["steps"]] == [9, 4]
    assert record["steps"][1]["inputs"]["source"] == open_folder(once).identity
    # Rows keep their norms, so two steps keep what one does.
    expected, found = tensors_of(pruned(source, 4, method="l2", name="at once")), tensors_of(twice)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    logits = AutoModelForCausalLM.from_pretrained(twice)(draw_tokens(1, 70)).logits
    assert logits.shape == (1, 70, VOCABULARY)


def test_parameters_are_counted_as_they_are(tiny_folder, pruned):
    for model_type in FAMILIES:
        source = tiny_folder(model_type)
        counts = parameter_counts(open_folder(source), plan_of(source, keep=5))
        folders = source, pruned(source, 5, method="l1", name=model_type)
        tensors = [tensors_of(folder) for folder in folders]
        assert counts["model"] == tuple(sum(t.numel() for t in named.values()) for named in tensors)
        assert counts["mixer"] == tuple(sum(t.numel() for n, t in named.items() if ".attn." in n) for named in tensors)


def test_hybrid_models_keep_their_softmax_layers(tmp_path, pruned):
    """The layer's tensors have the names of a mixer's; only the config tells that it is none."""
    source = save(build("delta_net", num_hidden_layers=3), tmp_path / "source")
    edit_config(source, attn=[{"layers": [1], "num_heads": 2}])
    target = pruned(source, 5)
    before, after = tensors_of(source), tensors_of(target)
    assert [len(after[f"model.layers.{layer}.attn.k_proj.weight"]) for layer in range(3)] == [10, 32, 10]
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if "layers.1." in name)
    assert read_record(target)["steps"][0]["kept"].keys() == {"0", "2"}


@pytest.mark.parametrize("name", [QUERY, "model.layers.0.attn.k_conv1d.weight"])
def test_a_weight_that_is_not_finite_is_named(tiny_copy, pruned, name):
    folder = tiny_copy()
    edit_tensors(folder, lambda tensors: tensors[name].fill_(float("nan")))
    with pytest.raises(KeyreduceError, match=f"tensor '{name}' of .* holds NaN or inf"):
        pruned(folder, 5, method="l1")
    assert {path.name for path in folder.parent.iterdir()} == {folder.name}


def test_calibration_of_another_model_is_refused(tiny_folder):
    other = blank_statistics(tiny_folder("gated_deltanet"))
    with pytest.raises(KeyreduceError, match=f"made from another model .{other.model[:12]}.*keyreduce calibrate"):
        plan_of(tiny_folder("delta_net"), method="wanda", statistics=other)


def test_calibration_without_some_layers_is_refused(tiny_folder):
    folder = tiny_folder("delta_net")
    with pytest.raises(KeyreduceError, match="lacks layers"):
        plan_of(folder, method="wanda", statistics=blank_statistics(folder, layers=[0]))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_heads": 4}, r"tensor 'model.layers.0.attn.b_proj.weight' .* is \[2, 32\]"),
        ({"hidden_size": 64}, r"tensor 'model.layers.0.attn.q_proj.weight' .* is \[32, 32\]"),
        ({"expand_v": 2}, r"tensor 'model.layers.0.attn.v_proj.weight' .* is \[32, 32\]"),
        ({"num_hidden_layers": 3}, "no tensor 'model.layers.2.attn.q_proj.weight'"),
    ],
)
def test_a_config_of_another_model_is_refused(tiny_copy, changes, told):
    folder = tiny_copy()
    edit_config(folder, **changes)
    with pytest.raises(KeyreduceError, match=told):
        plan_of(folder)


def test_a_tensor_of_another_rank_is_refused(tiny_copy):
    folder = tiny_copy()
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.0.attn.k_conv1d.weight": torch.ones(32, 4)}))
    with pytest.raises(KeyreduceError, match=r"k_conv1d.weight' .* is \[32, 4\]"):
        plan_of(folder)


def test_a_checkpoint_without_projections_is_refused(tiny_copy):
    folder = tiny_copy()
    save_file({"model.embeddings.weight": torch.ones(2, 2)}, folder / "model.safetensors")
    with pytest.raises(KeyreduceError, match="no tensor 'model.layers.0.attn.q_proj.weight'"):
        plan_of(folder)


@pytest.mark.parametrize("record", ['{"steps": 3}', '{"steps": [{}]}', '{"dense": 5}', "[]", "{"])
def test_a_damaged_record_is_refused(tmp_path, record):
    (tmp_path / "keyreduce.json").write_text(record)
    with pytest.raises(KeyreduceError, match=r"keyreduce\.json"):
        read_record(tmp_path)


FRESH = """
import json, sys
import torch, transformers
import fla
if not torch.cuda.is_available():
    import fla_torch
    fla_torch.enable()
for path in sys.argv[1:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    tokens = tokenizer("def", return_tensors="pt").input_ids
    print(json.dumps(model.generate(tokens, max_new_tokens=8, do_sample=False, eos_token_id=None).tolist()))
print([name for name in sys.modules if name.split(".")[0] == "keyreduce"])
"""


def test_a_fresh_process_loads_it_with_fla_and_transformers_alone(tiny_folder, pruned):
    folders = [pruned(tiny_folder(model_type), 5, name=model_type) for model_type in FAMILIES]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "flash-linear-attention"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *folders],
        capture_output=True, text=True, env=environment, cwd=folders[0].parent, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *generated, modules = done.stdout.splitlines()
    assert modules == "[]"
    for folder, line in zip(folders, generated, strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokens = torch.tensor([list(b"def")])
        expected = model.generate(tokens, max_new_tokens=8, do_sample=False, eos_token_id=None)
        assert json.loads(line) == expected.tolist()
