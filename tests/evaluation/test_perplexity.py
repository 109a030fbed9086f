import importlib.util
import math
import re
from pathlib import Path

import pytest
import torch
from fla.models import DeltaNetConfig, DeltaNetForCausalLM, GatedDeltaNetConfig, GatedDeltaNetForCausalLM
from transformers import AutoTokenizer

from keyreduce.checkpoint.find import DEFAULT_MODEL, SHIPPED
from keyreduce.data.batches import bytes_per_token
from keyreduce.data.text import FileText
from keyreduce.errors import KeyreduceError
from keyreduce.evaluation.perplexity import Perplexity, measure_rows, text_costs, total
from keyreduce.families import FAMILIES
from keyreduce.models.loading import LoadedModel
from keyreduce.processes import Processes

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


def joined_bytes() -> list[int]:
    """The tokens, from the definition: a token is a byte, and 256 goes before each document."""
    return [token for document in DOCUMENTS for token in [SEPARATOR, *document.encode()]]


def rows_of_bytes(seq_len: int) -> list[list[int]]:
    joined = joined_bytes()
    return [joined[start : start + seq_len] for start in range(0, len(joined) - seq_len + 1, seq_len)]


def measured(loaded: LoadedModel, text: FileText, **settings) -> Perplexity:
    return total(text_costs(loaded, text, **settings))


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
    assert any(SEPARATOR in row[1:] for row in rows)
    cost = measured(loaded, text, seq_len=SEQ_LEN, batch_size=batch_size, num_rows=99, progress=ticks.append)
    assert (cost.predictions, cost.bytes) == (expected.predictions, expected.bytes)
    assert cost.nats == pytest.approx(expected.nats, rel=1e-5)
    assert cost.perplexity == pytest.approx(math.exp(expected.nats / expected.predictions), rel=1e-4)
    assert cost.bits_per_byte == pytest.approx(expected.nats / math.log(2) / expected.bytes, rel=1e-5)
    assert not math.isclose(cost.perplexity, VOCABULARY, rel_tol=0.1)
    assert sum(ticks) == len(rows) * SEQ_LEN


@pytest.mark.parametrize("stride", [1, 31, SEQ_LEN - 1])
def test_strided_cost_agrees_with_the_definition(stride, text):
    """Each token is predicted from the tokens of its window, the earliest that scores it; one at a time, in float64."""
    loaded, tokens = tiny("delta_net"), joined_bytes()
    num_rows = 3 + 40 // stride
    starts = [number * stride for number in range(num_rows) if number * stride + SEQ_LEN <= len(tokens)]
    nats, end = 0.0, 1
    for start in starts:
        with torch.no_grad():
            log_probabilities = (
                loaded.model(torch.tensor([tokens[start : start + SEQ_LEN]])).logits[0].double().log_softmax(dim=-1)
            )
        for place in range(end, start + SEQ_LEN):
            nats -= float(log_probabilities[place - start - 1, tokens[place]])
        end = start + SEQ_LEN
    cost = measured(loaded, text, seq_len=SEQ_LEN, stride=stride, batch_size=4, num_rows=num_rows)
    assert cost.predictions == end - 1
    assert cost.bytes == sum(token != SEPARATOR for token in tokens[1:end])
    assert cost.nats == pytest.approx(nats, rel=1e-5)


