"""The folder that pruning leaves: what is in it, what it records, what it refuses, and who can load it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuts import assert_near, config_of, load, masked, plan_of, set_eps
from cuts import build as build_double
from cuts import cut as write
from tiny_models import FAMILIES, VOCABULARY, build, draw_tokens, edit_config, edit_tensors, save, tensors_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from keyreduce.checkpoint.folder import open_folder
from keyreduce.checkpoint.record import Record
from keyreduce.errors import KeyreduceError
from keyreduce.families import FAMILIES as TABLES
from keyreduce.pruning.prune import write_pruned
from keyreduce.pruning.savings import savings

REPOSITORY = Path(__file__).parents[2]
EVERY_TARGET = {"key": 5, "value": 6, "head": 1}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_folder_is_complete(tiny_folder, pruned, model_type):
    source = tiny_folder(model_type)
    target = pruned(source, 5)
    names = {path.name for path in source.iterdir()}
    assert {path.name for path in target.iterdir()} == names | {"keyreduce.json", "README.md"}
    assert {path.name for path in target.parent.iterdir()} == {target.name}
    assert AutoTokenizer.from_pretrained(target)("é")["input_ids"] == [0xC3, 0xA9]
    sizes = TABLES[model_type].sizes(open_folder(source).config)
    assert TABLES[model_type].sizes(open_folder(target).config) == sizes._replace(head_k_dim=5)


def test_the_record_says_what_was_done(tiny_folder, tmp_path):
    source = open_folder(tiny_folder("delta_net"))
    plan = plan_of(source, {"key": 5}, "rrqr")
    told = []
    returned = write_pruned(source, plan, tmp_path / "pruned", dense="tiny", progress=told.append)
    record = Record.read(tmp_path / "pruned")
    assert returned == savings(source, open_folder(tmp_path / "pruned"))
    assert sum(told) == sum(tensor.nbytes for tensor in tensors_of(tmp_path / "pruned").values())
    (step,) = record.steps
    assert (record.dense, record.dense_identity, record.shipped_by) == ("tiny", source.identity, "fla")
    assert torch.__version__.startswith(record.versions["torch"])
    assert record.identity == open_folder(tmp_path / "pruned").identity
    assert step["ran"] == {"key": "rrqr"}
    assert step["methods"]["rrqr"]["options"] == {"f": 1.5, "permute": False}
    assert step["figures"] == {name: list(values) for name, values in returned._asdict().items()}
    assert step["inputs"] == {"source": source.identity, "method": "rrqr", "targets": ["key"]}
    assert step["smaller"] == returned.sentence
    layer = step["layers"]["1"]
    assert (layer["before"]["head_k_dim"], layer["after"]["head_k_dim"]) == (16, 5)
    assert layer["key"] == plan.layers[1].key_HR.tolist()
    assert len(layer["report"]["key"]["rho"]) == 2
    assert Record.read(source.path) == Record()


@pytest.mark.parametrize("damaged", ["model.layers.1.attn.k_proj.weight", "model.layers.1.mlp.up_proj.weight"])
@pytest.mark.parametrize("case", ["missing", "left over", "of another shape"])
def test_what_was_written_is_held_against_the_table_and_the_source(tiny_folder, tmp_path, monkeypatch, damaged, case):
    from keyreduce.pruning import prune

    def rewrite(source, target, **options):
        checksums = rewritten(source, target, **options)
        more = {"left over": {damaged.replace("weight", "more"): torch.ones(2)}}.get(case, {damaged: torch.ones(2)})
        edit_tensors(target, lambda tensors: tensors.pop(damaged) if case == "missing" else tensors.update(more))
        return checksums

    rewritten = prune.rewrite
    monkeypatch.setattr(prune, "rewrite", rewrite)
    source = open_folder(tiny_folder("delta_net"))
    name = damaged.replace("weight", "more") if case == "left over" else damaged
    with pytest.raises(KeyreduceError, match=f"the tensors of {tmp_path / 'cut'} are not those .*; {case}: {name}"):
        write_pruned(source, plan_of(source, {"key": 5}), tmp_path / "cut", dense="tiny")
    assert not list(tmp_path.glob("*cut*"))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_sharded_checkpoints_stay_sharded(tmp_path, tiny_folder, pruned, model_type):
    sharded = save(build(model_type), tmp_path / "sharded", max_shard_size="20KB")
    whole = pruned(tiny_folder(model_type), **EVERY_TARGET, name="whole")
    target = pruned(sharded, **EVERY_TARGET)
    assert len(open_folder(target).shards) == len(open_folder(sharded).shards) > 2
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
    record = Record.read(twice)
    assert record.dense == str(source)
    assert [step["layers"]["0"]["after"]["head_k_dim"] for step in record.steps] == [9, 4]
    assert record.steps[1]["inputs"]["source"] == open_folder(once).identity
    # Rows keep their norms, so two steps keep what one does.
    expected, found = tensors_of(pruned(source, 4, method="l2", name="at once")), tensors_of(twice)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    logits = AutoModelForCausalLM.from_pretrained(twice)(draw_tokens(1, 70)).logits
    assert logits.shape == (1, 70, VOCABULARY)


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_two_cuts_are_one(tmp_path, model_type):
    """Also where the first one folded the norm's weight into the output projection."""
    dense, tokens = build_double(model_type, {"num_heads": 4, "use_gate": True}), draw_tokens(2, 9)
    first = open_folder(save(dense, tmp_path / "source"))
    once = plan_of(first, {"value": 6, "head": 3})
    second = open_folder(write(first, once, tmp_path / "once"))
    twice = plan_of(second, {"value": 3, "key": 5, "head": 2})
    sliced = load(write(second, twice, tmp_path / "twice"), eps=1e-30)
    set_eps(dense, 1e-30)
    middle = load(tmp_path / "once", eps=1e-30)
    found = [middle(tokens).logits, sliced(tokens).logits]
    for model, plan, logits in ((dense, once, found[0]), (middle, twice, found[1])):
        with masked(model, plan):
            assert_near(logits, model(tokens).logits, 1e-8)


