import torch

from keyreduce.families import FAMILIES, MixerSizes
from keyreduce.pruning.edits import Select, key_channel_edits

SIZES = MixerSizes(key_heads=2, value_heads=4, head_k_dim=3, head_v_dim=5)
KEPT = {0: torch.tensor([[0, 2], [1, 2]]), 3: torch.tensor([[1, 2], [0, 1]])}
# Channel c of head h is row 3 h + c.
ROWS = {0: [0, 2, 4, 5], 3: [1, 2, 3, 4]}
EDITED = {"q_proj.weight", "k_proj.weight", "q_conv1d.weight", "k_conv1d.weight", "q_conv1d.bias", "k_conv1d.bias"}


def test_select():
    tensor = torch.arange(24).view(2, 3, 4)
    edit = Select(1, torch.tensor([2, 0]))
    assert torch.equal(edit.apply(tensor), torch.stack([tensor[:, 2], tensor[:, 0]], dim=1))
    assert edit.shape((2, 3, 4)) == (2, 2, 4)
    assert torch.equal(tensor, torch.arange(24).view(2, 3, 4))


def test_query_and_key_tensors_keep_the_rows_of_each_head():
    for family in FAMILIES.values():
        names = [family.tensor_name(layer, name) for layer in range(5) for name in family.tensors]
        edits = key_channel_edits(family, SIZES, KEPT, ["model.embeddings.weight", *names])
        assert edits.keys() == {family.tensor_name(layer, name) for layer in KEPT for name in EDITED}
        for layer in KEPT:
            for name in EDITED:
                (edit,) = edits[family.tensor_name(layer, name)]
                assert (edit.axis, edit.index.tolist()) == (0, ROWS[layer])


def test_tensors_that_a_model_has_not_are_not_edited():
    family = FAMILIES["delta_net"]
    names = [f"model.layers.{place}.weight" for place in ("0.attn.k_proj", "0.attn.v_proj", "1.attn.q_proj")]
    assert key_channel_edits(family, SIZES, KEPT, names).keys() == {names[0]}
