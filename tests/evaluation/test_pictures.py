"""What the pictures show: the numbers behind their images and lines, against plain loops.

Shapes: X heads, R channels, K taps.
"""

import hybrid_models
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.image import imread
from tiny_models import build
from tiny_models import save as save_model

from keyreduce import drawing
from keyreduce.checkpoint.folder import open_folder
from keyreduce.errors import KeyreduceError
from keyreduce.evaluation.filters import filters_of
from keyreduce.evaluation.kept import Kept
from keyreduce.evaluation.pictures import (
    draw_curves,
    draw_filters,
    draw_folder,
    draw_heat_map,
    draw_kept_channels,
    refuse_other_files,
)
from keyreduce.families import MixerSizes

POSITIONS = [4, 8, 10]
# Layer 1 has softmax attention; the pruned model has lost head 1 of layer 2.
HEADS = {"dense": {0: [0, 1], 2: [0, 1]}, "pruned": {0: [0, 1], 2: [0]}}


SIZES = {"dense": (16, 16), "pruned": (8, 16)}


@pytest.fixture
def report() -> dict:
    rng = np.random.default_rng(0)
    models = [
        {
            "label": label,
            "folder": f"somewhere/{label}-model",
            "sequences": 2,
            "layers": [
                {
                    "layer": layer,
                    "head_k_dim": SIZES[label][0],
                    "head_v_dim": SIZES[label][1],
                    "heads": heads,
                    "utilisation": rng.uniform(0.1, 0.4, (len(heads), 3)).tolist(),
                }
                for layer, heads in by_layer.items()
            ],
        }
        for label, by_layer in HEADS.items()
    ]
    text = {"kind": "files", "paths": ["/home/notes.jsonl"], "files": 1}
    return {"text": text, "device": "a device", "positions": POSITIONS, "models": models}


@pytest.fixture
def models(report) -> list[dict]:
    return report["models"]


def ranks(model: dict, entry: dict) -> np.ndarray:
    """The stable ranks ``[W, P]``, not their share of the side, which a cut makes smaller."""
    return np.array(entry["utilisation"]) * min(SIZES[model["label"]])


def images(figure):
    """The data of all images of a figure that are no colour bar's."""
    return [image for axes in figure.axes for image in axes.images]


def test_heat_map(report, models):
    figure = draw_heat_map(report)
    found = images(figure)
    assert [image.axes.get_title() for image in found] == ["dense, states of 16 x 16", "pruned, states of 8 x 16"]
    assert figure.get_suptitle().splitlines() == [
        "dense-model and pruned-model: stable rank of the states",
        "2 sequences of 10 tokens; text: notes.jsonl; a device",
    ]
    top = 0.0
    for image, model in zip(found, models, strict=True):
        rank_LW = np.asarray(image.get_array().filled(np.nan))
        assert rank_LW.shape == (2, 2)
        for row, entry in enumerate(model["layers"]):
            for head, ranks_P in zip(entry["heads"], ranks(model, entry), strict=True):
                mean = sum(ranks_P) / 3
                assert rank_LW[row, head] == pytest.approx(mean)
                assert f"{mean:.1f}" in [text.get_text() for text in image.axes.texts]
                top = max(top, mean)
        assert image.axes.get_xlabel() == "value head"
        assert image.axes.patch.get_hatch()
    assert [label.get_text() for label in found[0].axes.get_yticklabels()] == ["0", "2"]
    assert np.isnan(found[1].get_array().filled(np.nan)[1, 1])
    assert all(image.get_clim() == (0, pytest.approx(top)) for image in found)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["no such head"]
    assert not draw_heat_map(report | {"models": models[:1]}).legends


def test_figures_in_cells_are_left_out_where_they_do_not_fit(report, models):
    heads, sizes = list(range(40)), {"head_k_dim": 16, "head_v_dim": 16}
    layers = [{"layer": layer, **sizes, "heads": heads, "utilisation": [[0.1]] * 40} for layer in range(50)]
    axes = draw_heat_map(report | {"models": [models[0] | {"layers": layers}]}).axes[0]
    assert not axes.texts
    for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in ticks[:3]] == ["0", "2", "4"]