def test_hybrid_models_keep_their_softmax_layers(tmp_path, pruned):
    """The layer's tensors have the names of a mixer's; only the config tells that it is none."""
    source = save(build("delta_net", num_hidden_layers=3), tmp_path / "source")
    edit_config(source, attn=[{"layers": [1], "num_heads": 2}])
    target = pruned(source, 5)
    before, after = tensors_of(source), tensors_of(target)
    assert [len(after[f"model.layers.{layer}.attn.k_proj.weight"]) for layer in range(3)] == [10, 32, 10]
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if "layers.1." in name)
    assert Record.read(target).steps[0]["layers"].keys() == {"0", "2"}
    assert config_of(target)["attn"] == config_of(source)["attn"]


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_tied_sixteen_bit_models_stay_what_they_are(tmp_path, model_type):
    model = build_double(model_type, {"tie_word_embeddings": True, "use_gate": True}).bfloat16()
    source = open_folder(save(model, tmp_path / "source"))
    plan = plan_of(source, EVERY_TARGET)
    before, after = tensors_of(source.path), tensors_of(write(source, plan, tmp_path / "cut"))
    assert "lm_head.weight" not in before
    assert after.keys() == before.keys()
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "cut", dtype="auto").dtype == torch.bfloat16
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if ".attn." not in name)
    for layer, cut in plan.layers.items():
        prefix, V = f"model.layers.{layer}.attn.", cut.before.head_v_dim
        kept = zip(cut.value_heads_W.tolist(), cut.value_WR.tolist(), strict=True)
        rows = [V * head + channel for head, channels in kept for channel in channels]
        assert torch.equal(after[f"{prefix}g_proj.weight"], before[f"{prefix}g_proj.weight"][rows])
        # One rounding, of the product of all factors.
        weight = before[f"{prefix}o_norm.weight"].double().repeat(cut.before.value_heads) * (V / 6) ** 0.5
        columns = (before[f"{prefix}o_proj.weight"].float() * weight.float()).bfloat16()[:, rows]
        assert torch.equal(after[f"{prefix}o_proj.weight"], columns)
        assert after[f"{prefix}o_norm.weight"].tolist() == [1.0] * 6


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_sixteen_bit_models_are_cut_exactly_where_nothing_rounds(tmp_path, model_type):
    """A quarter of the value channels stays: the output projection doubles."""
    model = build(model_type, use_gate=True, **{"head_dim": 12, "expand_v": 2 / 3} if "gated" in model_type else {})
    source, tokens = open_folder(save(model.bfloat16(), tmp_path / "source")), draw_tokens(2, 9)
    V = TABLES[model_type].sizes(source.config).head_v_dim
    plan = plan_of(source, {"key": 5, "value": V // 4, "head": 1})
    sliced = load(write(source, plan, tmp_path / "cut"), eps=1e-30)
    dense, found = load(source.path, eps=1e-30), sliced(tokens).logits
    with masked(dense, plan):
        assert_near(found, dense(tokens).logits, 1e-8)


@pytest.mark.parametrize("name", ["model.layers.1.attn.q_proj.weight", "model.layers.0.attn.k_conv1d.weight"])
def test_a_weight_that_is_not_finite_is_named(tiny_copy, pruned, name):
    folder = tiny_copy()
    edit_tensors(folder, lambda tensors: tensors[name].fill_(float("nan")))
    with pytest.raises(KeyreduceError, match=f"tensor '{name}' of .* holds NaN or inf"):
        pruned(folder, 5, method="l1")
    assert {path.name for path in folder.parent.iterdir()} == {folder.name}


@pytest.mark.parametrize("record", ['{"steps": 3}', '{"steps": [{}]}', '{"dense": 5}', "[]", "{"])
def test_a_damaged_record_is_refused(tmp_path, record):
    (tmp_path / "keyreduce.json").write_text(record)
    with pytest.raises(KeyreduceError, match=r"keyreduce\.json"):
        Record.read(tmp_path)


FRESH = """
import json, sys
import torch, transformers
import fla
if not torch.cuda.is_available():
    import fla_torch
    fla_torch.enable()
generated = []
for path in sys.argv[1:]:
    # DeltaNet2, which fla has not, brings its code along.
    remote = path.endswith("delta_net_2")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=remote)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    tokens = tokenizer("def", return_tensors="pt").input_ids
    generated.append(model.generate(tokens, max_new_tokens=8, do_sample=False, eos_token_id=None).tolist())
print()
print(json.dumps([generated, [name for name in sys.modules if name.split(".")[0] == "keyreduce"]]))
"""


def test_a_fresh_process_loads_it_with_fla_and_transformers_alone(tiny_folder, pruned):
    folders = [pruned(tiny_folder(model_type), **EVERY_TARGET, name=model_type) for model_type in FAMILIES]
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY / "flash-linear-attention"),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HOME": str(folders[0].parent / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *folders],
        capture_output=True, text=True, env=environment, cwd=folders[0].parent, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    generated, modules = json.loads(done.stdout.splitlines()[-1])
    assert modules == []
    for folder, found in zip(folders, generated, strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokens = torch.tensor([list(b"def")])
        expected = model.generate(tokens, max_new_tokens=8, do_sample=False, eos_token_id=None)
        assert found == expected.tolist()
