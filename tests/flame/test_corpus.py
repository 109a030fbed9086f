"""flame/corpus.py: the tokens that a model is trained on, of a BPE tokenizer that is trained on them."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from keyreduce.data.batches import bytes_per_token
from keyreduce.data.text import DocumentText
from keyreduce.errors import KeyreduceError

TRAIN = [f"def value_{number}(self):\n    return {number * number}, 'é 四'\n" for number in range(300)]
TEXTS = {"train": TRAIN, "heldout": ["held\nout \u2028"], "calibration": ["a calibration", "text"]}


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "flame")
    return importlib.import_module("corpus")


def test_bpe_corpus(module, tmp_path, capsys):
    texts = {name: DocumentText(documents) for name, documents in TEXTS.items()}
    module.write_corpus(tmp_path / "data", texts, 320)
    assert "tokens to train on" in capsys.readouterr().out
    corpus = module.open_corpus(tmp_path / "data")
    tokenizer = corpus.tokenizer
    assert 270 < len(tokenizer) <= 320
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 0
    assert corpus.tokens_N.dtype == np.uint16
    assert corpus.record["tokens"] == len(corpus.tokens_N)
    assert tokenizer.decode(corpus.tokens_N.tolist()) == "".join(f"<|endoftext|>{text}" for text in TRAIN)
    assert int(bytes_per_token(tokenizer)[corpus.tokens_N.tolist()].sum()) == len("".join(TRAIN).encode())
    assert len(corpus.tokens_N) < len("".join(TRAIN)) / 2  # it has learned words
    assert list(corpus.heldout.documents()) == TEXTS["heldout"]
    lines = (tmp_path / "data/calibration.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == TEXTS["calibration"]

    before = (tmp_path / "data/train.bin").stat().st_mtime_ns
    module.write_corpus(tmp_path / "data", texts, 320)  # it is there
    assert (tmp_path / "data/train.bin").stat().st_mtime_ns == before
    with pytest.raises(KeyreduceError, match="other text"):
        module.write_corpus(tmp_path / "data", texts, 300)

    windows = module.RandomWindows(corpus.tokens_N, 16, 1000, seed=3)
    starts = [windows[index]["input_ids"] for index in range(windows.rows_per_pass)]
    assert len({tuple(row.tolist()) for row in starts}) > 0.9 * windows.rows_per_pass
    assert all((windows[index]["input_ids"] == starts[index]).all() for index in (0, 5))
