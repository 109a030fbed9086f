import pytest
from fla.modules.norm.l2norm import l2norm_fwd_kernel
from fla.modules.norm.layernorm import layer_norm_fwd_kernel

from keyreduce.benchmarking.largest_batch import tuned_once_for_any_batch
from keyreduce.errors import KeyreduceError
from keyreduce.models.tuning import tune_few_variants, tuned_kernels


def keys_of(kernel) -> list[str]:
    while not hasattr(kernel, "keys"):
        kernel = kernel.fn
    return kernel.keys


def test_rows_are_no_reason_to_tune_within_the_block():
    kernels = (l2norm_fwd_kernel, layer_norm_fwd_kernel)
    before = [list(keys_of(kernel)) for kernel in kernels]
    assert all("NB" in keys for keys in before)
    with tuned_once_for_any_batch():
        assert [keys_of(kernel) for kernel in kernels] == [[key for key in keys if key != "NB"] for keys in before]
    assert [keys_of(kernel) for kernel in kernels] == before


def test_few_variants_of_each_kernel(monkeypatch):
    kernels = list(tuned_kernels())
    before = {kernel: kernel.configs for kernel in kernels}
    assert any(len(configs) > 8 for configs in before.values())
    for kernel in kernels:
        monkeypatch.setattr(kernel, "configs", kernel.configs)  # which puts them back
    tune_few_variants(2)
    for kernel in kernels:
        assert len(kernel.configs) == min(2, len(before[kernel]))
        assert set(kernel.configs) <= set(before[kernel])


def test_the_smallest_variant_is_among_the_few(monkeypatch):
    """Shared memory holds the others in 16 bits, and may not in float32."""
    for kernel in (kernels := list(tuned_kernels())):
        monkeypatch.setattr(kernel, "configs", kernel.configs)
    (kernel,) = [one for one in kernels if one.base_fn.__name__ == "chunk_gated_delta_rule_fwd_kernel_h_blockdim64"]
    least = min((one.kwargs["BV"], one.num_stages, one.num_warps) for one in kernel.configs)
    tune_few_variants()
    nearest, smallest = ((one.kwargs["BV"], one.num_stages, one.num_warps) for one in kernel.configs)
    assert smallest == least
    assert nearest != smallest and nearest[2] == 4  # the first is of middling size
    with pytest.raises(KeyreduceError, match="at least two variants"):
        tune_few_variants(1)
