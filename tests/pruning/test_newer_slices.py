"""What a cut means for the models whose mixers are alike those of others: the proofs of ``test_hybrid_slices.py``.

Larger models are among them, of which the class is that of their config's ``architectures``.
"""

import hybrid_models
import pytest
import torch
from cuts import assert_near, config_of, cut, load, masked, plan_of
from hybrid_models import ALIKE, NEWER, WRAPPED, marked
from safetensors.torch import save_file
from test_exact_slices import EPS, assert_identical
from tiny_models import draw_tokens, tensors_of
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, PreTrainedModel

from keyreduce.checkpoint.dcp import write_dcp
from keyreduce.checkpoint.dcp_source import DcpCheckpoint
from keyreduce.checkpoint.folder import open_folder
from keyreduce.errors import KeyreduceError
from keyreduce.families import family_of
from keyreduce.models.classes import family_in, outputs_of
from keyreduce.pruning.budget import SIZE_OF
from keyreduce.pruning.masked import check_logits
from keyreduce.pruning.methods import METHODS
from keyreduce.pruning.planning import check_method

CPU, TOLERANCE = torch.device("cpu"), 2e-4
ALL = pytest.mark.parametrize("model_type", marked(NEWER))
CUT = {"key": 5, "value": 5, "head": 1}
# Value channels of a bottleneck are not masked but narrowed, and some configs say one size for keys and values.
EXACT = {name: CUT for name in NEWER} | {"glm5_next": {"head": 1}, "precond_kda": {"key": 5, "head": 1}}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Model type -> its opened folder, made once."""
    made = {}

    def make(model_type):
        if model_type not in made:
            folder = tmp_path_factory.mktemp(model_type) / "dense"
            made[model_type] = open_folder(hybrid_models.store(hybrid_models.build(model_type), folder))
        return made[model_type]

    return make


@pytest.fixture(scope="module")
def pruned(dense, tmp_path_factory):
    """Model type -> its folder with all that can be cut cut, made once."""
    made = {}

    def make(model_type):
        if model_type not in made:
            source = dense(model_type)
            made[model_type] = cut(source, plan_of(source, CUT), tmp_path_factory.mktemp(model_type) / "cut")
        return made[model_type]

    return make


@ALL
@torch.no_grad()
def test_sliced_is_masked(tmp_path, dense, model_type):
    source, tokens = dense(model_type), draw_tokens(2, 70)
    plan = plan_of(source, EXACT[model_type])
    assert sorted(plan.layers) == [0, 2]
    sliced = load(cut(source, plan, tmp_path / "cut"), torch.float32, eps=EPS)
    whole = load(source.path, torch.float32, eps=EPS)
    unmasked = outputs_of(whole, tokens)
    with masked(whole, plan):
        expected = outputs_of(whole, tokens)
    assert (unmasked - expected).abs().max() > 0.01 * expected.abs().max()
    assert_near(outputs_of(sliced, tokens), expected, TOLERANCE)


@ALL
def test_the_check_of_logits_passes_what_is_right(dense, pruned, model_type):
    plan = plan_of(dense(model_type), CUT)
    assert check_logits(dense(model_type), pruned(model_type), plan, device=CPU) < TOLERANCE


@pytest.mark.parametrize("model_type", marked(name for name in NEWER if name != "jev"))  # it has no cache
@torch.no_grad()
def test_steps_through_the_cache_give_the_logits_of_one_pass(pruned, model_type):
    model, tokens = load(pruned(model_type), torch.float32), draw_tokens(2, 12)
    result = model(input_ids=tokens[:, :8], use_cache=True)
    logits = [result.logits]
    for step in range(8, 12):
        result = model(input_ids=tokens[:, step : step + 1], past_key_values=result.past_key_values, use_cache=True)
        logits.append(result.logits)
    assert_near(torch.cat(logits, dim=1), model(input_ids=tokens, use_cache=False).logits, TOLERANCE)


@pytest.mark.parametrize("method", ["random", "rrqr"])
@ALL
def test_keeping_all_is_the_identity(tmp_path, dense, model_type, method):
    source = dense(model_type)
    sizes = family_of(source.config).sizes(source.config)
    keep = {target: getattr(sizes, SIZE_OF[target]) for target in METHODS[method].select}
    assert_identical(source.path, cut(source, plan_of(source, keep, method), tmp_path / "cut"))


@ALL
def test_what_has_no_mixer_is_copied(dense, pruned, model_type):
    before, after = tensors_of(dense(model_type).path), tensors_of(pruned(model_type))
    assert after.keys() == before.keys()
    family = family_of(dense(model_type).config, before)
    mixers = tuple(family.tensor_name(layer, "") for layer in (0, 2))
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed and all(name.startswith(mixers) for name in changed)


@ALL
def test_a_distributed_checkpoint_holds_the_same(tmp_path, pruned, model_type):
    source = open_folder(pruned(model_type))
    (tmp_path / "dcp").mkdir()
    write_dcp(source, tmp_path / "dcp")
    (tmp_path / "dcp" / "config.json").write_text((source.path / "config.json").read_text())
    found = DcpCheckpoint(tmp_path / "dcp")
    assert found.tensors.keys() >= source.tensors.keys()
    for name in source.tensors:
        assert torch.equal(found.read(name), source.read(name)), name


@pytest.mark.parametrize("model_type", marked(["qwen4_exp_text", "lara_mini", "minicpmv4_6", "jev"]))
def test_projections(tmp_path, dense, model_type):
    source = dense(model_type)
    plan = plan_of(source, {"key": 5}, "pca")
    target = cut(source, plan, tmp_path / "cut")
    assert check_logits(source, target, plan, device=CPU) < TOLERANCE


@pytest.mark.parametrize("model_type", marked(["bailing_hybrid", "glm5_next", "precond_gated_deltanet"]))
def test_mixing_key_channels_is_refused(dense, model_type):
    own = "has the sum of its squares as preconditioner" if "precond" in model_type else "decays at a rate of its own"
    with pytest.raises(KeyreduceError, match=f"in this architecture each {own}"):
        check_method(dense(model_type), METHODS["pca"], ["key"])


@pytest.mark.parametrize("model_type", marked(["lara_mini"]))
def test_the_fused_projection_of_lara_mini_is_one_tensor(dense, model_type):
    tensors = dense(model_type).tensors
    assert tensors["model.layers.0.linear_attn.in_proj.weight"].shape == (2 * 16 + 2 * 24 + 2 * 4, 32)
    assert not [name for name in tensors if "in_proj_" in name]


@pytest.mark.parametrize("model_type", marked(WRAPPED))
def test_only_the_sizes_of_the_language_model_change_in_a_config(dense, pruned, model_type):
    before, after = dense(model_type).config, config_of(pruned(model_type))
    assert {name for name in before if before[name] != after[name]} == {"text_config"}
    inner = {name for name, value in before["text_config"].items() if after["text_config"][name] != value}
    sizes = {"linear_num_heads", "linear_head_dim"} if model_type == "glm5_next" else {
        "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim",
    }  # fmt: skip
    assert inner == sizes


def test_the_head_of_a_decision_model_goes_along(tmp_path):
    """Beside the weights of a model of its own type, as decision models are published."""
    dense = hybrid_models.store(hybrid_models.build("qwen3_5"), tmp_path / "dense")
    save_file({"weight": torch.ones(2, 3)}, dense / "head.safetensors")
    (dense / "judge_config.json").write_text("{}")
    source = open_folder(dense)
    target = cut(source, plan_of(source, CUT), tmp_path / "cut")
    assert "weight" not in source.tensors
    for name in ("head.safetensors", "judge_config.json"):
        assert (target / name).read_bytes() == (dense / name).read_bytes()


@pytest.mark.parametrize("model_type", marked(["bailing_hybrid"]))
def test_heads_of_bailing_hybrid_go_without_those_of_its_attention(pruned, dense, model_type):
    """On the hub its config says one number of heads for both, and one size of the heads of mixers."""
    before, after = dense(model_type).config, config_of(pruned(model_type))
    assert (after["linear_num_heads"], after["num_attention_heads"]) == (1, before["num_attention_heads"])
    family = family_of(before)
    published = {name: value for name, value in before.items() if not name.startswith("linear_")} | {"head_dim": 8}
    assert family.layer_sizes(published) == family.layer_sizes(before)
    resized = family.resized(published, plan_of(dense(model_type), CUT).after)
    assert (resized["head_dim"], resized["linear_num_heads"], "linear_head_dim" in resized) == (5, 1, False)
    theirs = AutoConfig.for_model(**resized)
    assert (theirs.linear_head_dim, theirs.linear_num_heads, theirs.num_attention_heads) == (5, 1, 2)


class _MadeUpConfig(type(AutoConfig.for_model("qwen3_5"))):
    """A larger model that no table names, whose language model is one of Qwen3.5."""

    model_type = "made_up"


class _MadeUp(PreTrainedModel):
    config_class = config = _MadeUpConfig
    base_model_prefix = "body"

    def __init__(self, config):
        super().__init__(config)
        self.body = _Body(config)
        self.lm_head = torch.nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.body.reader.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, **rest):
        result = self.body(input_ids=input_ids, **rest)
        result["logits"] = self.lm_head(result.last_hidden_state)
        return result


class _Body(PreTrainedModel):
    config_class = config = _MadeUpConfig

    def __init__(self, config):
        super().__init__(config)
        self.reader = AutoModel.from_config(config.text_config)
        self.post_init()

    def forward(self, input_ids=None, **rest):
        return self.reader(input_ids=input_ids, **rest)


@torch.no_grad()
def test_a_larger_model_that_no_table_names_is_known_by_its_language_model(tmp_path):
    AutoConfig.register("made_up", _MadeUpConfig, exist_ok=True)
    AutoModelForImageTextToText.register(_MadeUpConfig, _MadeUp, exist_ok=True)
    text = hybrid_models.LANGUAGE["qwen3_5_text"] | dict(model_type="qwen3_5_text")
    torch.manual_seed(0)
    model = _MadeUp(_MadeUpConfig(text_config=text, vision_config=hybrid_models._VISION)).eval()
    source = open_folder(hybrid_models.store(model, tmp_path / "dense"))
    assert family_in(model).mixer == "body.reader.layers.{layer}.linear_attn"
    assert family_of(source.config, source.tensors).mixer.endswith("layers.{layer}.linear_attn")
    plan = plan_of(source, CUT)
    target = cut(source, plan, tmp_path / "cut")
    assert check_logits(source, target, plan, device=CPU) < TOLERANCE
    assert config_of(target)["text_config"]["linear_key_head_dim"] == 5


@pytest.mark.parametrize("text", [{"model_type": "qwen3"}, {"model_type": "mom"}])
def test_larger_models_of_other_language_models_are_refused(text):
    with pytest.raises(KeyreduceError, match=f"text_config of model_type 'minicpmv4_6': .*{text['model_type']}"):
        family_of({"model_type": "minicpmv4_6", "text_config": text})


def test_all_are_proven():
    assert {*ALIKE, *WRAPPED} - {*NEWER} == {"glm5_next_text"}
