"""Which mode ``auto`` is."""

import pytest

from keyreduce.api.prune import PruneRequest
from keyreduce.api.recover import RecoverRequest
from keyreduce.errors import KeyreduceError
from keyreduce.recovery.modes import Steps, auto_note, resolve_mode


@pytest.mark.parametrize(("device_type", "taken"), [("cpu", "least-squares"), ("cuda", "reconstruct")])
def test_auto_is_what_the_device_can_do(device_type, taken):
    assert resolve_mode("auto", device_type) == taken
    assert RecoverRequest().resolved(device_type) == RecoverRequest(mode=taken)
    assert PruneRequest(recover="auto").resolved(device_type) == PruneRequest(recover=taken)
    assert auto_note(taken).startswith(f"auto takes {taken}: ")
    assert PruneRequest().resolved(device_type).recover is None


@pytest.mark.parametrize("mode", ["least-squares", "reconstruct", "lora", "full"])
def test_a_mode_that_is_named_is_taken(mode):
    assert {resolve_mode(mode, device_type, ("steps", "lora_rank")) for device_type in ("cpu", "cuda")} == {mode}


def test_a_setting_that_the_mode_lacks_is_refused():
    assert RecoverRequest(steps=3, lr=1e-3, scope="block", repeats=0.5).resolved("cuda").mode == "reconstruct"
    assert RecoverRequest(repeats=0.5).resolved("cpu").mode == "least-squares"
    with pytest.raises(KeyreduceError, match="auto is least-squares, .* no `scope`; .* reconstruct$"):
        RecoverRequest(scope="block").resolved("cpu")
    with pytest.raises(KeyreduceError, match="^on a GPU `mode` auto is reconstruct, .* no `lora_rank`; .* lora$"):
        RecoverRequest(lora_rank=3).resolved("cuda")


@pytest.mark.parametrize(
    ("mode", "device_type", "width", "tokens"),
    [
        ("reconstruct", "cuda", 1024, 2**20),
        ("reconstruct", "cuda", 256, 2**20),
        ("reconstruct", "cuda", 4096, 2**18),  # hidden states of 4 GiB
        ("reconstruct", "cuda", 2**20, 2**17),
        ("reconstruct", "cpu", 1024, 2**17),
        ("reconstruct", "mps", 1024, 2**17),
        ("least-squares", "cuda", 1024, 2**17),
        ("full", "cuda", 1024, 2**17),
    ],
)
def test_reconstruct_takes_more_text_on_a_gpu(mode, device_type, width, tokens):
    assert RecoverRequest(mode=mode).amount(device_type, width).tokens == tokens
    assert RecoverRequest(mode=mode, num_batches=3).amount(device_type, width).num_batches == 3
    assert RecoverRequest(mode=mode, seq_len=2**16).amount(device_type, width).num_batches == 32


def test_steps_pass_eight_times_over_the_text():
    taken = {batches: Steps().number(batches) for batches in (1, 64, 65, 256, 10_000)}
    assert taken == {1: 512, 64: 512, 65: 520, 256: 2048, 10_000: 2048}
    assert Steps(steps=3).number(10_000) == 3
