"""What all pictures share, and what is said of text."""

import matplotlib.pyplot
import pytest

from keyreduce import drawing
from keyreduce.recovery.training.picture import draw_losses


def test_series_are_told_apart_without_colours():
    looks = [drawing.marked(number) for number in range(12)]
    assert len({look["color"] for look in looks}) == len({look["marker"] for look in looks}) == 12
    lines = [drawing.lined(number) for number in range(4)]
    assert len({str(line["linestyle"]) for line in lines}) == 4


def test_titles_break_behind_a_semicolon():
    about = drawing.joined("seven words that are of one part", "", "a device")
    figure = drawing.new_figure(4, 3, "a title", about=about)
    assert figure.get_suptitle() == "a title\nseven words that are of one part; a device"
    narrow = drawing.new_figure(3, 3, "a title", about=about)
    assert narrow.get_suptitle().splitlines()[1:] == ["seven words that are of one part;", "a device"]


@pytest.mark.parametrize(
    ("described", "words"),
    [
        ({"kind": "stdlib", "split": "heldout", "python": "3.12"}, "standard library of Python 3.12, heldout files"),
        ({"kind": "files", "paths": ["/a/notes.txt", "/a/more"], "files": 9}, "notes.txt and 1 more"),
        ({"kind": "dataset", "name": "wiki", "config": None, "split": "test"}, "wiki, test"),
        ({"kind": "documents", "documents": 1200}, "1,200 documents"),
    ],
)
def test_text_in_words(described, words):
    assert drawing.text_words(described) == f"text: {words}"


def test_series_stand_beside_each_other_and_keep_their_data():
    axes = drawing.new_figure(4, 3, "").subplots()
    drawn = [drawing.errorbars(axes, [1, 2], [5, 6], [1, 1], {"color": "k"}, place=place, of=3) for place in range(3)]
    assert all(one.lines[0].get_xydata().tolist() == [[1, 5], [2, 6]] for one in drawn)
    left, middle, right = (one.lines[0].get_transform().transform((1, 5))[0] for one in drawn)
    assert left < middle < right
    assert middle == pytest.approx(axes.transData.transform((1, 5))[0])
    assert axes.get_ylim()[0] <= 4 and axes.get_ylim()[1] >= 7  # the intervals are inside


def test_the_picture_of_a_loss_curve():
    tokens = list(range(0, 40_000, 1000))
    figure = draw_losses(tokens, [4.0] * 40, title="a model: recovery, lora", about="text; device", loss="loss")
    assert figure.get_suptitle() == "a model: recovery, lora\ntext; device"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["as logged", "mean of 2 entries"]
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("tokens seen", "loss, nats per token")
    assert matplotlib.pyplot.get_fignums() == []  # no figure is left open
