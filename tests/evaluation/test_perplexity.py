import math
from pathlib import Path

import pytest
import torch
from fla.models import DeltaNetConfig, DeltaNetForCausalLM, GatedDeltaNetConfig, GatedDeltaNetForCausalLM
from transformers import AutoTokenizer

from keyreduce.checkpoint.find import DEFAULT_MODEL, SHIPPED
from keyreduce.data.batches import bytes_per_token
from keyreduce.data.text import FileText
from keyreduce.errors import KeyreduceError
from keyreduce.evaluation.perplexity import Perplexity, evaluate, measure_rows
from keyreduce.families import FAMILIES
from keyreduce.models.loading import LoadedModel

SEPARATOR, VOCABULARY, SEQ_LEN = 256, 264, 72
DOCUMENTS = ["the state is low-rank, é 四 😀\n" * 9, "x", "def f(x):\n    return x\n" * 12]
# A large scale of the weights, so that no two predictions cost the same.
SIZES = {"hidden_size": 32, "num_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32, "initializer_range": 0.5}


def tiny(model_type: str) -> LoadedModel:
    torch.manual_seed(0)
    if model_type == "delta_net":
        model = DeltaNetForCausalLM(DeltaNetConfig(**SIZES, vocab_size=VOCABULARY))
    else:
        model = GatedDeltaNetForCausalLM(GatedDeltaNetConfig(**SIZES, vocab_size=VOCABULARY, head_dim=8, num_v_heads=4))
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED / DEFAULT_MODEL)
    return LoadedModel(model.eval(), tokenizer, FAMILIES[model_type], Path("tiny-model"))


@pytest.fixture
def loaded() -> LoadedModel:
    return tiny("delta_net")


@pytest.fixture
def text(tmp_path) -> FileText:
    for number, document in enumerate(DOCUMENTS):
        (tmp_path / f"{number}.txt").write_text(document)
    return FileText([tmp_path])


def rows_of_bytes(seq_len: int) -> list[list[int]]:
    """The rows, from the definition: a token is a byte, and 256 goes before each document."""
    joined = [token for document in DOCUMENTS for token in [SEPARATOR, *document.encode()]]
    return [joined[start : start + seq_len] for start in range(0, len(joined) - seq_len + 1, seq_len)]


@torch.no_grad()
def slow_cost(model: torch.nn.Module, rows: list[list[int]]) -> Perplexity:
    """One row at a time, one prediction at a time, in float64."""
    nats, num_bytes = 0.0, 0
    for row in rows:
        log_probabilities = model(torch.tensor([row])).logits[0].double().log_softmax(dim=-1)
        for place in range(1, len(row)):
            nats -= float(log_probabilities[place - 1, row[place]])
            num_bytes += row[place] != SEPARATOR
    return Perplexity(nats, sum(len(row) - 1 for row in rows), num_bytes)


@pytest.mark.parametrize("model_type", ["delta_net", "gated_deltanet"])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_cost_agrees_with_the_definition(model_type, batch_size, text):
    loaded, ticks = tiny(model_type), []
    rows = rows_of_bytes(SEQ_LEN)
    expected = slow_cost(loaded.model, rows)
    assert len(rows) > 5
    assert SEPARATOR in sum((row[1:] for row in rows), [])
    cost, is_short = evaluate(loaded, text, seq_len=SEQ_LEN, batch_size=batch_size, num_rows=99, progress=ticks.append)
    assert not is_short
    assert (cost.predictions, cost.bytes) == (expected.predictions, expected.bytes)
    assert cost.nats == pytest.approx(expected.nats, rel=1e-5)
    assert cost.perplexity == pytest.approx(math.exp(expected.nats / expected.predictions), rel=1e-4)
    assert cost.bits_per_byte == pytest.approx(expected.nats / math.log(2) / expected.bytes, rel=1e-5)
    assert not math.isclose(cost.perplexity, VOCABULARY, rel_tol=0.1)
    assert sum(ticks) == len(rows) * SEQ_LEN


def test_only_so_many_rows_are_taken(loaded, text):
    cost, _ = evaluate(loaded, text, seq_len=SEQ_LEN, batch_size=2, num_rows=3)
    expected = slow_cost(loaded.model, rows_of_bytes(SEQ_LEN)[:3])
    assert cost.predictions == 3 * (SEQ_LEN - 1)
    assert cost.nats == pytest.approx(expected.nats, rel=1e-5)


def test_text_shorter_than_a_row_is_used_and_told(loaded, tmp_path):
    (tmp_path / "short.txt").write_text("é四")
    cost, is_short = evaluate(loaded, FileText([tmp_path / "short.txt"]), seq_len=SEQ_LEN, batch_size=2, num_rows=None)
    assert is_short
    assert (cost.predictions, cost.bytes) == (5, 5)
    (tmp_path / "exact.txt").write_text("a" * (SEQ_LEN - 1))
    _, is_short = evaluate(loaded, FileText([tmp_path / "exact.txt"]), seq_len=SEQ_LEN, batch_size=2, num_rows=None)
    assert not is_short


def test_figures_of_a_known_cost():
    # 8 bits for each of 10 predictions, one of which is a separator.
    cost = Perplexity(nats=80 * math.log(2), predictions=10, bytes=9)
    assert cost.perplexity == pytest.approx(256)
    assert cost.bits_per_byte == pytest.approx(80 / 9)
    assert Perplexity(nats=1e6, predictions=1, bytes=1).perplexity == math.inf


def test_uniform_predictions_cost_the_logarithm_of_the_vocabulary(loaded, text):
    torch.nn.init.zeros_(loaded.model.lm_head.weight)
    cost, _ = evaluate(loaded, text, seq_len=SEQ_LEN, batch_size=4, num_rows=None)
    assert cost.perplexity == pytest.approx(VOCABULARY)


def test_no_rows_cost_nothing(loaded):
    assert measure_rows(loaded.model, [], bytes_per_token(loaded.tokenizer), name="m") == Perplexity(0.0, 0, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused(loaded, text, value):
    def damage(module, args, output):
        # The last id, which is in no text: the figure alone need not show it.
        output.logits[0, 3, -1] = value

    loaded.model.register_forward_hook(damage)
    with pytest.raises(KeyreduceError, match="logits of tiny-model are NaN or inf"):
        evaluate(loaded, text, seq_len=SEQ_LEN, batch_size=2, num_rows=None)


@pytest.mark.parametrize(
    ("content", "seq_len", "message"),
    [("ab", 1, "rows of 1 token"), ("<|endoftext|><|endoftext|>", SEQ_LEN, "leaves nothing to predict")],
)
def test_nothing_to_predict_is_refused(loaded, tmp_path, content, seq_len, message):
    (tmp_path / "text.txt").write_text(content)
    with pytest.raises(KeyreduceError, match=message):
        evaluate(loaded, FileText([tmp_path]), seq_len=seq_len, batch_size=2, num_rows=None)
