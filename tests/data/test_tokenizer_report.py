"""Measures against counts made by hand and by the libraries' own offsets; laws over every kind of tokenizer."""

import json
import random
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from matplotlib.image import imread
from rich.console import Console

from ds_pretrain.core.vocabulary import IDEOGRAPHS
from ds_pretrain.data.tokenizer import KINDS, TextTokenizer
from ds_pretrain.data.tokenizer_report import compare, find_runs, measure, plot, table

STDLIB = Path(sysconfig.get_paths()["stdlib"])
ENGLISH = [(STDLIB / name).read_text("utf-8")[:40_000] for name in ("argparse.py", "textwrap.py")]
WORDS = ["系统", "管理", "管理员", "软件包", "安装", "网络", "的", "和", "配置文件"]
RNG = random.Random(0)
CHINESE = ["".join(RNG.choices(WORDS, k=12)) + "。" for _ in range(200)]


def by(kind, texts, size=900):
    return TextTokenizer.train(iter(texts), size, kind)


@pytest.fixture(scope="module")
def pair():
    return {"english": by("bpe", ENGLISH), "both": by("bpe", [*ENGLISH, *CHINESE], 1100)}


def test_runs_by_hand():
    found = list(find_runs("Don't read  2nd e\u0301t\u00e9s,管理员和 Linux系统 naïve_\n end."))
    assert found == ["Don", "t", " read", " 2nd", " e\u0301t\u00e9s", "管理员和", " Linux", "系统", " naïve", " end"]


def test_counts_by_hand():
    """A tokenizer of letters, one Chinese word, and nothing else: every number is known."""
    vocab = {
        name: i
        for i, name in enumerate(["<pad>", "<unk>", "<eod>", "<cls>", "<sep>", "<mask>", "ab", "##c", "x", "管", "系统"])
    }
    raw = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    raw.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in list(vocab)[:6]])
    tokenizer = TextTokenizer("tokenizer.json", raw.to_str().encode(), {name: vocab[name] for name in list(vocab)[:6]})
    row = measure("t", tokenizer, "x", ["ab abc, x", "管 系统 理"])
    assert (row.tokens, row.characters, row.bytes) == (5 + 3, 9 + 6, 9 + 4 * 3 + 2)  # ab, ab ##c, <unk>, x / 管 系统 <unk>
    assert (row.words, row.word_tokens, row.continued_words, row.unknown_tokens) == (3 + 4, 4 + 3, 1, 2)
    assert (row.han, row.han_tokens, row.per_han) == (4, 3, 0.75)
    assert row.fertility == 1 and row.continued == 1 / 7 and row.unknown == 2 / 8 and row.bytes_per_token == 23 / 8


def han(char):
    return any(low <= ord(char) <= high for low, high in IDEOGRAPHS)


@pytest.mark.parametrize("kind", KINDS)
def test_words_by_themselves_cost_what_they_cost_in_the_text(kind):
    """Where no token crosses the end of a word, all tokens are those of words and of what lies between."""
    tokenizer = by(kind, [*ENGLISH, *CHINESE], 1400)
    text = " ".join(RNG.choices([run.strip() for run in find_runs(ENGLISH[0]) if run.strip().isalpha()], k=500))
    row = measure(kind, tokenizer, "en", [text])
    assert abs(row.word_tokens - row.tokens) <= 1 and row.words == 500  # one: the space mark before a text
    row = measure(kind, tokenizer, "zh", ["".join(CHINESE)])
    assert row.han == sum(map(han, "".join(CHINESE))) == row.words and row.han_tokens == row.word_tokens
    assert abs(row.tokens - row.han_tokens - len(CHINESE)) <= 1  # a full stop each


def test_han_tokens_agree_with_the_offsets_of_the_library(pair):
    for tokenizer in pair.values():
        raw = tokenizers.Tokenizer.from_str(tokenizer.model.decode())
        text = "".join(CHINESE)
        counted = sum(any(map(han, text[a:b])) for a, b in raw.encode(text).offsets)
        assert measure("t", tokenizer, "zh", [text]).han_tokens == counted


def test_english_alone_spends_a_token_on_every_byte_and_balance_repairs_it(pair):
    found = compare(pair, {"en": ENGLISH, "zh": CHINESE}, "en")
    assert found.at("english", "zh").per_han == 3.0 > 4 * found.at("both", "zh").per_han
    assert found.at("both", "en").per_character < 1.3 * found.at("english", "en").per_character
    for name, tokenizer in pair.items():
        counts = {text: sum(map(len, tokenizer.encode_batch(docs))) for text, docs in (("en", ENGLISH), ("zh", CHINESE))}
        assert found.parity(found.at(name, "zh")) == counts["zh"] / counts["en"]
        assert found.parity(found.at(name, "en")) == 1
    assert all(row.speed > 0 and row.unknown == 0 for row in found.rows)


def test_cutting_a_text_into_documents_changes_no_word(pair):
    lines = ENGLISH[0].splitlines(keepends=True)
    whole, cut = (measure("t", pair["both"], "en", docs) for docs in (["".join(lines)], lines))
    assert (whole.words, whole.characters, whole.bytes) == (cut.words, cut.characters, cut.bytes)
    assert (whole.word_tokens, whole.continued_words) == (cut.word_tokens, cut.continued_words)


def test_what_cannot_be_compared_says_so(pair):
    with pytest.raises(ValueError, match="nothing to compare"):
        compare(pair, {})
    with pytest.raises(ValueError, match="reference text"):
        compare(pair, {"en": ENGLISH}, "de")
    with pytest.raises(ValueError, match="text zh is empty"):
        compare(pair, {"en": ENGLISH, "zh": [" ", ""]})
    with pytest.raises(ValueError, match="makes no token of odd"):
        compare({"wordpiece": by("wordpiece", ENGLISH)}, {"odd": ["\u200b"]})


def test_a_person_sees_a_table_and_a_plot(pair, tmp_path):
    found = compare(pair, {"en": ENGLISH, "zh": CHINESE, "marks": ["?! -- ..."]}, "en")
    console = Console(record=True, width=150)
    console.print(table(found))
    shown = console.export_text()
    assert all(word in shown for word in ("3.00", "parity against en", "english", "both", "100.0%"))
    assert found.at("both", "marks").fertility is None and shown.splitlines()[-3].count(" - ") == 3
    plot(found, tmp_path / "a.png")
    plot(compare(pair, {"en": ENGLISH}), tmp_path / "b.png")
    sizes = [imread(tmp_path / name).shape for name in ("a.png", "b.png")]
    assert sizes[0][1] > sizes[1][1] and np.ptp(imread(tmp_path / "a.png")) > 0.5
    rows = json.loads(json.dumps(found.as_dict()))["rows"]
    assert len(rows) == 6 and rows[0]["parity"] == 1 and rows[2]["per_han"] == 3.0
