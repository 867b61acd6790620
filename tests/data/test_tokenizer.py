"""Four kinds, the same laws: true sizes, no forged specials, the same after reload."""

import json
import pickle
import random
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from ds_pretrain.data.tokenizer import KINDS, MINIMUM, RESERVED, TextTokenizer
from ds_pretrain.evaluation.fill import masked

STDLIB = Path(sysconfig.get_paths()["stdlib"])
TEXTS = [(STDLIB / name).read_text("utf-8")[:60_000] for name in ("argparse.py", "textwrap.py", "random.py")]
SIZE = 1200
HARD = "  two  spaces\n\n\ttab\r\nCR 日本語 😀 e\u0301 \u00a0 \u200b ﬁ ½ \ufffd tail "


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tmp_path_factory):
    tokenizer = TextTokenizer.train(iter(TEXTS), SIZE, request.param)
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer.save(folder)
    return request.param, tokenizer, TextTokenizer.load(folder), folder


def test_size_counts_everything_and_specials_lead(trained):
    _, tokenizer, loaded, _ = trained
    vocab = tokenizer.vocabulary
    assert len(tokenizer) == len(loaded) == vocab.size == SIZE
    assert [tokenizer.token(i) for i in range(len(RESERVED))] == list(RESERVED)
    assert (vocab.pad, vocab.unk, vocab.eod, vocab.cls, vocab.sep, vocab.mask) == (0, 1, 2, 3, 4, 5)
    assert [loaded.token(i) for i in vocab.sentinels] == [f"<extra_id_{i}>" for i in range(256)]
    assert vocab.specials == frozenset(range(len(RESERVED)))


def test_text_never_encodes_to_a_special(trained):
    _, tokenizer, loaded, _ = trained
    forged = [*RESERVED, "".join(RESERVED), " ".join(RESERVED), "a<eod>b", "[MASK] <s> </s> <|endoftext|> <0x00>"]
    for other in (tokenizer, loaded, pickle.loads(pickle.dumps(loaded))):
        for ids in other.encode_batch(forged):
            assert len(ids) and not other.vocabulary.is_special[ids[ids != other.vocabulary.unk]].any()


def test_reload_changes_nothing(trained):
    _, tokenizer, loaded, _ = trained
    assert tokenizer.digest == loaded.digest
    for text in (*TEXTS, HARD):
        assert np.array_equal(tokenizer.encode(text), loaded.encode(text))


def test_training_is_deterministic(trained):
    kind, tokenizer, _, _ = trained
    assert TextTokenizer.train(iter(TEXTS), SIZE, kind).digest == tokenizer.digest


def test_an_id_is_shown_by_its_text(trained):
    _, tokenizer, _, _ = trained
    ids = tokenizer.encode("return the value")
    assert "".join(map(tokenizer.text, ids)).strip() == "return the value" and tokenizer.text(ids[-1])[-1] == "e"
    assert tokenizer.text(tokenizer.vocabulary.mask) == "<mask>", "which has no text"
    with pytest.raises(ValueError, match="outside the vocabulary"):
        tokenizer.text(SIZE)


def test_round_trip(trained):
    kind, tokenizer, _, _ = trained
    rng = random.Random(0)
    points = [p for p in range(1, 0x3000) if p != 0x2581] + list(range(0x1F300, 0x1F700)) + [0xFFFD, 0x10FFFF]
    wild = ["".join(chr(rng.choice(points)) for _ in range(rng.randrange(1, 40))) for _ in range(300)]
    texts = [*TEXTS, HARD, "", " ", "\n", "x", *RESERVED, *wild]
    back = [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts)]
    if kind == "wordpiece":
        assert back[texts.index("x")] == "x"
        assert tokenizer.decode(tokenizer.encode("Return  the Value, or None.")) == "return the value, or none."
    else:
        assert back == texts
        assert all(tokenizer.vocabulary.unk not in ids for ids in tokenizer.encode_batch(texts))


def test_bpe_round_trips_the_space_mark_and_nul():
    tokenizer = TextTokenizer.train(iter(TEXTS), SIZE)
    for text in ("a\u2581b", "\x00", "Ġ Ċ", "<eod>" * 3):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_specials_in_decode(trained):
    _, tokenizer, _, _ = trained
    vocab = tokenizer.vocabulary
    ids = [vocab.cls, *tokenizer.encode("return"), vocab.eod, vocab.sentinels[7]]
    assert tokenizer.decode(ids) == "<cls>return<eod><extra_id_7>"
    assert tokenizer.decode(ids, skip_specials=True) == "return"
    assert tokenizer.encode("").dtype == np.int32 and len(tokenizer.encode("")) == 0
    for bad in (-1, len(tokenizer)):
        with pytest.raises(ValueError, match=f"outside the vocabulary of {SIZE}"):
            tokenizer.decode([bad])
        with pytest.raises(ValueError, match=f"outside the vocabulary of {SIZE}"):
            tokenizer.token(bad)