def test_curves(report, models):
    figure = draw_curves(report)
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown] == ["layer 0", "layer 2"]
    for row, axes in enumerate(shown):
        lines = axes.get_lines()
        assert len(lines) == 2
        for line, model, band in zip(lines, models, axes.collections, strict=True):
            rank_WP = ranks(model, model["layers"][row])
            np.testing.assert_array_equal(line.get_xdata(), POSITIONS)
            np.testing.assert_allclose(line.get_ydata(), rank_WP.mean(axis=0))
            corners = band.get_paths()[0].get_extents()
            assert (corners.y0, corners.y1) == (pytest.approx(rank_WP.min()), pytest.approx(rank_WP.max()))
            assert axes.get_ylim()[1] > rank_WP.max()
        # Told apart without colours too.
        assert len({(line.get_linestyle(), line.get_marker()) for line in lines}) == 2
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "dense (16 x 16): mean of the heads", "pruned (8 x 16): mean of the heads", "range of the heads",
    ]  # fmt: skip
    assert (shown[0].get_xlabel(), shown[0].get_ylabel()) == ("tokens read", "stable rank")
    assert "dense-model and pruned-model" in figure.get_suptitle()


KEPT = {
    0: Kept(MixerSizes(2, 4, 4, 3), MixerSizes(1, 2, 2, 2), [1], [2, 3], [[0, 3]], [[0, 1], [1, 2]]),
    2: Kept(MixerSizes(2, 4, 4, 3), MixerSizes(2, 4, 2, 3), [0, 1], [0, 1, 2, 3], None, [[0, 1, 2]] * 4),
}
# 0 removed, 1 kept, 2 of a removed head, 3 projected.
KEY_STATES = [[2] * 4, [1, 0, 0, 1], [3] * 4, [3] * 4]
VALUE_STATES = [[2] * 3, [2] * 3, [1, 1, 0], [0, 1, 1], [1] * 3, [1] * 3, [1] * 3, [1] * 3]


def test_kept_channels():
    figure = draw_kept_channels("a model", KEPT)
    assert figure.get_suptitle() == "a model: what is kept of each head"
    key, value = images(figure)
    np.testing.assert_array_equal(key.get_array(), KEY_STATES)
    np.testing.assert_array_equal(value.get_array(), VALUE_STATES)
    # Of one head: not the sum over heads and layers.
    assert key.axes.get_title() == "key channels of a head: 4 projected onto 2; 1 to 2 of 2 key heads"
    assert value.axes.get_title() == "value channels of a head: 2 to 3 of 3 kept; 2 to 4 of 4 value heads"
    (alike,) = images(draw_kept_channels("a model", {0: KEPT[0]}))[:1]
    assert alike.axes.get_title() == "key channels of a head: 2 of 4 kept; 1 of 2 key heads"
    assert [label.get_text() for label in key.axes.get_yticklabels()] == ["0", "2"]
    assert list(value.axes.get_yticks()) == [1.5, 5.5]
    (legend,) = figure.legends
    for patch, text in zip(legend.get_patches(), legend.get_texts(), strict=True):
        state = ["removed", "kept", "head removed", "projected together"].index(text.get_text())
        assert to_hex(key.cmap(key.norm(state))) == to_hex(patch.get_facecolor())
    assert len(legend.get_patches()) == 4


def test_filters():
    rng = np.random.default_rng(0)
    filters = {"q": rng.normal(size=(2, 4, 3)), "k": rng.normal(size=(2, 4, 3)), "v": rng.normal(size=(4, 3, 3))}
    figure = draw_filters("a model, layer 7", filters, KEPT[0])
    marked = {"q": KEY_STATES[:2], "k": KEY_STATES[:2], "v": VALUE_STATES[:4]}
    for axes, (name, kernels_XRK) in zip(figure.axes, filters.items(), strict=False):
        assert axes.get_title() == f"convolution of {name}"
        weights, bars = (image.get_array().filled(np.nan) for image in axes.images)
        for head, kernels_RK in enumerate(kernels_XRK):
            rows = slice(5 * head + 1, 5 * head + 4)
            np.testing.assert_array_equal(weights[rows], kernels_RK.T)
            np.testing.assert_array_equal(bars[5 * head] == 1, np.array(marked[name][head]) == 1)
        assert np.isnan(weights[::5]).all()
        assert np.isnan(weights[4::5]).all()
        assert np.nansum(bars) == np.sum(np.array(marked[name]) == 1)
        top = np.abs(kernels_XRK).max()
        assert axes.images[0].get_clim() == (-top, top)
    assert "layer 7" in figure.get_suptitle()
    assert "black bar" in figure.get_suptitle()
    assert "black bar" not in draw_filters("a model, layer 7", filters).get_suptitle()
    assert all(len(axes.images) == 1 for axes in draw_filters("a model, layer 7", filters).axes[:3])


