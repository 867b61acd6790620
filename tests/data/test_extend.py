"""Old ids keep their meaning, and what is learned is what training with the larger vocabulary would have learned."""

import json
import random
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from ds_pretrain.data.extend import extend, load
from ds_pretrain.data.tokenizer import KINDS, RESERVED, TextTokenizer

STDLIB = Path(sysconfig.get_paths()["stdlib"])
ENGLISH = [(STDLIB / name).read_text("utf-8")[:40_000] for name in ("argparse.py", "textwrap.py")]
RNG = random.Random(0)
COMMON = [chr(RNG.randrange(0x4E00, 0x9000)) for _ in range(60)]
WORDS = ["".join(RNG.choices(COMMON, k=RNG.randrange(1, 4))) for _ in range(80)]
CHINESE = ["".join(RNG.choices(WORDS, k=15)) + "。\n" for _ in range(300)]
SIZE = 900


@pytest.fixture(scope="module", params=KINDS)
def made(request):
    old = TextTokenizer.train(iter(ENGLISH), SIZE, request.param)
    return request.param, old, extend(old, CHINESE[:200], 120)


def tokens(tokenizer, texts):
    return sum(map(len, tokenizer.encode_batch(texts)))


def test_old_ids_mean_what_they_meant(made):
    _, old, extension = made
    new = extension.tokenizer
    assert extension.first == len(old) == SIZE and len(new) == SIZE + len(extension.parts) and new.specials == old.specials
    assert [new.token(i) for i in range(SIZE)] == [old.token(i) for i in range(SIZE)]
    assert new.vocabulary.surfaces()[:SIZE] == old.vocabulary.surfaces()
    for ids in old.encode_batch([*ENGLISH, *CHINESE]):
        assert new.decode(ids) == old.decode(ids)
    assert [new.token(i) for i in range(len(RESERVED))] == list(RESERVED)
    assert len({new.token(i) for i in range(len(new))}) == len(new)


def test_the_new_text_costs_less_and_the_old_no_more(made):
    kind, old, extension = made
    held_out = CHINESE[200:]
    before, after = tokens(old, held_out), tokens(extension.tokenizer, held_out)
    if kind == "wordpiece":  # takes an ideograph for a word of its own, so there are characters to learn and no more
        unknown = [
            sum(int((ids == t.vocabulary.unk).sum()) for ids in t.encode_batch(held_out)) for t in (old, extension.tokenizer)
        ]
        assert unknown[1] < 0.3 * unknown[0]
    else:
        assert after < 0.45 * before
        assert [extension.tokenizer.decode(ids) for ids in extension.tokenizer.encode_batch(held_out)] == held_out
    assert tokens(extension.tokenizer, ENGLISH) <= tokens(old, ENGLISH)


def test_parts_spell_the_pieces(made):
    kind, old, extension = made
    used = {int(i) for ids in extension.tokenizer.encode_batch(CHINESE) for i in ids if i >= SIZE}
    assert len(used) > len(extension.parts) / 2  # the others are on the way to longer ones
    assert all(part < SIZE and part not in old.vocabulary.specials for ids in extension.parts for part in ids)
    for place, ids in enumerate(extension.parts if kind != "wordpiece" else ()):
        whole = extension.tokenizer.decode([SIZE + place])
        if "\N{REPLACEMENT CHARACTER}" not in whole:  # not the half of a character
            assert old.decode(ids) == whole


@pytest.mark.parametrize("seed", range(4))
def test_bpe_goes_on_as_if_training_had_never_ended(seed):
    """Against the library's own trainer: the same text, the larger vocabulary, the same pieces and merges in the same order."""
    rng = random.Random(seed)
    texts = ["".join(rng.choices("aabbc d日", k=300)) for _ in range(20)] if seed % 2 else [rng.choice(ENGLISH)[:20_000]]
    size = 600 + 20 * seed
    small, large = (TextTokenizer.train(iter(texts), n) for n in (size, size + 60))
    made = extend(small, texts, len(large) - len(small)).tokenizer
    got, wanted = (json.loads(tokenizer.model)["model"] for tokenizer in (made, large))
    assert got["merges"] == wanted["merges"] and got["vocab"] == wanted["vocab"]