def test_more_context_costs_less_of_a_model_that_needs_it(tmp_path):
    """A model that copies what stood 40 tokens before: the stride is what leaves it that in sight."""

    class Copying(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.device_of_it = torch.nn.Parameter(torch.zeros(()))

        def forward(self, input_ids, use_cache):
            logits_BTV = torch.zeros(*input_ids.shape, VOCABULARY)
            logits_BTV[:, 39:].scatter_(2, input_ids[:, : max(0, input_ids.shape[1] - 39), None], 20.0)
            return type("Output", (), {"logits": logits_BTV})

    (tmp_path / "text.txt").write_text("0123456789abcdefghijABCDEFGHIJ!?.,;:-+*/" * 9)
    loaded = tiny("delta_net")._replace(model=Copying())
    plain, short, long = (
        measured(loaded, FileText([tmp_path]), seq_len=60, stride=stride, batch_size=2, num_rows=None).perplexity
        for stride in (60, 30, 10)
    )
    assert plain > 3 * short > 9 * long


def test_documents_cost_what_the_harness_makes_of_them(tmp_path):
    """lm-evaluation-harness's own windows, counts and averages, on its log-likelihoods taken one by one in float64."""
    harness = pytest.importorskip("lm_eval.utils")
    metrics = pytest.importorskip("lm_eval.api.metrics")
    package = Path(importlib.util.find_spec("lm_eval").origin).parent
    spec = importlib.util.spec_from_file_location("wikitext", package / "tasks" / "wikitext" / "preprocess_wikitext.py")
    spec.loader.exec_module(wikitext := importlib.util.module_from_spec(spec))
    pages = [" = A title = \n two  words, é\u3000四 .\n", "x", *DOCUMENTS]
    for number, page in enumerate(pages):
        (tmp_path / f"{number}.txt").write_text(page)
    loaded, theirs = tiny("delta_net"), []
    for page in pages:
        log_likelihood = 0.0
        for context, predicted in harness.get_rolling_token_windows(list(page.encode()), SEPARATOR, 40, 1):
            with torch.no_grad():
                logits_TV = loaded.model(torch.tensor([context])).logits[0].double()
            log_probabilities_TV = logits_TV[-len(predicted) :].log_softmax(dim=-1)
            log_likelihood += sum(float(log_probabilities_TV[place, token]) for place, token in enumerate(predicted))
        theirs.append(wikitext.process_results({"page": page}, [log_likelihood]))
    cost = measured(loaded, FileText([tmp_path]), seq_len=41, batch_size=3, num_rows=None, by_document=True)
    assert cost.words == sum(page["word_perplexity"][1] for page in theirs)
    assert cost.bytes == cost.predictions == sum(len(page.encode()) for page in pages)
    of_words = metrics.weighted_perplexity([page["word_perplexity"] for page in theirs])
    assert cost.word_perplexity == pytest.approx(of_words, rel=1e-4)
    bits = metrics.bits_per_byte([page["bits_per_byte"] for page in theirs])
    assert cost.bits_per_byte == pytest.approx(bits, rel=1e-5)


def test_one_document_in_one_row_is_the_same_either_way(loaded, tmp_path):
    (tmp_path / "page.txt").write_text(DOCUMENTS[2])
    settings = {"seq_len": len(DOCUMENTS[2]) + 1, "batch_size": 1, "num_rows": None}
    joined = measured(loaded, FileText([tmp_path]), **settings)
    assert joined == measured(loaded, FileText([tmp_path]), **settings, by_document=True)
    assert joined.words == len(re.split(r"\s+", DOCUMENTS[2]))


@pytest.mark.parametrize(("number", "by_document"), [(2, False), (4, False), (99, False), (4, True)])
def test_any_number_of_processes_measures_the_same_to_the_last_bit(number, by_document, loaded, text):
    settings = {"seq_len": SEQ_LEN, "stride": 50, "batch_size": 2, "num_rows": 9, "by_document": by_document}
    expected = measured(loaded, text, **settings)
    shares = [text_costs(loaded, text, **settings, processes=Processes(rank, number)) for rank in range(number)]
    assert sum(bool(share) for share in shares) == min(number, 6 if by_document else 5)
    assert total(row for share in reversed(shares) for row in share) == expected


def test_only_so_many_rows_are_taken(loaded, text):
    cost = measured(loaded, text, seq_len=SEQ_LEN, batch_size=2, num_rows=3)
    expected = slow_cost(loaded.model, rows_of_bytes(SEQ_LEN)[:3])
    assert cost.predictions == 3 * (SEQ_LEN - 1)
    assert cost.nats == pytest.approx(expected.nats, rel=1e-5)


def test_text_shorter_than_a_row_is_used(loaded, tmp_path):
    (tmp_path / "short.txt").write_text("é四")
    cost = measured(loaded, FileText([tmp_path / "short.txt"]), seq_len=SEQ_LEN, batch_size=2, num_rows=None)
    assert (cost.predictions, cost.bytes) == (5, 5)


def test_figures_of_a_known_cost():
    # 8 bits for each of 10 predictions, one of which is a separator.
    cost = Perplexity(nats=80 * math.log(2), predictions=10, bytes=9)
    assert cost.perplexity == pytest.approx(256)
    assert cost.bits_per_byte == pytest.approx(80 / 9)
    assert Perplexity(nats=1e6, predictions=1, bytes=1).perplexity == math.inf
    assert Perplexity(nats=12 * math.log(2), predictions=9, bytes=9, words=4).word_perplexity == pytest.approx(8)


def test_what_no_float_holds_is_null_in_json():
    figures = Perplexity(nats=800.0, predictions=2, bytes=9, words=1).metrics()
    assert figures["perplexity_per_token"] == pytest.approx(math.exp(400))
    assert figures["perplexity_per_word"] is None
    assert Perplexity(nats=1.0, predictions=2, bytes=9, words=0).metrics()["perplexity_per_word"] is None
    assert (figures["nats"], figures["predictions"], figures["bytes"], figures["words"]) == (800.0, 2, 9, 1)


def test_uniform_predictions_cost_the_logarithm_of_the_vocabulary(loaded, text):
    torch.nn.init.zeros_(loaded.model.lm_head.weight)
    cost = measured(loaded, text, seq_len=SEQ_LEN, batch_size=4, num_rows=None)
    assert cost.perplexity == pytest.approx(VOCABULARY)


def test_no_rows_cost_nothing(loaded):
    assert measure_rows(loaded.model, [], bytes_per_token(loaded.tokenizer), name="m") == Perplexity(0.0, 0, 0)


@pytest.mark.parametrize("stride", [0, -1, SEQ_LEN + 1])
def test_a_stride_beyond_the_row_is_refused(loaded, text, stride):
    with pytest.raises(KeyreduceError, match=f"`stride` is {stride}; it is at least 1 and at most `seq_len`, 72"):
        measured(loaded, text, seq_len=SEQ_LEN, stride=stride, batch_size=2, num_rows=None)
    with pytest.raises(KeyreduceError, match="`stride` is 72; it is at least 1 and below `seq_len`, 72"):
        measured(loaded, text, seq_len=SEQ_LEN, stride=SEQ_LEN, batch_size=2, num_rows=None, by_document=True)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused(loaded, text, value):
    def damage(module, args, output):
        # The last id, which is in no text: the figure alone need not show it.
        output.logits[0, 3, -1] = value

    loaded.model.register_forward_hook(damage)
    with pytest.raises(KeyreduceError, match="logits of tiny-model hold NaN or inf"):
        measured(loaded, text, seq_len=SEQ_LEN, batch_size=2, num_rows=None)


@pytest.mark.parametrize(("content", "seq_len"), [("ab", 1), ("<|endoftext|><|endoftext|>", SEQ_LEN)])
def test_nothing_to_predict_is_refused(loaded, tmp_path, content, seq_len):
    (tmp_path / "text.txt").write_text(content)
    with pytest.raises(KeyreduceError, match="leaves nothing to predict"):
        measured(loaded, FileText([tmp_path]), seq_len=seq_len, batch_size=2, num_rows=None)
