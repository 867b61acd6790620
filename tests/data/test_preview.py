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
from ds_pretrain.core.batch import Batch, Example, Head, Target
from ds_pretrain.data import preview_plot
from ds_pretrain.data.collate import collate, realised
from ds_pretrain.data.dataset import Cursor, Samples
from ds_pretrain.data.preview import STYLES, clean, preview
from ds_pretrain.data.preview_objective import MOST, TEXTS, render, samples_of, small_tokenizer, view
from ds_pretrain.data.preview_plot import attention_png, view_png
from ds_pretrain.objectives import REGISTRY, create

HIDDEN, RANDOM, KEPT = STYLES["masked"], STYLES["random"], STYLES["kept"]
TOKENIZER = small_tokenizer()
objectives = pytest.mark.parametrize("name", list(REGISTRY))


def batch_of(objective, lengths=(20, 12, 300), seq_len=64, rows=2):
    data = Samples(MemoryStore(lengths), VOCAB, seq_len, objective, "train", 0)
    return data.collate(data.rows(Cursor(), rows)[0])


def by_hand(inputs, labels, weights, segment, **more):
    """A batch of one row with a head `lm`."""
    planes = [torch.tensor([plane]) for plane in (inputs, labels, segment)]
    lm = Target(planes[1], torch.tensor([weights], dtype=torch.float32), float(sum(weights)))
    pattern = AttentionPattern.causal(planes[2].int())
    return Batch(planes[0], torch.arange(len(inputs))[None], pattern, {"lm": lm}, **more)


def shown(batch, rows=2, width=100, name=lambda i: f"t{i}", heads=()):
    console = Console(record=True, width=width, file=open("/dev/null", "w"), highlight=False)  # noqa: SIM115
    console.print(preview(batch, VOCAB, name, heads, rows))
    return console.export_text(styles=False)


def styles(batch, name=lambda i: f"t{i}"):
    """Text to style of everything that is shown."""
    console = Console(width=100, color_system="truecolor", file=open("/dev/null", "w"))  # noqa: SIM115
    lines = console.render_lines(preview(batch, VOCAB, name, ()))
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
    assert {("t5", HIDDEN), ("t351", RANDOM), ("t352", KEPT), ("t360", STYLES["label"])} <= set(found)
    assert [style for text, style in found if text.strip() in ("t2", "t353")] == [STYLES["special"], "none"]


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
    assert ["lm", "1"] in [line.split() for line in shown(classes, heads=[Head("lm", classes=2)]).splitlines()]
    assert ["lm", "t1"] in [line.split() for line in shown(classes).splitlines()]
    apart = by_hand([2, 50, 51], [2, 0, 0], [0, 0, 0], [1] * 3)
    assert ["lm", "2"] in [line.split() for line in shown(apart, heads=[Head("lm", classes=3)]).splitlines()]


def picture(text, width):
    """The pixels of the attention picture, bool, of that many columns."""
    lines = [line[1 : 1 + width].ljust(width) for line in text.splitlines() if line.startswith("│")]
    return np.array([[char in half for char in line] for line in lines for half in ("█▀", "█▄")])


@objectives
def test_the_picture_of_a_short_row_is_the_dense_pattern(name):
    batch = batch_of(name, lengths=(12, 9), seq_len=32, rows=1)
    assert np.array_equal(picture(shown(batch), 32), batch.attention.dense()[0].numpy())


@objectives
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
    assert clean("Ġa\x1b[31m") == "▁a�[31m"
    assert clean("Ċ") == "↵"
    assert clean("") == "�"
    assert cell_len(clean("字" * 40)) <= 16
    batch = by_hand([50, 51], [51, 52], [1, 1], [1] * 2)
    assert "[red]x" in shown(batch, name=lambda i: "[red]x")


def test_attention_png(tmp_path):
    attention_png(batch_of("clm"), tmp_path / "attention.png", rows=3)
    head = (tmp_path / "attention.png").read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")) == (1200, 624)


def seen(name, rows=2, seq_len=64, texts=TEXTS, **fields):
    return view(samples_of(texts, TOKENIZER, seq_len, create(name, **fields), 0), TOKENIZER.token, rows)


def printed(seen, **options):
    console = Console(record=True, width=120, file=open("/dev/null", "w"), highlight=False)  # noqa: SIM115
    console.print(render(seen, **options))
    return console.export_text(styles=False)


