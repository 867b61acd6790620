"""What a person reads is what the batch holds: labels under their inputs, borders, fates, and the dense pattern."""

import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from memory import VOCAB, MemoryStore
from rich.cells import cell_len
from rich.console import Console

from ds_pretrain.core.attention import AttentionPattern
from ds_pretrain.core.batch import Batch, Target
from ds_pretrain.data.dataset import Cursor, Samples
from ds_pretrain.data.preview import HIDDEN, KEPT, LABEL, RANDOM, _clean, attention_png, preview
from ds_pretrain.objectives import REGISTRY


def batch_of(objective, lengths=(20, 12, 300), seq_len=64, rows=2):
    data = Samples(MemoryStore(lengths), VOCAB, seq_len, objective, "train", 0)
    return data.collate(data.rows(Cursor(), rows)[0])


def by_hand(inputs, labels, weights, segment, **more):
    """A batch of one row with a head `lm`."""
    planes = [torch.tensor([plane]) for plane in (inputs, labels, segment)]
    lm = Target(planes[1], torch.tensor([weights], dtype=torch.float32), float(sum(weights)))
    pattern = AttentionPattern.causal(planes[2].int())
    return Batch(planes[0], torch.arange(len(inputs))[None], pattern, {"lm": lm}, **more)


def shown(batch, rows=2, width=100, name=lambda i: f"t{i}"):
    console = Console(record=True, width=width, file=open("/dev/null", "w"), highlight=False)  # noqa: SIM115
    console.print(preview(batch, VOCAB, name, rows))
    return console.export_text(styles=False)


def styles(batch, name=lambda i: f"t{i}"):
    """Text to style of everything that is shown."""
    console = Console(width=100, color_system="truecolor", file=open("/dev/null", "w"))  # noqa: SIM115
    lines = console.render_lines(preview(batch, VOCAB, name))
    return [(segment.text, str(segment.style)) for line in lines for segment in line]


def aligned(text, head):
    """(input, label) of each position that is shown, read by column."""
    lines, pairs = text.splitlines(), []
    for above, below in pairwise(lines):
        if re.match(r" *\d+ input ", above) and below.strip().startswith(head):
            start = above.index("input") + max(5, len(head)) + 1
            for found in re.finditer(r"\S+", above[start:]):
                label = re.match(r"\S*", below[start + found.start() :])
                pairs.append((found[0], label[0]))
    return pairs


def test_causal_labels_stand_under_their_inputs():
    batch = batch_of("clm", lengths=(10,), rows=1)
    pairs = aligned(shown(batch), "clm")
    expected = zip(batch.inputs[0, :10].tolist(), batch.targets["clm"].labels[0, :10].tolist(), strict=True)
    assert pairs == [(f"t{a}", f"t{b}") for a, b in expected]
    assert [label for _, label in pairs[:-1]] == [token for token, _ in pairs[1:]]


def test_masked_labels_stand_under_the_hidden_words_only():
    batch = batch_of("mlm", lengths=(15,), rows=1)
    target = batch.targets["mlm"]
    weights, labels = target.weights[0, :16].tolist(), target.labels[0, :16].tolist()
    expected = [f"t{label}" if weight else "" for label, weight in zip(labels, weights, strict=True)]
    assert [label for _, label in aligned(shown(batch), "mlm")] == expected
    assert "" in expected


def test_the_fate_of_a_predicted_word_is_its_colour():
    batch = by_hand([2, VOCAB.mask, 351, 352, 353], [2, 360, 361, 352, 353], [0, 1, 1, 1, 0], [1] * 5)
    found = styles(batch)
    assert {("t5", HIDDEN), ("t351", RANDOM), ("t352", KEPT), ("t360", LABEL)} <= set(found)
    assert [style for text, style in found if text.strip() in ("t2", "t353")] == ["dim", "none"]


def test_a_causal_batch_claims_no_fate():
    text = shown(batch_of("clm"))
    assert "random word" not in text
    assert "masked" not in text