def test_projected_and_shared_filters_have_no_marks():
    kernels = np.ones((2, 4, 3))
    figure = draw_filters("", {"q": kernels, "v": np.ones((4, 3, 3))}, KEPT[2])
    assert [len(axes.images) for axes in figure.axes[:2]] == [1, 2]
    shared = draw_filters("", {"q": kernels[:, :1], "kv": kernels[:1, :1]}, KEPT[0])
    assert [len(axes.images) for axes in shared.axes[:2]] == [1, 1]
    assert [axes.get_title() for axes in shared.axes[:2]] == ["convolution of q", "convolution of k and v"]
    assert [axes.get_ylabel() for axes in shared.axes[:2]] == ["head", "all heads alike"]
    assert shared.axes[0].get_ylim() == shared.axes[1].get_ylim()


@pytest.mark.parametrize("model_type", ["delta_net", "gated_deltanet"])
def test_filters_of_a_checkpoint(tiny_folder, model_type):
    mixer = build(model_type).model.layers[1].attn
    found = filters_of(open_folder(tiny_folder(model_type)), 1)
    assert list(found) == ["q", "k", "v"]
    for name, kernels_XRK in found.items():
        channels = mixer.head_v_dim if name == "v" else mixer.head_k_dim
        weight_C1K = getattr(mixer, f"{name}_conv1d").weight
        assert kernels_XRK.shape[1] == channels
        for head, kernels_RK in enumerate(kernels_XRK):
            for channel, kernel_K in enumerate(kernels_RK):
                assert torch.equal(kernel_K, weight_C1K[head * channels + channel, 0])


@pytest.mark.parametrize("model_type", hybrid_models.HYBRIDS)
def test_filters_of_hybrids(tmp_path, model_type):
    model = hybrid_models.build(model_type)
    text_model = model.model.language_model if model_type in hybrid_models.SEEING else model.model
    found = filters_of(open_folder(hybrid_models.store(model, tmp_path)), 2)
    kernels_C1K = text_model.layers[2].linear_attn.conv1d.weight
    assert {name: tuple(kernels.shape[:2]) for name, kernels in found.items()} == {
        "q": (2, 8),
        "k": (2, 8),
        "v": (4, 6),
    }
    joined = torch.cat([found[name].flatten(0, 1) for name in "qkv"])
    assert torch.equal(joined, kernels_C1K[:, 0])


@pytest.mark.filterwarnings("ignore:ShortConvolution is crucial")
@pytest.mark.parametrize(
    ("model_type", "changes", "shapes"),
    [
        ("delta_net", {"use_short_conv": False}, {}),
        ("delta_net_2", {}, {"q": (2, 1, 4), "k": (2, 1, 4), "v": (2, 1, 4)}),
        ("delta_net_2", {"share_kv_conv": True, "per_head_conv": False}, {"q": (1, 1, 4), "kv": (1, 1, 4)}),
        ("delta_net_2", {"shift_only_conv": True, "conv_scaled_shift": True}, {}),
    ],
)
def test_filters_of_models_that_share_kernels_or_have_none(tmp_path, model_type, changes, shapes):
    found = filters_of(open_folder(save_model(build(model_type, **changes), tmp_path)), 0)
    assert {name: tuple(kernels.shape) for name, kernels in found.items()} == shapes


def test_the_folder_is_replaced_as_a_whole(report, tmp_path, tiny_folder):
    folder = tmp_path / "pictures"
    dense = open_folder(tiny_folder("delta_net"))
    sizes = MixerSizes(2, 2, 16, 16)
    kept = {1: Kept(sizes, sizes, [0, 1], [0, 1], [list(range(16))] * 2, [list(range(16))] * 2)}
    names = draw_folder(folder, report, kept, dense)
    height, width = imread(folder / "rank-heat-map.png").shape[:2]
    expected = draw_heat_map(report).get_size_inches() * drawing._DPI
    assert (width, height) == (pytest.approx(expected[0], abs=1), pytest.approx(expected[1], abs=1))
    both = {"filters-layer-00.png", "filters-layer-01.png", "rank-curves.png", "rank-heat-map.png"}
    assert set(names) == {path.name for path in folder.iterdir()} == both | {"kept-channels.png"}
    refuse_other_files(folder)
    assert set(draw_folder(folder, report, {}, dense)) == {path.name for path in folder.iterdir()} == both


def test_other_files_are_not_replaced(tmp_path):
    refuse_other_files(tmp_path / "absent")
    refuse_other_files(tmp_path)
    (tmp_path / "rank-curves.png").touch()
    refuse_other_files(tmp_path)
    (tmp_path / "holiday.png").touch()
    with pytest.raises(KeyreduceError, match=r"holds other files, such as 'holiday\.png'"):
        refuse_other_files(tmp_path)
