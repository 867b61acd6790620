"""Megatron's stores become ours: the same ids, the same text, nothing of theirs touched; and what is unsound is refused."""

import json
import random

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from ds_pretrain.data.adopt import Foreign, adopt
from ds_pretrain.data.dataset import PretrainingDataset
from ds_pretrain.data.store import HEADER, Store
from ds_pretrain.data.tokenizer import TextTokenizer

TEXTS = [f"Document {i} has é, 日本 and\n{'some more words ' * (i % 7)}" for i in range(40)]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(request):
    return TextTokenizer.train(iter(TEXTS * 9), 700, request.param)


def theirs(prefix, documents, dtype=np.int32):
    """Written by megatron-core: each document a list of sequences."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        builder.add_document(np.concatenate([*sequences, []]), [len(ids) for ids in sequences])
    builder.finalize(f"{prefix}.idx")
    return {suffix: prefix.with_name(f"{prefix.name}.{suffix}").read_bytes() for suffix in ("bin", "idx")}


def encoded(tokenizer, eod=True):
    end = [tokenizer.vocabulary.eod] * eod
    return [np.append(ids, end).astype(np.int32) for ids in tokenizer.encode_batch(TEXTS)]


@pytest.mark.parametrize("dtype", [np.int32, np.uint16])
def test_in_place_nothing_of_theirs_changes(tmp_path, tokenizer, dtype):
    prefix, documents, done = tmp_path / "train", encoded(tokenizer), []
    before = theirs(prefix, [[ids] for ids in documents], dtype)
    store = adopt(prefix, tokenizer, advance=done.append)
    assert {suffix: (tmp_path / f"train.{suffix}").read_bytes() for suffix in before} == before
    assert [store[i].tolist() for i in range(len(store))] == [ids.tolist() for ids in documents]
    assert store.text[:].tolist() == [[len(text.encode()), len(text.split())] for text in TEXTS]
    assert (store.info["text_sizes"], store.info["dtype"]) == ("decoded", np.dtype(dtype).name)
    assert sum(done) == store.info["tokens"] and Store(prefix).digest == store.digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.bin", "train.idx", "train.json", "train.text.npy"]
    with pytest.raises(ValueError, match=r"train\.json exists: the store is ours already"):
        adopt(prefix, tokenizer)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("seed", range(3))
def test_sequences_are_joined_and_ends_added_where_it_is_rewritten(tmp_path, tokenizer, dtype, seed):
    rng = random.Random(seed)
    documents = [ids if rng.random() < 0.5 else ids[:-1] for ids in encoded(tokenizer)]
    cut = [np.split(ids, sorted(rng.choices(range(1, len(ids)), k=rng.randrange(4)))) for ids in documents]
    before = theirs(tmp_path / "t", cut, dtype)
    with pytest.raises(
        ValueError, match=r"cannot be adopted in place \(.*\d+ of 40 documents are not one sequence.*do not end"
    ):
        adopt(tmp_path / "t", tokenizer)
    store = adopt(tmp_path / "t", tokenizer, tmp_path / "ours" / "train")
    assert [tokenizer.decode(store[i], skip_specials=True) for i in range(len(store))] == TEXTS
    assert [store[i].tolist() for i in range(len(store))] == [ids.tolist() for ids in encoded(tokenizer)]
    assert store.text[:, 0].tolist() == [len(text.encode()) for text in TEXTS] and store.info["text_sizes"] == "decoded"
    assert {suffix: (tmp_path / f"t.{suffix}").read_bytes() for suffix in before} == before
    back = IndexedDataset(store.prefix)
    assert [back[i].tolist() for i in range(len(back))] == [ids.tolist() for ids in encoded(tokenizer)]


def test_an_adopted_folder_trains(tmp_path, tokenizer):
    for name in ("train", "validation", "test"):
        theirs(tmp_path / name, [[ids] for ids in encoded(tokenizer)])
        adopt(tmp_path / name, tokenizer)
    tokenizer.save(tmp_path / "tokenizer")
    data = PretrainingDataset(tmp_path, seq_len=64, objective="clm")
    rows = data.evaluation()
    assert (rows.documents, rows.bytes) == (40, sum(len(text.encode()) for text in TEXTS))
    assert torch.is_tensor(data.collate(rows.rows[:2]).inputs)


def test_what_is_unsound_is_refused_and_leaves_nothing(tmp_path, tokenizer):
    prefix, index = tmp_path / "t", tmp_path / "t.idx"
    theirs(prefix, [[ids] for ids in encoded(tokenizer)[:5]])
    sound, count = index.read_bytes(), 5
    lengths, pointers, documents = HEADER.size, HEADER.size + 4 * count, HEADER.size + 12 * count
    cases = {
        r"t\.idx is no index of Megatron's": b"X" + sound[1:],
        r"t\.idx is no index of .* dtype 7": sound[:17] + b"\x07" + sound[18:],
        r"t\.idx has \d+ bytes instead of \d+": sound[:-1],
        r"t\.idx has 20 bytes instead of": sound[:20],
        "sequences do not lie end to end": sound[:lengths] + b"\xff" * 4 + sound[lengths + 4 :],
        "its sequences do not lie end": sound[: pointers + 8] + b"\1" + sound[pointers + 9 :],
        "its documents are not runs of its 5 sequences": sound[:-8] + b"\4" + sound[-7:],
        "its documents are not runs": sound[:documents] + b"\1" + sound[documents + 1 :],
        r"t\.idx is missing or empty": b"",
    }
    for message, raw in cases.items():
        index.write_bytes(raw)
        with pytest.raises(ValueError, match=message):
            adopt(prefix, tokenizer)
    index.write_bytes(sound)
    assert len(Foreign.open(prefix)) == 5
    small = TextTokenizer.train(iter(TEXTS), 600, "bpe")
    theirs(prefix, [[np.array([600, 1, small.vocabulary.eod])]])
    for output in (None, tmp_path / "other"):
        with pytest.raises(ValueError, match=r"holds ids \d+\.\.600, outside the vocabulary of \d+: name the tokenizer"):
            adopt(prefix, small, output)
    (tmp_path / "t.bin").write_bytes(b"\0\0\0\0")
    with pytest.raises(ValueError, match=r"t\.bin has 4 bytes instead of 12"):
        adopt(prefix, small)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.bin", "t.idx"]


def test_an_interrupted_adoption_leaves_nothing(tmp_path, tokenizer):
    theirs(tmp_path / "t", [[ids] for ids in encoded(tokenizer)])

    def interrupted(_):
        raise KeyboardInterrupt

    for output in (None, tmp_path / "other"):
        with pytest.raises(KeyboardInterrupt):
            adopt(tmp_path / "t", tokenizer, output, interrupted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.bin", "t.idx"]
    adopt(tmp_path / "t", tokenizer)
    assert json.loads((tmp_path / "t.json").read_text())["documents"] == len(TEXTS)
