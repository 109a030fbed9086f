"""Every recipe that ships and every model config of configs/ is read by what is to read it."""

import json
import math
from pathlib import Path

import pytest
from tiny_models import file_shapes
from transformers import AutoConfig

from keyreduce.api.prune import Cut
from keyreduce.checkpoint.shards import TensorSpec
from keyreduce.families import family_of
from keyreduce.sweep.recipe import read_recipe, shipped_recipes

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = [*shipped_recipes().values()]
MODELS = sorted((CONFIGS / "models").glob("*.json"))
# Parameters and tensors: of the published delta_net-1.3B-100B as its model card and file have them.
PUBLISHED = {"delta-net-1.3b": (1_365_677_056, 339)}
SIZES = {"340m": (330e6, 410e6), "1.3b": (1.25e9, 1.45e9)}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_parse(path):
    recipe = read_recipe(path)
    assert recipe.combinations and recipe.models


def test_there_are_recipes_and_configs_of_both_sizes():
    assert {"340m", "1.3b", "quality", "quick", "methods"} <= {path.stem for path in RECIPES}
    of_size = {size: {path.stem for path in MODELS if path.stem.endswith(size)} for size in SIZES}
    for size, names in of_size.items():
        assert names == {f"delta-net-{size}", f"gated-deltanet-{size}", f"delta-net-2-{size}"}


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_model_configs(path):
    config = json.loads(path.read_text())
    theirs = AutoConfig.for_model(**config)
    for name in ("hidden_size", "num_hidden_layers", "num_heads", "vocab_size"):
        assert getattr(theirs, name) == config[name]
    shapes = file_shapes(config)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    least, most = SIZES[path.stem.rsplit("-", 1)[1]]
    assert least < parameters < most
    if path.stem in PUBLISHED:
        assert (parameters, len(shapes)) == PUBLISHED[path.stem]
    family = family_of(config)
    sizes = family.layer_sizes(config)
    assert len(sizes) == config["num_hidden_layers"]
    assert {size.head_k_dim for size in sizes.values()} <= {128, 256}


def test_models_of_the_scale_study():
    named = {path.stem: json.loads(path.read_text()) for path in (CONFIGS / "scale").glob("*.json")}
    assert {name.rsplit("-", 1)[0] for name in named} >= {"delta-net", "gated-deltanet", "qwen3-next", "olmo-hybrid"}
    for name, config in named.items():
        parameters = sum(math.prod(shape) for shape in file_shapes(config).values())
        assert parameters / 1e6 == pytest.approx(int(name.rsplit("-", 1)[1].removesuffix("m")), rel=0.09)
        sizes = family_of(config).layer_sizes(config)
        is_hybrid = "layer_types" in config
        assert len(sizes) == config["num_hidden_layers"] * (3 / 4 if is_hybrid else 1)
        # What flame/pretrain.py asks of a config whose tokenizer is trained on the spot.
        assert config["bos_token_id"] == config["eos_token_id"] == 0


@pytest.mark.parametrize("size", SIZES)
def test_recipes_of_a_size_can_prune_each_model_of_it(size):
    recipe = read_recipe(Path(size))
    for path in (path for path in MODELS if path.stem.endswith(size)):
        source = _Described(json.loads(path.read_text()), path)
        for combination in recipe.combinations:
            Cut.of(combination.request).check(source)


class _Described:
    """What `Cut.check` looks at of a checkpoint: the config, and the tensors that it asks for."""

    def __init__(self, config: dict, path: Path):
        self.config, self.path = config, path
        shapes = file_shapes(config)
        self.tensors = {name: TensorSpec(name, "BF16", shape) for name, shape in shapes.items()}
        self.shapes = shapes
