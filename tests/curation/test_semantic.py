"""Copies in meaning: embeddings beside those made by hand, what is dropped beside all pairs, and the same bytes for anyone."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from test_steps import corpus, digests, order, texts_of

from ds_pretrain.curation import reading
from ds_pretrain.curation import semantic as here
from ds_pretrain.curation.reading import read
from ds_pretrain.curation.semantic import Encoder, kmeans, nearest, semantic
from ds_pretrain.curation.workers import Workers, workers

HERE = Workers(quiet=True)
WORDS = [f"word{i}" for i in range(200)]
THRESHOLD = 0.93


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a tiny random BERT that does not know where a word stands: a bag of words."""
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def tiny_model(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(specials + WORDS)}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=plain, model_max_length=32, **named).save_pretrained(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    made = BertModel(BertConfig(vocab_size=len(plain.get_vocab()), max_position_embeddings=64, **size))
    with torch.no_grad():
        made.embeddings.position_embeddings.weight.zero_()
        made.embeddings.word_embeddings.weight.normal_()
    made.save_pretrained(folder)
    return folder


def sentences(count=120, changed=True):
    """Random sentences, and some of them again with their words in another order, and perhaps one or two others."""
    draw = random.Random(0)
    base = [[draw.choice(WORDS) for _ in range(draw.randrange(3, 25))] for _ in range(count)]
    made = base + [draw.sample(words, len(words)) for words in draw.choices(base[:30], k=count // 2)]
    for words in made[count::2] if changed else []:
        words[: draw.randrange(3)] = draw.choices(WORDS, k=2)
    draw.shuffle(made)
    return [" ".join(words) for words in made]


def states_by_hand(folder, text):
    """What the model says of each token of a text that fits one window, by transformers alone."""
    from transformers import AutoModel, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.no_grad():
        return AutoModel.from_pretrained(folder).eval()(**ids).last_hidden_state[0].numpy()


def unit(vector):
    return vector / np.linalg.norm(vector)


def with_files(model, folder, **files):
    """A copy of the model with more files; keys are paths with __ for their slash."""
    shutil.copytree(model, folder)
    for name, content in files.items():
        path = folder / f"{name.replace('__', '/')}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return folder


MEAN = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
CLS = {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True, "include_prompt": True}


@pytest.mark.parametrize("pooling", [None, MEAN, CLS, {"pooling_mode": "cls"}])
def test_embeddings_are_the_pooled_states_whatever_is_beside_them(model, tmp_path, pooling):
    folder = with_files(model, tmp_path / "model", **({} if pooling is None else {"1_Pooling__config": pooling}))
    texts = sentences(30)
    found = Encoder.load(folder)(texts)
    for text, vector in zip(texts[:12], found, strict=False):
        states = states_by_hand(model, text)
        expected = states[0] if pooling in (CLS, {"pooling_mode": "cls"}) else states.mean(0)
        np.testing.assert_allclose(vector, unit(expected), atol=1e-5)
    np.testing.assert_allclose(Encoder.load(folder)(texts[7:8]), found[7:8], atol=1e-6)


def test_an_empty_folder_of_a_pooling_is_none(model, tmp_path):
    (with_files(model, tmp_path / "model") / "1_Pooling").mkdir()
    np.testing.assert_array_equal(Encoder.load(tmp_path / "model")(sentences(3)), Encoder.load(model)(sentences(3)))


@pytest.mark.parametrize("count, chosen", [(3, [0, 1, 2]), (10, [0, 3, 6, 9])])
def test_long_documents_are_read_in_windows_from_begin_to_end(model, count, chosen):
    draw = random.Random(1)
    windows = [" ".join(draw.choices(WORDS, k=30)) for _ in range(count)]
    states = np.concatenate([states_by_hand(model, windows[i]) for i in chosen])
    encoder = Encoder.load(model)
    (found,) = encoder([" ".join(windows)])
    np.testing.assert_allclose(found, unit(states.mean(0)), atol=1e-5)
    (other,) = encoder([" ".join([*windows[:-1], " ".join(draw.choices(WORDS, k=30))])])
    assert found @ other < 0.999, "the end counts"


def test_windows_count_by_their_tokens(model, tmp_path):
    draw = random.Random(1)
    windows = [" ".join(draw.choices(WORDS, k=k)) for k in (30, 30, 4)]
    (found,) = Encoder.load(with_files(model, tmp_path / "model", **{"1_Pooling__config": CLS}))([" ".join(windows)])
    states = [states_by_hand(model, window) for window in windows]
    np.testing.assert_allclose(found, unit(np.sum([each[0] * len(each) for each in states], axis=0)), atol=1e-5)


def test_very_long_documents_are_tokenised_by_stretches(monkeypatch):
    monkeypatch.setattr(here, "LONGEST", 40)
    text = "".join(chr(ord("a") + i % 26) for i in range(1000))
    stretches = here._excerpt(text).split("\n")
    assert [len(each) for each in stretches] == [10] * 4 and stretches[0] == text[:10] and stretches[-1] == text[-10:]
    assert here._excerpt(text[:40]) == text[:40]


def test_what_is_dropped_is_what_all_pairs_give(model, tmp_path):
    """A document goes if one before it is similar enough, and the first of its chain stays for it."""
    texts = order(sentences())
    before = read([corpus(tmp_path / "in", sentences())], tmp_path / "read", HERE)
    found = semantic(before, tmp_path / "out", HERE, model, THRESHOLD, groups=1)
    vectors = Encoder.load(model)(texts)
    cosine = np.tril(vectors @ vectors.T, -1)
    assert [row.text for row in found.rows()] == [
        text for text, row in zip(texts, cosine, strict=True) if row.max() < THRESHOLD
    ]
    gone = list(found.dropped())
    assert len(gone) > 40 and {each.reason for each in gone} == {"semantic copy"}
    place = {row.number: i for i, row in enumerate(before.rows())}
    kept = {row.number for row in found.rows()}
    for each in gone:
        i = place[each.row.number]
        while cosine[i].max() >= THRESHOLD:
            i = int(cosine[i].argmax())
        assert each.of in kept and place[each.of] == i
    report = found.report
    assert report["pairs"] == (cosine >= THRESHOLD).sum() and report["groups"]["count"] == 1
    assert report["would_drop"] == {str(each): int((cosine.max(1) >= each).sum()) for each in here.SWEPT}
    similar = [each[0] for each in report["examples"]]
    assert len(similar) == here.SHOWN and similar == sorted(similar) and similar[0] >= THRESHOLD
    assert all(sorted(one.split()) == sorted(other.split()) for cosine, one, other in report["examples"] if cosine > 0.99999)


def test_copies_meet_in_one_of_many_groups(model, tmp_path):
    """The same words in another order have the same embedding, so no group parts them."""
    texts = sentences(changed=False)
    found = semantic(read([corpus(tmp_path / "in", texts)], tmp_path / "read", HERE), tmp_path / "out", HERE, model, 0.9999)
    assert len(texts_of(found)) == len({" ".join(sorted(text.split())) for text in texts}) < 130
    assert found.report["groups"]["count"] == 13 and found.report["groups"]["100%"] < 180


def test_kmeans_finds_what_is_apart_and_ends_where_nothing_moves():
    draw = np.random.default_rng(0)
    middle = np.eye(8, dtype=np.float32)[draw.integers(8, size=600)]
    points = (middle + 0.05 * draw.normal(size=(600, 8))).astype(np.float32)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    centres = kmeans(points, 20)
    group = (points @ centres.T).argmax(1)
    assert all(len(np.unique(middle[group == i], axis=0)) <= 1 for i in range(20)), "no group has points of two blobs"
    for i in np.unique(group):
        np.testing.assert_allclose(centres[i], unit(points[group == i].sum(0)), atol=1e-5)
    np.testing.assert_array_equal(kmeans(points, 20), centres)
    assert kmeans(points[:3].repeat(5, axis=0), 15).shape == (15, 8), "a centre that loses all its points stays"


@pytest.mark.parametrize("block", [1, 50, 1 << 22])
def test_similarities_are_those_of_all_pairs_in_blocks_of_any_size(monkeypatch, block):
    monkeypatch.setattr(here, "BLOCK", block)
    draw = np.random.default_rng(0)
    documents = np.empty(23, dtype=[("number", "<i8"), ("vector", "<f4", (6,))])
    documents["number"], documents["vector"] = np.arange(23) * 7, [unit(vector) for vector in draw.normal(size=(23, 6))]
    cosine = documents["vector"] @ documents["vector"].T
    found = nearest(documents, 0.3)
    assert found["number"].tolist() == [7 * i for i in range(1, 23)]
    assert found["of"].tolist() == [7 * int(cosine[i, :i].argmax()) for i in range(1, 23)]
    assert found["pairs"].tolist() == [int((cosine[i, :i] >= 0.3).sum()) for i in range(1, 23)]
    np.testing.assert_allclose(found["cosine"], [cosine[i, :i].max() for i in range(1, 23)], rtol=1e-6)


def test_the_bytes_do_not_depend_on_who_works_and_what_is_done_stays(model, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PART", 1)
    before = read([corpus(tmp_path / "in", sentences())], tmp_path / "read", HERE)
    semantic(before, tmp_path / "one" / "out", HERE, model, THRESHOLD)
    with workers(2, quiet=True) as team:
        semantic(before, tmp_path / "two" / "out", team, model, THRESHOLD)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(here, "_compare", fail)
        semantic(before, tmp_path / "three" / "out", HERE, model, THRESHOLD)
    monkeypatch.setattr(here, "_embed", fail)
    semantic(before, tmp_path / "three" / "out", HERE, model, THRESHOLD)
    assert digests(tmp_path / "one") == digests(tmp_path / "three")
    with pytest.raises(ValueError, match="was made by other means"):
        semantic(before, tmp_path / "one" / "out", HERE, with_files(model, tmp_path / "other", modules=[]), THRESHOLD)


def test_a_single_document_is_no_mistake(model, tmp_path):
    before = read([corpus(tmp_path / "in", ["word1 word2"], 1)], tmp_path / "read", HERE)
    assert semantic(before, tmp_path / "out", HERE, model).report["documents"] == 1


def test_all_that_is_computed_has_one_thread(model, tmp_path, monkeypatch):
    seen, threads = [], torch.get_num_threads()
    for place, name in ((Encoder, "_pooled"), (here, "_cosines")):
        plain = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *given, plain=plain: seen.append(torch.get_num_threads()) or plain(*given))
    before = read([corpus(tmp_path / "in", sentences(20))], tmp_path / "read", HERE)
    torch.set_num_threads(3)
    try:
        semantic(before, tmp_path / "out", HERE, model)
        assert len(seen) > 4 and set(seen) == {1} and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


DENSE = [{"type": f"sentence_transformers.models.{kind}", "path": kind} for kind in ("Transformer", "Dense")]


@pytest.mark.parametrize(
    "files, told",
    [
        ({"1_Pooling__config": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}}, "cls and mean pooling"),
        ({"1_Pooling__config": {"pooling_mode_lasttoken": True}}, "asks for lasttoken pooling"),
        ({"1_Pooling__config": {}}, "asks for no pooling"),
        ({"modules": DENSE}, "has a Dense layer"),
    ],
)
def test_models_that_work_otherwise_are_refused(model, tmp_path, files, told):
    with pytest.raises(ValueError, match=told):
        here.check(with_files(model, tmp_path / "model", **files), THRESHOLD, 0)


def test_mistakes_are_told_with_their_mending(model, tmp_path, monkeypatch):
    for threshold, groups in ((0, 0), (1.01, 0), (0.9, -1)):
        with pytest.raises(ValueError, match=r"must lie in \(0, 1\]"):
            here.check(model, threshold, groups)
    with pytest.raises(ValueError, match=r"has no config\.json"):
        here.check(tmp_path, THRESHOLD, 0)
    monkeypatch.setattr(here, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install transformers"):
        here.check(model, THRESHOLD, 0)