def test_wordpiece_learns_words():
    old = TextTokenizer.train(iter(ENGLISH), SIZE, "wordpiece")
    text = ["zygomorphic zygomorphy actinomorphic"] * 5
    extension = extend(old, text, 60)
    new = extension.tokenizer
    assert len(new.encode("zygomorphic")) == len(new.encode("actinomorphic")) == 1 < len(old.encode("zygomorphic"))
    parts = extension.parts[new.encode("zygomorphic")[0] - SIZE]
    assert "".join(old.token(i).removeprefix("##") for i in parts) == "zygomorphic"


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_reserved_tokens_that_a_tokenizer_from_elsewhere_lacks_keep_their_ids(kind, tmp_path):
    if kind == "bpe":
        raw = tokenizers.Tokenizer(models.BPE())
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = tokenizers.decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        raw.train_from_iterator(
            ENGLISH, tokenizers.trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
        )
        raw.save(str(tmp_path / "tokenizer.json"))
    else:
        import sentencepiece

        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(ENGLISH[0].splitlines()), model_prefix=str(tmp_path / "tokenizer"), vocab_size=500,
            byte_fallback=True, minloglevel=2,
        )  # fmt: skip
    old = TextTokenizer.load(tmp_path, extend=True)
    assert max(old.specials.values()) == len(old) - 1 > 600
    new = extend(old, CHINESE, 50).tokenizer
    new.save(tmp_path / "new")
    again = TextTokenizer.load(tmp_path / "new")
    assert again.specials == old.specials and len(again) == len(old) + 50
    assert tokens(again, CHINESE) < tokens(old, CHINESE) and again.decode([again.specials["<mask>"]]) == "<mask>"


def test_a_character_that_was_unknown_is_spelled_by_nothing():
    raw = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    reserved = [tokenizers.AddedToken(name, special=True, normalized=False) for name in RESERVED]
    raw.train_from_iterator(["abab ab"] * 9, tokenizers.trainers.BpeTrainer(special_tokens=reserved, show_progress=False))
    old = TextTokenizer("tokenizer.json", raw.to_str().encode(), {name: i for i, name in enumerate(RESERVED)})
    extension = extend(old, ["abab日本 日本"] * 5, 4)
    pieces = dict(zip([extension.tokenizer.token(extension.first + i) for i in range(4)], extension.parts, strict=True))
    assert pieces == {"日": (), "本": (), "日本": (), "abab日本": (old.encode("abab")[0],)}


def test_saved_and_loaded(made, tmp_path):
    _, _, extension = made
    extension.save(tmp_path / "a")
    again = load(tmp_path / "a")
    assert (again.first, again.parts, again.tokenizer.digest) == (extension.first, extension.parts, extension.tokenizer.digest)
    assert all(map(np.array_equal, again.tokenizer.encode_batch(CHINESE), extension.tokenizer.encode_batch(CHINESE)))
    TextTokenizer.train(iter(ENGLISH), 700).save(tmp_path / "b")
    with pytest.raises(ValueError, match=r"no sound pieces\.json"):
        load(tmp_path / "b")
    (tmp_path / "b" / "pieces.json").write_bytes((tmp_path / "a" / "pieces.json").read_bytes())
    with pytest.raises(ValueError, match="is of another tokenizer"):
        load(tmp_path / "b")


def test_what_cannot_be_learned_says_so(made):
    _, old, _ = made
    for texts, pieces in ((CHINESE, 0), ([], 5), ([" "], 5)):
        with pytest.raises(ValueError, match="nothing to learn"):
            extend(old, texts, pieces)


def test_other_models_are_refused():
    vocab = {name: i for i, name in enumerate([*RESERVED[:6], "a"])}
    raw = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in RESERVED[:6]])
    odd = TextTokenizer("tokenizer.json", raw.to_str().encode(), {name: vocab[name] for name in RESERVED[:6]})
    with pytest.raises(ValueError, match=r"WordLevel of a tokenizer\.json cannot be extended"):
        extend(odd, CHINESE, 5)
    with pytest.raises(ValueError, match="nothing learned"):
        extend(TextTokenizer.train(iter(ENGLISH), SIZE), ["q x"], 5)