def test_documents_and_restarts_show():
    batch = batch_of("clm", lengths=(20, 12), rows=1)
    text = shown(batch)
    assert "row 0: 64 positions, 2 documents, 32 padding" in text
    borders = [(span.start, span.stop) for span in batch.attention.spans()]
    for number, (start, stop) in enumerate(borders, start=1):
        facts = f"{stop - start} tokens (row positions {start}-{stop - 1}, numbered from 0), {stop - start} targets of clm"
        assert f"document {number}  {facts}" in text


def test_a_long_row_is_cut_in_the_middle_and_counted():
    text = shown(batch_of("clm", lengths=(400,), seq_len=512, rows=1))
    hidden = int(re.search(r"\.\.\. (\d+) positions more", text)[1])
    assert hidden + len(aligned(text, "clm")) == 400
    assert "more, positions" in shown(batch_of("clm", lengths=(10,) * 6, rows=1))


def test_weights_classes_and_types_show_where_there_are_any():
    plain = by_hand([50, 51, 52], [51, 52, 53], [1, 1, 0], [1] * 3)
    assert "weight" not in shown(plain)
    weighted = by_hand([50, 51, 52], [51, 52, 53], [2.5, 0, 0.25], [1] * 3, token_type=torch.tensor([[0, 0, 1]]))
    lines = [line.split() for line in shown(weighted).splitlines()]
    assert ["lm", "weight", "x2.5", "x0.25"] in lines
    assert ["type", "0", "0", "1"] in lines
    classes = by_hand([2, 50, 51], [1, 0, 0], [1, 0, 0], [1] * 3)
    assert ["lm", "1"] in [line.split() for line in shown(classes).splitlines()]


def picture(text, width):
    """The pixels of the attention picture, bool, of that many columns."""
    lines = [line[1 : 1 + width].ljust(width) for line in text.splitlines() if line.startswith("│")]
    return np.array([[char in half for char in line] for line in lines for half in ("█▀", "█▄")])


@pytest.mark.parametrize("name", list(REGISTRY))
def test_the_picture_of_a_short_row_is_the_dense_pattern(name):
    batch = batch_of(name, lengths=(12, 9), seq_len=32, rows=1)
    assert np.array_equal(picture(shown(batch), 32), batch.attention.dense()[0].numpy())


@pytest.mark.parametrize("name", list(REGISTRY))
@pytest.mark.parametrize("width", [80, 100])
def test_it_fits_the_terminal(name, width):
    text = shown(batch_of(name, seq_len=256, lengths=[30] * 40), width=width, name=lambda i: "字" * (i % 12 + 1))
    assert max(cell_len(line) for line in text.splitlines()) <= width
    assert len(text.splitlines()) < 130
    if width == 100:
        assert "% of the positions are not padding" in " ".join(text.split())


def test_the_picture_is_of_the_row_with_most_documents():
    batch = batch_of("clm", lengths=(64, 64, 20, 20), rows=3)
    most = max(range(3), key=lambda row: int(batch.attention.segment[row].max()))
    assert f"row {most}: who sees whom" in shown(batch, rows=3)
    assert int(batch.attention.segment[most].max()) > 1


def test_a_batch_of_padding_is_no_error():
    data = Samples(MemoryStore((20,)), VOCAB, 64, "mlm", "train", 0)
    assert "0 documents, 64 padding" in shown(data.collate([()]), rows=1)


def test_a_token_cannot_act_on_the_terminal():
    assert _clean("Ġa\x1b[31m") == "▁a�[31m"
    assert _clean("Ċ") == "↵"
    assert _clean("") == "�"
    assert cell_len(_clean("字" * 40)) <= 16
    batch = by_hand([50, 51], [51, 52], [1, 1], [1] * 2)
    assert "[red]x" in shown(batch, name=lambda i: "[red]x")


def test_attention_png(tmp_path):
    attention_png(batch_of("clm"), tmp_path / "attention.png", rows=3)
    head = (tmp_path / "attention.png").read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")) == (1200, 624)
