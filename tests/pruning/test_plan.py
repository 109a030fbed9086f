import json

import torch
from cuts import build, plan_of, store

from keyreduce.families import MixerSizes
from keyreduce.pruning.plan import LayerCut, Plan

BEFORE, AFTER = MixerSizes(3, 6, 3, 8), MixerSizes(2, 4, 2, 8)


def test_value_heads_stay_with_their_key_head():
    cut = LayerCut(BEFORE, AFTER, torch.tensor([2, 0]), None, torch.zeros(4, 8))
    assert cut.value_heads_W.tolist() == [4, 5, 0, 1]
    assert LayerCut.of_nothing(BEFORE).value_heads_W.tolist() == list(range(6))


def test_of_nothing_keeps_all():
    cut = LayerCut.of_nothing(BEFORE)
    assert cut.before == cut.after == BEFORE
    assert cut.heads_H.tolist() == [0, 1, 2]
    assert cut.key_HR.tolist() == [[0, 1, 2]] * 3
    assert cut.value_WR.tolist() == [list(range(8))] * 6
    assert cut.projection_HKR is None


def test_a_plan_is_json():
    cut = LayerCut(
        BEFORE, AFTER, torch.tensor([0, 2]), torch.tensor([[0, 2], [1, 2]]), torch.arange(8).expand(4, -1),
        report={"key": {"rho": [1.25, 1.5]}},
    )  # fmt: skip
    plan = Plan({"method": "l1", "calibration": None}, {0: cut, 10: LayerCut.of_nothing(BEFORE)})
    written = json.loads(json.dumps(plan.to_json()))
    assert written["inputs"] == {"method": "l1", "calibration": None}
    assert list(written["layers"]) == ["0", "10"]
    assert written["layers"]["0"] == {
        "before": {"key_heads": 3, "value_heads": 6, "head_k_dim": 3, "head_v_dim": 8},
        "after": {"key_heads": 2, "value_heads": 4, "head_k_dim": 2, "head_v_dim": 8},
        "heads": [0, 2],
        "key": [[0, 2], [1, 2]],
        "value": [list(range(8))] * 4,
        "report": {"key": {"rho": [1.25, 1.5]}},
    }
    assert plan.after == {0: AFTER, 10: BEFORE}


def test_every_methods_plan_is_json(tmp_path):
    source = store(build("gated_deltanet", {}), tmp_path / "source")
    for method in ("rrqr", "pca", "wanda"):
        written = json.loads(json.dumps(plan_of(source, {"key": 5}, method).to_json(), allow_nan=False))
        for cut in written["layers"].values():
            assert (cut["key"] is None) == (method == "pca")
            figures = {
                "rrqr": {"rho", "swaps", "smallest_kept", "largest_dropped"}, "pca": {"variance_kept"}
            }.get(method)  # fmt: skip
            assert cut["report"].keys() == ({"key"} if figures else set())
            if figures:
                assert cut["report"]["key"].keys() == figures
                assert all(len(values) == 2 for values in cut["report"]["key"].values())
