"""A store gives back what was written, Megatron reads the same, and no changed byte goes unnoticed."""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from ds_pretrain.data.store import SUFFIXES, Store, StoreWriter, dtype_for

EOD = 2
FILES = (*SUFFIXES, "json")


def documents(vocab_size: int, count: int = 40) -> list[np.ndarray]:
    rng = np.random.default_rng(vocab_size)
    docs = [rng.integers(0, vocab_size, size=rng.integers(0, 50)).astype(np.int32) for _ in range(count)]
    docs[0] = np.array([vocab_size - 1, 0], dtype=np.int32)
    return docs


def write(prefix: Path, docs: list[np.ndarray], vocab_size: int) -> Store:
    with StoreWriter(prefix, vocab_size=vocab_size, eod=EOD, tokenizer_digest="tok") as writer:
        for i, doc in enumerate(docs):
            writer.add(doc, "é word " * i)
    return Store(prefix)


@pytest.fixture(params=[600, 65536, 65537, 200_000])
def made(request, tmp_path):
    docs = documents(request.param)
    return request.param, docs, write(tmp_path / "a.b" / "train", docs, request.param)


def test_gives_back_what_was_written(made):
    vocab_size, docs, store = made
    assert (len(store), store.vocab_size, store.tokenizer_digest) == (len(docs), vocab_size, "tok")
    assert store.info["dtype"] == ("uint16" if vocab_size <= 65536 else "int32")
    for i, doc in enumerate(docs):
        assert store[i].dtype == np.int32
        assert store[i].tolist() == [*doc.tolist(), EOD]
        assert store.slice(i, 0, len(doc)).tolist() == doc.tolist()
        assert store.lengths[i] == len(doc) + 1
        assert store.text[i].tolist() == [8 * i, 2 * i]
    assert store.info["tokens"] == sum(len(doc) + 1 for doc in docs) == store.lengths.sum()
    assert (store.info["bytes"], store.info["words"]) == tuple(store.text.sum(axis=0).tolist())
    assert pickle.loads(pickle.dumps(store))[3].tolist() == store[3].tolist()


def test_megatron_reads_the_same(made):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    _, docs, store = made
    theirs = IndexedDataset(store.prefix)
    assert len(theirs) == len(store)
    assert theirs.sequence_lengths.tolist() == store.lengths.tolist()
    assert theirs.document_indices.tolist() == list(range(len(docs) + 1))
    assert all(theirs[i].tolist() == store[i].tolist() for i in range(len(store)))
    assert theirs.get(5, 3, 4).tolist() == store.slice(5, 3, 7).tolist()


def test_a_slice_is_a_copy_and_never_leaves_its_document(made):
    _, docs, store = made
    part = store.slice(0, 0, 1)
    part[:] = 77
    assert part.base is None and store[0].tolist() == [*docs[0], EOD]
    for i, start, stop in ((1, 0, len(docs[1]) + 2), (1, -1, 1), (1, 2, 1), (len(docs), 0, 1), (-1, 0, 1)):
        with pytest.raises(IndexError, match=r"train, which has \d+"):
            store.slice(i, start, stop)


def test_digest_names_the_content(tmp_path):
    docs = documents(600)
    digests = {write(tmp_path / name, docs, 600).digest for name in ("a", "b")}
    docs[0] = docs[0][::-1].copy()  # the same counts, other ids
    assert len(digests) == 1
    assert write(tmp_path / "c", docs, 600).digest not in digests


@pytest.mark.parametrize("suffix", FILES)
def test_every_mutation_is_found_at_open_with_the_file_named(tmp_path, suffix):
    docs = documents(600, 12)
    write(tmp_path / "train", docs, 600)
    path = tmp_path / f"train.{suffix}"
    sound = path.read_bytes()
    named = pytest.raises(ValueError, match=rf"train\.{suffix}")
    found = 0
    for place in np.random.default_rng(0).integers(0, len(sound), size=60).tolist():
        path.write_bytes(sound[:place] + bytes([sound[place] ^ (1 << place % 8)]) + sound[place + 1 :])
        with named:
            Store(tmp_path / "train")
        path.write_bytes(sound[:place])
        with named:
            Store(tmp_path / "train", "full" if suffix == "json" else "sizes")
        found += 2
    path.write_bytes(sound + b"\0")
    with named:
        Store(tmp_path / "train", "sizes")
    path.unlink()
    with named:
        Store(tmp_path / "train", "sizes")
    path.write_bytes(sound)
    assert len(Store(tmp_path / "train")) == 12
    print(f"{suffix}: {found + 2} of {found + 2} mutations found")