def read(line, classes, token=TOKENIZER):
    """What a line should say for these labels and weights."""
    labels, weights = line
    say = str if classes else lambda i: clean(token.token(i))
    return [say(label) if weight or (classes and label) else "" for label, weight in zip(labels, weights, strict=True)]


@objectives
def test_every_label_and_weight_that_is_shown_is_the_examples(name):
    """The first examples of a stream are made again by the objective, from the documents that are shown."""
    data = samples_of(TEXTS, TOKENIZER, 64, create(name), 0)
    examples = [data.example(sample) for row in data.rows(Cursor(), 64)[0] for sample in row]
    classes = {head.name for head in data.objective.heads if head.classes is not None}
    for specimen in seen(name, rows=4).specimens:
        length = specimen.batch.inputs.shape[1]
        same = [e for e in examples if length == sum(len(x.inputs) for x in (e, *e.then)) and _agrees(e, data, specimen.batch)]
        example, parts = same[0], specimen.parts
        assert len(parts) == 1 + len(example.then)
        for part, made in zip(parts, (example, *example.then), strict=True):
            assert [token.text for token in part.lines["input"]] == [clean(TOKENIZER.token(i)) for i in made.inputs.tolist()]
            for head in data.objective.heads:
                target = made.targets.get(head.name)
                if target is None:
                    assert head.name not in part.lines
                    continue
                labels, weights = target.labels.tolist(), target.weights.tolist()
                empty = [""] * len(labels)
                expected = read((labels, weights), head.name in classes)
                assert ([t.text for t in part.lines.get(head.name, [])] or empty) == expected
                told = [t.text for t in part.lines.get(f"{head.name} weight", [])]
                if {0, 1}.issuperset(weights):
                    assert not told
                else:
                    assert told == [f"x{w:.3g}" if w else "" for w in weights]


def _agrees(example: Example, data, batch) -> bool:
    again = collate([[example]], data.objective, data.vocab, batch.inputs.shape[1])
    pairs = [(again.targets[name], target) for name, target in batch.targets.items()]
    return torch.equal(again.inputs, batch.inputs) and all(
        torch.equal(a.labels, b.labels) and torch.equal(a.weights, b.weights) for a, b in pairs
    )


@objectives
def test_what_is_shown_before_is_a_document_and_what_is_after_is_printed(name):
    found = seen(name, rows=3)
    whole = [
        [clean(TOKENIZER.token(i)) for i in [*TOKENIZER.encode(text).tolist(), TOKENIZER.vocabulary.eod]] for text in TEXTS
    ]
    for specimen in found.specimens:
        assert 1 <= len(specimen.documents) <= create(name).documents
        for document in ([token.text for token in d] for d in specimen.documents):
            assert any(document == w[i : i + len(document)] for w in whole for i in range(len(w))), "a stretch of a text"
    words = re.sub(r"\s+", " ", printed(found))
    assert words.count("before: ") == sum(len(s.documents) for s in found.specimens)
    assert words.count("after: ") == sum(len(s.parts) for s in found.specimens)
    assert all(meaning.split(" (")[0] in words for _, meaning in found.rates)
    assert "sees ahead" in words and "sees ahead" not in printed(found, short=True)


@objectives
def test_the_part_that_sees_ahead_is_told(name):
    for specimen in seen(name, rows=3).specimens:
        for part, span in zip(specimen.parts, specimen.batch.attention.spans(), strict=True):
            horizon = specimen.batch.attention.horizon[0, span.start : span.stop]
            sees = (horizon > torch.arange(span.start, span.stop)).tolist()
            assert part.ahead == (sees if create(name).kind == "mixed" else [False] * len(sees))
            if part.sight.endswith("later ones what came before"):
                assert part.sight.startswith(f"0-{sum(sees)} ")
            assert (part.sight == "each sees all") == bool((horizon == span.stop - 1).all())


@objectives
@pytest.mark.parametrize("seq_len", [24, 64])
def test_a_picture_for_every_objective(name, seq_len, tmp_path):
    path = tmp_path / "seen.png"
    view_png([seen(name, seq_len=seq_len)], path)
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(head[16:20], "big") == 1755


