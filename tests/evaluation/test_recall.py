"""Needles in haystacks, and the grid of all that is asked."""

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
from recallers import Recaller
from tiny_models import build
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from keyreduce.checkpoint.find import DEFAULT_MODEL, SHIPPED
from keyreduce.data.text import FileText
from keyreduce.errors import KeyreduceError
from keyreduce.evaluation.needle import DEPTHS, Wording, draw
from keyreduce.evaluation.perplexity import bytes_per_token
from keyreduce.evaluation.probes import CHOICES
from keyreduce.evaluation.recall import RecallProbes, RecallSettings, recall_metrics
from keyreduce.families import FAMILIES
from keyreduce.models.loading import LoadedModel
from keyreduce.processes import Processes

BYTES = AutoTokenizer.from_pretrained(SHIPPED / DEFAULT_MODEL)
WORDS = ["".join(letters) for letters in itertools.product("abcdefg", repeat=3)]
DOCUMENT = "".join(f"{number} {number * number}, " for number in range(40))
SECOND = "".join(f"{number} {number + number}, " for number in range(300))
SETTINGS = RecallSettings(("mqar", "needle"), (96, 256), (1, 3), probes=5, seed=7)


@pytest.fixture
def text(tmp_path) -> FileText:
    (tmp_path / "1.txt").write_text(DOCUMENT)
    (tmp_path / "2.txt").write_text(SECOND)
    return FileText([tmp_path])


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    """A tokenizer with words of three letters as tokens, besides the bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate(alphabet)}
    merges = []
    for letter in "abcdefg":
        merges.append(("Ġ", letter))
    for first, second in itertools.product("abcdefg", repeat=2):
        merges.append((f"Ġ{first}", second))
    for one, two, three in WORDS:
        merges.append((f"Ġ{one}{two}", three))
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def loaded(model: torch.nn.Module, tokenizer=BYTES) -> LoadedModel:
    return LoadedModel(model, tokenizer, FAMILIES["delta_net"], Path("a-model"))


def hidden(text: FileText, tokenizer, length: int, pairs: int, number: int):
    generator = torch.Generator().manual_seed(3)
    return list(draw(text, tokenizer, Wording.of(tokenizer), length, pairs, number, generator))


@pytest.mark.parametrize(("length", "pairs"), [(120, 1), (300, 3), (340, 5)])
def test_needles_are_hidden_in_the_text(text, length, pairs):
    for number, probe in enumerate(hidden(text, BYTES, length, pairs, 6)):
        assert len(probe.tokens_T) == length
        assert probe.tokens_T[0] == 256
        told = bytes(probe.tokens_T[1:].tolist()).decode()
        *pieces, question = told.split("\nThe password of the ")
        name, _, asked = question.partition(" is ")
        password = bytes(probe.answers_Q.tolist()).decode()
        # The question ends one letter before the end of the answer, and each letter has its place.
        assert (len(name), len(password), asked) == (4, 4, password[:-1])
        assert probe.places_Q.tolist() == list(range(length - 4, length))
        haystack, said, at = pieces[0], {}, None
        for piece in pieces[1:]:
            sentence, _, rest = piece.partition(".\n")
            who, _, what = sentence.partition(" is ")
            said[who] = what
            at = len(haystack) if who == name else at
            haystack += rest
        assert (len(said), said[name]) == (pairs, password)
        assert len({*said, *said.values()}) == 2 * pairs
        size = len(haystack)
        assert haystack == (DOCUMENT + "\n" + SECOND)[number * size : (number + 1) * size]
        assert probe.depth == DEPTHS[number % 4]
        assert at == round(probe.depth * size)


def test_words_are_taken_where_the_tokenizer_has_them(text, words):
    for probe in hidden(text, words, 120, 2, 4):
        told = words.decode(probe.tokens_T.tolist())
        (answer,) = words.convert_ids_to_tokens(probe.answers_Q.tolist())
        *_, question = told.split("\nThe password of the")
        name = question.removesuffix(" is")
        assert f"The password of the{name} is{answer.replace('Ġ', ' ')}." in told
        assert name[1:] in WORDS and answer[1:] in WORDS
        assert probe.places_Q.tolist() == [119]


@pytest.mark.parametrize("pairs", [1, 4, 20])
def test_choices_are_other_passwords_first(text, pairs):
    for probe in hidden(text, BYTES, 1000, pairs, 4):
        told = bytes(probe.tokens_T[1:].tolist()).decode()
        passwords = [piece[:4] for piece in told.split(" is ")[1:-1]]
        assert len(passwords) == pairs
        for place, (answer, row) in enumerate(zip(probe.answers_Q.tolist(), probe.choices_QC.tolist(), strict=True)):
            assert (row[0], len(set(row))) == (answer, CHOICES)
            assert all(chr(choice).islower() for choice in row)
            rivals = {ord(password[place]) for password in passwords}
            assert len(rivals & set(row)) == min(len(rivals), CHOICES)


def test_text_runs_out(tmp_path):
    (tmp_path / "text.txt").write_text("0123456789" * 15)
    text = FileText([tmp_path / "text.txt"])
    probes = hidden(text, BYTES, 160, 1, 3)
    # Other names in the same text.
    assert len({tuple(probe.tokens_T[-60:-33].tolist()) for probe in probes}) == 1
    assert len({tuple(probe.tokens_T[-11:].tolist()) for probe in probes}) == 3
    with pytest.raises(KeyreduceError, match="the text has 151 tokens, too few for a haystack of 188"):
        hidden(text, BYTES, 256, 1, 3)


def test_a_tokenizer_without_letters_is_refused():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"x": 0, "?": 1}, unk_token="?")))
    with pytest.raises(KeyreduceError, match="neither words nor letters as tokens; leave needle out"):
        Wording.of(tokenizer)


def ask(model: torch.nn.Module, text: FileText, settings: RecallSettings = SETTINGS, **options) -> dict:
    return recall_metrics([RecallProbes(loaded(model), text, settings).ask(batch_size=2, **options)])


def test_a_model_that_recalls_answers_all(text):
    figures = ask(Recaller(), text)
    assert [(cell["length"], cell["pairs"]) for cell in figures["mqar"]] == [(96, 1), (96, 3), (256, 1), (256, 3)]
    assert [(cell["length"], cell["pairs"]) for cell in figures["needle"]] == [(96, 1), (256, 1), (256, 3)]
    for cell in figures["mqar"] + figures["needle"]:
        assert cell["probes"] == 5
        assert (cell["accuracy"], cell["choice_accuracy"], cell["all_right"], cell["rank"]) == (1, 1, 1, 1)
    for cell in figures["needle"]:
        assert [(depth["depth"], depth["probes"]) for depth in cell["depths"]] == list(
            zip(DEPTHS, (2, 1, 1, 1), strict=True)
        )


def test_a_model_that_forgets_fails_by_depth(text):
    settings = RecallSettings(("needle",), (256,), (1,), probes=8, seed=0)
    (cell,) = ask(Recaller(reach=90), text, settings)["needle"]
    assert [depth["all_right"] for depth in cell["depths"]] == [0, 0, 0, 1]
    assert cell["all_right"] == 0.25


def test_a_model_that_knows_nothing_is_right_by_chance(text):
    model = build("delta_net")
    torch.nn.init.zeros_(model.lm_head.weight)
    for cell in itertools.chain(*ask(model, text).values()):
        assert cell["accuracy"] == pytest.approx(1 / 264)
        assert cell["choice_accuracy"] == pytest.approx(1 / CHOICES)
        assert cell["rank"] == pytest.approx(132.5)
        assert cell["log_probability"] == pytest.approx(-math.log(264))


def test_figures_agree_with_a_slow_loop(text):
    """Each probe alone, each answer on its own, in float64."""
    model = build("gated_deltanet")
    probes = RecallProbes(loaded(model), text, SETTINGS)
    figures = recall_metrics([probes.ask(batch_size=3)])
    for cell in probes.cells:
        sums, count = torch.zeros(3, dtype=torch.float64), 0
        for probe in probes.draw(cell):
            with torch.no_grad():
                logits_TV = model(probe.tokens_T[None]).logits[0].double()
            for place, answer, row in zip(probe.places_Q, probe.answers_Q, probe.choices_QC, strict=True):
                logits_V = logits_TV[place]
                sums[0] += int(logits_V.argmax()) == answer
                sums[1] += row[int(logits_V[row].argmax())] == answer
                sums[2] += logits_V.log_softmax(dim=0)[answer]
                count += 1
        (found,) = (
            entry for entry in figures[cell.kind] if (entry["length"], entry["pairs"]) == (cell.length, cell.pairs)
        )
        assert found["answers"] == count
        assert found["accuracy"] == pytest.approx(float(sums[0] / count))
        assert found["choice_accuracy"] == pytest.approx(float(sums[1] / count))
        assert found["log_probability"] == pytest.approx(float(sums[2] / count), rel=1e-5)


@pytest.mark.parametrize("number", [2, 4, 9])
def test_any_number_of_processes_finds_the_same(text, number):
    probes = RecallProbes(loaded(build("delta_net")), text, SETTINGS)
    shares = [probes.ask(batch_size=2, processes=Processes(rank, number)) for rank in range(number)]
    assert recall_metrics(shares) == recall_metrics([probes.ask(batch_size=2)])


def test_a_cell_does_not_depend_on_the_others(text):
    model = build("delta_net")
    alone = ask(model, text, RecallSettings(("mqar",), (256,), (3,), probes=5, seed=7))
    everything = ask(model, text)
    assert alone["mqar"] == everything["mqar"][3:]
    other = ask(model, text, RecallSettings(("mqar",), (256,), (3,), probes=5, seed=8))
    assert other["mqar"] != alone["mqar"]


def test_no_special_token_is_in_a_sequence(text):
    probes = RecallProbes(loaded(build("delta_net")), text, SETTINGS)
    assert probes.symbols_S.tolist() == [token for token, size in enumerate(bytes_per_token(BYTES).tolist()) if size]
    assert 256 not in probes.symbols_S
    narrow = build("delta_net", vocab_size=100)
    assert RecallProbes(loaded(narrow), text, SETTINGS).symbols_S.max() == 99


def test_what_has_no_room_is_left_out(text):
    probes = RecallProbes(loaded(build("delta_net")), text, SETTINGS)
    assert probes.left_out == [("needle", 96, 3)]
    assert probes.tokens == 5 * (3 * 96 + 4 * 256)
    with pytest.raises(KeyreduceError, match="no `recall_lengths` has room"):
        RecallProbes(loaded(build("delta_net")), text, RecallSettings(("mqar",), (8,), (3,), probes=1, seed=0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kinds": ()}, "`recall` names nothing"),
        ({"kinds": ("mqar", "mqar")}, "`recall` names nothing, or one thing twice"),
        ({"lengths": (64, 64)}, "`recall_lengths` names nothing, or one thing twice"),
        ({"pairs": ()}, "`recall_pairs` names nothing"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(KeyreduceError, match=message):
        dataclasses.replace(SETTINGS, **changes)