def test_little_text_gives_a_true_smaller_size(trained):
    kind, *_ = trained
    tokenizer = TextTokenizer.train(iter(["hello world, hello words"] * 3), 50_000, kind)
    assert max(tokenizer.encode("hello world")) < len(tokenizer) < 700
    assert len(tokenizer.token(len(tokenizer) - 1)) > 0


def test_too_small_a_vocabulary_names_the_minimum(trained):
    kind, *_ = trained
    with pytest.raises(ValueError, match=rf"at least {MINIMUM}"):
        TextTokenizer.train(iter(TEXTS), MINIMUM - 1, kind)
    if kind in ("unigram", "sp_bpe"):
        with pytest.raises(ValueError, match=r"needs at least (\d+)") as caught:
            TextTokenizer.train(iter(TEXTS), MINIMUM, kind)
        need = int(str(caught.value).split("at least ")[1].split()[0])
        assert len(TextTokenizer.train(iter(TEXTS), need, kind)) == need
    else:
        assert len(TextTokenizer.train(iter(TEXTS), MINIMUM, kind)) == MINIMUM


def test_a_mask_in_a_text_is_where_training_puts_it(trained):
    _, tokenizer, _, _ = trained
    whole, vocab = tokenizer.encode("list of the arguments, and of it").tolist(), tokenizer.vocabulary
    (place,) = [i for i, token in enumerate(whole) if tokenizer.token(token).strip("Ġ▁ ") == "the"]
    expected = [vocab.cls, *whole[:place], vocab.mask, *whole[place + 1 :], vocab.sep]
    assert masked(["list of ", " arguments, and of it"], tokenizer, framed=True) == expected
    assert masked(["list of ", " arguments, and of it"], tokenizer, framed=False) == [*expected[1:-1], vocab.eod]


def test_damage_is_found(trained, tmp_path):
    _, tokenizer, _, _ = trained
    tokenizer.save(tmp_path)
    path = tmp_path / "specials.json"
    sound = path.read_text()
    path.write_text(sound.replace('"<eod>": 2', '"<eod>": 3'))
    with pytest.raises(ValueError, match=r"specials\.json is damaged \(their digest differs\)"):
        TextTokenizer.load(tmp_path)
    path.write_text(sound[:50])
    with pytest.raises(ValueError, match=r"specials\.json is damaged"):
        TextTokenizer.load(tmp_path)
    (tmp_path / tokenizer.file).write_bytes(tokenizer.model[:100])
    with pytest.raises(ValueError, match=rf"is not a readable {tokenizer.file}"):
        TextTokenizer.load(tmp_path)


def test_a_bare_model_file_finds_its_specials(trained, tmp_path):
    _, tokenizer, _, _ = trained
    path = tmp_path / tokenizer.file
    path.write_bytes(tokenizer.model)
    for bare in (TextTokenizer.load(path), TextTokenizer.load(tmp_path)):
        assert dict(bare.specials) == dict(tokenizer.specials) and bare.digest == tokenizer.digest


def foreign(folder: Path, *, special: bool = True) -> Path:
    model = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.add_tokens([tokenizers.AddedToken("<|endoftext|>", special=special)])
    model.enable_truncation(4)
    model.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_a_tokenizer_from_elsewhere(tmp_path):
    path = foreign(tmp_path)
    with pytest.raises(ValueError, match=r"has no <pad>, <unk>, <cls>, <sep>, <mask>: .* extend=True"):
        TextTokenizer.load(path)
    tokenizer = TextTokenizer.load(path, extend=True)
    assert len(tokenizer) == 257 + len(RESERVED) - 1
    assert tokenizer.vocabulary.eod == tokenizer.specials["<eod>"] == 256 and tokenizer.vocabulary.pad == 257
    assert len(tokenizer.encode("<|endoftext|>")) == 13
    tokenizer.save(tmp_path / "saved")
    assert TextTokenizer.load(tmp_path / "saved").digest == tokenizer.digest
    content = json.loads(path.read_text())
    content["added_tokens"][0]["special"] = False
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="a document could forge it"):
        TextTokenizer.load(path, extend=True)


def test_trains_on_files_and_names_what_is_wrong(tmp_path):
    (tmp_path / "a.txt").write_text(TEXTS[0])
    assert TextTokenizer.train([tmp_path / "a.txt"], SIZE).digest == TextTokenizer.train(str(tmp_path), SIZE).digest
    with pytest.raises(ValueError, match=r"no corpus at .*missing\.txt"):
        TextTokenizer.train(["missing.txt"], SIZE)
    with pytest.raises(ValueError, match="did you mean 'unigram'"):
        TextTokenizer.train([], SIZE, "unigam")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no tokenizer at"):
        TextTokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="could not train on this text"):
        TextTokenizer.train(iter([]), SIZE, "unigram")