@objectives
def test_nothing_in_a_picture_overlaps_or_is_cut_off(name):
    """Every text lies inside the page and no two share a place, measured as they are drawn."""
    figure = preview_plot.figure([seen(name)])
    figure.canvas.draw()
    page = figure.bbox
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert all(page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1 for box in boxes)
    edges = np.array([(box.x0, box.x1, box.y0, box.y1) for box in boxes])
    x0, x1, y0, y1 = edges.T
    across = np.minimum(x1[:, None], x1) - np.maximum(x0[:, None], x0)
    down = np.minimum(y1[:, None], y1) - np.maximum(y0[:, None], y0)
    overlap = np.triu((across > 1.5) & (down > 3.5), k=1)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert not overlap.any(), [(texts[i], texts[j]) for i, j in np.argwhere(overlap)[:5]]


def test_all_on_one_sheet_has_every_name():
    views = [seen(name, rows=1, seq_len=32) for name in REGISTRY]
    texts = [text.get_text() for text in preview_plot.figure(views).axes[0].texts]
    assert set(REGISTRY) <= set(texts) and f"{len(list(REGISTRY))} pre-training" in texts[0]


def test_one_of_each_component_and_of_each_answer_is_shown():
    assert {specimen.component for specimen in seen("ul2", rows=None).specimens} == {"r", "s", "x"}
    answers = [[t.text for t in s.parts[0].lines["nsp"] if t.text] for s in seen("nsp", rows=None).specimens]
    assert sorted(answers) == [["0"], ["1"]]
    assert "<fim_prefix>" in [token.text for token in seen("fim").specimens[0].parts[0].lines["input"]]


def test_realised_rates_are_those_that_were_asked_for():
    def share(name, meaning, **fields):
        (value,) = (value for value, told in seen(name, **fields).rates if meaning in told)
        return float(value.rstrip("%"))

    assert share("mlm", "mlm: of the positions in use", mask_prob=0.4) == pytest.approx(39, abs=1.5)  # two are special
    assert share("span_corruption", "of the text is cut out", density=0.3) == pytest.approx(30, abs=1.5)
    assert share("span_corruption", "mean length of a span", density=0.3, mean_span=5.0) == pytest.approx(5, abs=1)
    assert share("ul2", "s: of the samples", r=1.0, s=8.0, x=1.0) == pytest.approx(80, abs=8)
    assert share("nsp", "of the answers are 1") == pytest.approx(50, abs=12)


def test_spans_are_counted_by_their_sentinels():
    a, b = VOCAB.sentinels[:2]
    eod = VOCAB.eod
    inputs = [300, a, 301, 302, b, eod, a, 310, 311, b, 312, 0]
    labels = [0, 0, 0, 0, 0, a, 310, 311, b, 312, eod, 0]
    weights = [0] * 5 + [1] * 6 + [0]
    found = realised([by_hand(inputs, labels, weights, [1] * 11 + [0])], VOCAB, [Head("lm")])
    assert found["lm/spans"] == 2 and found["lm/span_length"] == 1.5
    assert found["lm/cut"] == pytest.approx(3 / 6)  # 300, 301 and 302 stay
    assert "ahead" not in found


def test_classes_over_masked_inputs_have_no_fate():
    data = samples_of(TEXTS, TOKENIZER, 64, create("electra"), 0)
    found = realised([data.collate(data.rows(Cursor(), 20)[0])], data.vocab, data.objective.heads)
    assert "mlm/mask" in found and "rtd/targets" in found and "rtd/mask" not in found


def test_a_text_that_is_too_short_is_refused_with_the_numbers():
    with pytest.raises(ValueError, match=r"too short for nsp: it takes 2 documents of 4 tokens .* 1 document of \d+ tokens"):
        seen("nsp", texts=["Hello there, hello."])
    with pytest.raises(ValueError, match=r"too short for mlm: it takes 1 document of 1 token .* of 0 tokens"):
        seen("mlm", texts=[""])
    assert seen("mlm", texts=["Hello there."]).specimens


def test_characters_that_the_font_lacks_are_boxes_and_long_documents_are_cut():
    assert preview_plot.printable("a字▁b") == "a□·b"
    long = seen("clm", rows=1, seq_len=1024, texts=["word " * 2000])
    assert re.search(r"\.\.\. \d+ positions more", printed(long)) and len(printed(long).splitlines()) < 3 * MOST + 40
    texts = [text.get_text() for text in preview_plot.figure([long]).axes[0].texts]
    assert any(re.fullmatch(r"\.\.\. \d+ positions more \.\.\.", text) for text in texts)