def test_a_mismatched_index_is_found_without_checksums(tmp_path):
    docs = documents(600, 12)
    write(tmp_path / "a", docs, 600)
    write(tmp_path / "b", [doc[::-1] for doc in docs[::-1]], 600)
    raw = bytearray((tmp_path / "a.idx").read_bytes())
    raw[34:38] = (9999).to_bytes(4, "little")
    (tmp_path / "a.idx").write_bytes(raw)
    with pytest.raises(ValueError, match=r"a\.idx counts"):
        Store(tmp_path / "a", "sizes")
    raw[0] ^= 1
    (tmp_path / "a.idx").write_bytes(raw)
    with pytest.raises(ValueError, match=r"a\.idx does not begin"):
        Store(tmp_path / "a", "sizes")
    shutil.copy(tmp_path / "b.idx", tmp_path / "a.idx")
    with pytest.raises(ValueError, match=r"a\.idx is damaged"):
        Store(tmp_path / "a")


def test_an_unfinished_store_leaves_nothing(tmp_path):
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), StoreWriter(tmp_path / "t", vocab_size=9, eod=2, tokenizer_digest="") as writer:
            writer.add(np.array([1]), "a")
            raise error
    with (
        pytest.raises(ValueError, match="no document was added"),
        StoreWriter(tmp_path / "t", vocab_size=9, eod=2, tokenizer_digest=""),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"no store at .*t\.json is missing"):
        Store(tmp_path / "t")


@pytest.mark.parametrize("ids", [[600], [-1], [3, 70_000]])
def test_ids_outside_the_vocabulary_are_refused(tmp_path, ids):
    with (
        pytest.raises(ValueError, match="outside the vocabulary of 600"),
        StoreWriter(tmp_path / "t", vocab_size=600, eod=2, tokenizer_digest="") as writer,
    ):
        writer.add(np.array(ids), "a")
    assert list(tmp_path.iterdir()) == []


def test_impossible_requests_say_so(tmp_path):
    with pytest.raises(ValueError, match="end-of-document id 9 is outside"):
        StoreWriter(tmp_path / "t", vocab_size=9, eod=9, tokenizer_digest="")
    write(tmp_path / "t", documents(600), 600)
    with pytest.raises(ValueError, match="remove it or choose another"):
        write(tmp_path / "t", documents(600), 600)
    with pytest.raises(ValueError, match="'full' or 'sizes'"):
        Store(tmp_path / "t", "none")  # type: ignore[arg-type]
    assert dtype_for(65536) == np.uint16 and dtype_for(65537) == np.int32


@pytest.mark.parametrize("vocab_size", [600, 70_000])
@pytest.mark.parametrize("reach", [31, 32])
def test_tokens_past_two_billion_are_read_right_by_us_and_by_megatron(tmp_path, vocab_size, reach):
    """Holes stand for documents of 2^29 zeros: gigabytes in the file's size, nothing on the disk."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    hole, near, far = 1 << 29, documents(vocab_size, 3), documents(vocab_size, 9)[1:]
    with StoreWriter(tmp_path / "t", vocab_size=vocab_size, eod=EOD, tokenizer_digest="tok") as writer:
        for doc in near:
            writer.add(doc, "a b")
        for _ in range((1 << reach) // hole):
            writer._bin.seek(hole * writer.dtype.itemsize, os.SEEK_CUR)
            writer._lengths.append(hole)
            writer._text.extend((0, 0))
            writer._tokens += hole
        for doc in far:
            writer.add(doc, "a b")
    path, store, theirs = tmp_path / "t.bin", Store(tmp_path / "t", "sizes"), IndexedDataset(str(tmp_path / "t"))
    assert path.stat().st_size > (2 if vocab_size <= 65536 else 4) << reach and path.stat().st_blocks * 512 < 1 << 20
    assert len(store) == len(theirs) == len(near) + (1 << reach) // hole + len(far) and store.info["tokens"] > 1 << reach
    for i, doc in zip([0, 1, 2, *range(len(store) - len(far), len(store))], [*near, *far], strict=True):
        assert store[i].tolist() == [*doc.tolist(), EOD] == theirs[i].tolist()
        assert store.slice(i, len(doc) // 2, len(doc)).tolist() == doc[len(doc) // 2 :].tolist()
    assert store.slice(len(store) - len(far) - 1, hole - 9, hole).tolist() == [0] * 9
    assert store.at(store.ends(len(store) - len(far), len(store)) - 1).tolist() == [EOD] * len(far)
    ends = np.cumsum(store.lengths, dtype=np.int64)
    assert store.ends(0, len(store)).tolist() == ends.tolist() and ends[-1] > 1 << reach


def test_chunks_are_all_tokens_in_order(made):
    _, docs, store = made
    flat = [token for doc in docs for token in (*doc.tolist(), EOD)]
    for size in (1, 7, 1 << 22):
        parts = list(store.chunks(size))
        assert np.concatenate(parts).tolist() == flat and max(map(len, parts)) <= size
