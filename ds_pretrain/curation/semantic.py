"""Copies in meaning: documents whose sentence embeddings point almost the same way (SemDeDup, Abbas et al. 2023).

Every document is embedded by a local model, k-means groups the embeddings, and inside a group each document is held against all
before it: it goes if the most similar of these reaches the threshold, as in the authors' code, but in the order of the sources
where they keep what lies farthest from the centre. Embeddings are a pure function of the part (fixed batches, one thread), so
who works does not matter; machines with other instructions may round otherwise. The price: copies that k-means puts into two
groups are overlooked, and of a document of more than `WINDOWS` windows of the model only so many are read, evenly spread.

Suffixes: N documents, W windows, D features, K groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from ds_pretrain.core import rng
from ds_pretrain.core.pooling import pooling_of, sentences_of
from ds_pretrain.curation import runs
from ds_pretrain.curation.documents import Folder, Place, Work, batched, read_part, step
from ds_pretrain.curation.duplicates import clusters, drop, gathered, rows_of
from ds_pretrain.curation.workers import Workers, one_thread
from ds_pretrain.data.store import file_digest

if TYPE_CHECKING:
    from torch import Tensor

THRESHOLD = 0.95
WINDOWS = 4
"""Windows of the model that are read of one document."""
LONGEST = 1 << 16
"""Characters of a document that are tokenised."""
BATCH = 32
"""Windows that are embedded at once."""
FITTED = 256
"""Embeddings for each group that k-means looks at, as in faiss."""
TURNS = 25
"""Of k-means at most."""
BLOCK = 1 << 22
"""Similarities in memory at once."""
AT_ONCE = 50_000
"""Documents whose groups make a unit of work."""
SHOWN = 20
"""Pairs nearest to the threshold that the report shows, with so many characters of each."""
HEAD = 200
SWEPT = (0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99)
"""Thresholds of which the report says how many documents they would drop."""
NEAREST = np.dtype([("number", "<i8"), ("of", "<i8"), ("cosine", "<f4"), ("pairs", "<i8")])
"""of: the most similar document before it in its group. pairs: how many before it reach the threshold."""


def semantic(before: Folder, out: Path, workers: Workers, model: Path, threshold: float = THRESHOLD, groups: int = 0) -> Folder:
    """Drop documents that say what one before them says. model: folder of a sentence embedding model, as Hugging Face keeps
    them. groups: of k-means; 0: about the root of the number of documents."""
    check(model, threshold, groups)
    asked = {"model": model.name, "digest": _digest(model), "threshold": threshold, "groups": groups}

    def do(work: Work) -> dict[str, Any]:
        place = work.place
        work.each("embed", place.parts, partial(_embed, place, model), partial(place.of, "embedded"))
        total = sum(len(runs.load(place.of("embedded", part))) for part in place.parts)
        count = min(groups or max(1, round(total**0.5)), total)
        work.each("group", [count], partial(_fit, place, total), lambda _: place.of("centres"))
        work.each("assign", place.parts, partial(_assign, place), partial(place.of, "run"))
        chunks = list(enumerate(pairwise(np.linspace(0, count, 2 + total // AT_ONCE).round().astype(int).tolist())))
        work.each("compare", chunks, partial(_compare, place, threshold), lambda chunk: place.of("nearest", chunk[0]))
        nearest = gathered(place, "nearest", range(len(chunks)))
        passed = nearest[nearest["cosine"] >= threshold]
        copies = clusters(passed["of"], passed["number"])
        return drop(work, "semantic copy", copies) | _evidence(place, nearest, passed, count)

    return step("semantic", out, before, asked, workers, do)


def check(model: Path, threshold: float, groups: int) -> None:
    """ValueError for what cannot work, before anything is begun."""
    if not 0 < threshold <= 1 or groups < 0:
        raise ValueError(f"cosine threshold {threshold} must lie in (0, 1] and groups {groups} must not be negative")
    if find_spec("transformers") is None:
        raise ValueError("copies in meaning are found by a model of the transformers library: pip install transformers")
    if not (model / "config.json").is_file():
        raise ValueError(f"{model} has no config.json: give the folder of a sentence embedding model, such as all-MiniLM-L6-v2")
    pooling_of(model)
    try:
        Encoder.load(model)
    except OSError as error:
        raise ValueError(f"{model} cannot be loaded: {error}") from None


def _digest(model: Path) -> str:
    files = sorted(path for path in model.rglob("*") if path.suffix in (".json", ".txt", ".safetensors", ".bin", ".model"))
    return xxhash.xxh3_128_hexdigest("".join(f"{path.relative_to(model)} {file_digest(path)}\n" for path in files).encode())


@dataclass(frozen=True)
class Encoder:
    """Texts to vectors of length 1. length: tokens of a window, specials included."""

    tokenizer: Any
    model: Any
    pooling: str
    length: int

    @staticmethod
    def load(folder: Path) -> Encoder:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="right", truncation_side="right")
        if not tokenizer.is_fast:
            raise ValueError(
                f"{folder} has no tokenizer.json, which windows of long documents need: save it with a fast tokenizer"
            )
        model = AutoModel.from_pretrained(folder, local_files_only=True).float().eval()
        positions, first = getattr(model.config, "max_position_embeddings", None), _first_position(model)
        limits = (sentences_of(folder).tokens, tokenizer.model_max_length,
                  positions and positions - first)  # fmt: skip
        return Encoder(tokenizer, model, pooling_of(folder), min(limit for limit in limits if limit))

    @property
    def width(self) -> int:
        return self.model.config.hidden_size

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [N, D]: the mean over a text's windows by their tokens; for mean pooling that over all tokens."""
        import torch

        text, windows = self._windows(texts)
        total = np.zeros((len(texts), self.width), dtype=np.float32)
        order = np.argsort([-len(window["input_ids"]) for window in windows], kind="stable")
        for some in np.array_split(order, range(BATCH, len(order), BATCH)):
            padded = self.tokenizer.pad([windows[i] for i in some.tolist()], return_tensors="pt")
            with torch.no_grad():
                states = self.model(**padded).last_hidden_state
            np.add.at(total, text[some], self._pooled(states, padded["attention_mask"]).numpy())
        return total / np.linalg.norm(total, axis=1, keepdims=True)

    def _windows(self, texts: Sequence[str]) -> tuple[np.ndarray, list[dict[str, list[int]]]]:
        """Which text each window is of (int64 [W]), and what the model reads there."""
        found = self.tokenizer(
            [_excerpt(text) for text in texts], truncation=True, max_length=self.length, return_overflowing_tokens=True
        )
        text = np.array(found["overflow_to_sample_mapping"])
        ends = np.searchsorted(text, np.arange(len(texts) + 1))
        some = np.concatenate(
            [np.unique(np.linspace(a, b - 1, WINDOWS).round().astype(int)) for a, b in pairwise(ends.tolist())]
        )
        names = [name for name in self.tokenizer.model_input_names if name in found]
        return text[some], [{name: found[name][i] for name in names} for i in some.tolist()]

    def _pooled(self, states: Tensor, mask: Tensor) -> Tensor:
        """[W, D], times the tokens of each window."""
        real = mask[..., None].float()
        return (states * real).sum(1) if self.pooling == "mean" else states[:, 0] * real.sum(1)


def _first_position(model: Any) -> int:
    """The number of a text's first position: RoBERTa and its kin begin after that of padding."""
    padding = getattr(getattr(model, "embeddings", None), "padding_idx", None)
    return 0 if padding is None else padding + 1


def _excerpt(text: str) -> str:
    """A text that would be long to tokenise, by stretches of it."""
    if len(text) <= LONGEST:
        return text
    size = LONGEST // WINDOWS
    starts = np.linspace(0, len(text) - size, WINDOWS).astype(int).tolist()
    return "\n".join(text[start : start + size] for start in starts)


def _embed(place: Place, model: Path, part: Path) -> None:
    encoder = Encoder.load(model)
    dtype = np.dtype([("number", "<i8"), ("vector", "<f4", (encoder.width,))])
    made = [np.zeros(0, dtype)]
    with one_thread():
        for rows in batched(read_part(part)):
            some = np.empty(len(rows), dtype)
            some["number"], some["vector"] = [row.number for row in rows], encoder([row.text for row in rows])
            if strange := some["number"][~np.isfinite(some["vector"]).all(axis=1)].tolist():
                raise ValueError(f"{model} gives document {strange[0]} of {part} no finite embedding: are its weights sound?")
            made.append(some)
    runs.save(place.of("embedded", part), np.concatenate(made))


def kmeans(points_ND: np.ndarray, count: int) -> np.ndarray:
    """Centres [K, D] of points on the sphere (spherical k-means, Dhillon and Modha 2001), from `count` of them that a key
    chooses. One that loses all its points stays where it was."""
    chosen = rng.generator("semantic", len(points_ND), count).choice(len(points_ND), count, replace=False)
    centres_KD, was = points_ND[np.sort(chosen)], np.zeros(0)
    for _ in range(TURNS):
        nearest_N = _nearest_centre(points_ND, centres_KD)
        if np.array_equal(nearest_N, was):
            break
        order = np.argsort(nearest_N, kind="stable")
        some, first = np.unique(nearest_N[order], return_index=True)
        sums = np.add.reduceat(points_ND[order], first)
        centres_KD[some], was = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12), nearest_N
    return centres_KD


def _nearest_centre(points_ND: np.ndarray, centres_KD: np.ndarray) -> np.ndarray:
    rows = max(1, BLOCK // len(centres_KD))
    blocks = (points_ND[i : i + rows] for i in range(0, len(points_ND), rows))
    return np.concatenate([np.zeros(0, np.int64), *(_cosines(block, centres_KD).argmax(1) for block in blocks)])


def _cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """All products of rows; by torch, whose threads can be held to one."""
    import torch

    return (torch.from_numpy(one) @ torch.from_numpy(other).T).numpy()


def _fit(place: Place, total: int, count: int) -> None:
    """Centres of all documents, or of `FITTED` for each, evenly taken."""
    every = max(1, total // (FITTED * count))
    points = runs.joined(place.every("embedded"), lambda embedded: embedded["vector"][::every])
    with one_thread():
        runs.save(place.of("centres"), kmeans(points, count))


def _assign(place: Place, part: Path) -> None:
    """The groups of a part's documents, sorted, and where each document lies in its part."""
    vectors = np.ascontiguousarray(runs.load(place.of("embedded", part))["vector"])
    with one_thread():
        group = _nearest_centre(vectors, np.array(runs.load(place.of("centres")))) if len(vectors) else np.zeros(0, np.int64)
    assigned = np.empty(len(group), dtype=[("group", "<i8"), ("at", "<i8")])
    assigned["at"] = np.argsort(group, kind="stable")
    assigned["group"] = group[assigned["at"]]
    runs.save(place.of("run", part), assigned)


def _compare(place: Place, threshold: float, chunk: tuple[int, tuple[int, int]]) -> None:
    """For each document of some groups the nearest before it."""
    number, span = chunk
    slices = []
    for part in place.parts:
        assigned = runs.load(place.of("run", part))
        low, high = np.searchsorted(assigned["group"], span)
        slices.append((assigned["group"][low:high], runs.load(place.of("embedded", part))[assigned["at"][low:high]]))
    group = np.concatenate([group for group, _ in slices])
    order = np.argsort(group, kind="stable")
    documents = np.concatenate([documents for _, documents in slices])[order]
    ends = np.searchsorted(group[order], np.arange(span[0], span[1] + 1)).tolist()
    with one_thread():
        found = [nearest(documents[a:b], threshold) for a, b in pairwise(ends)]
    runs.save(place.of("nearest", number), np.concatenate([np.zeros(0, NEAREST), *found]))


def nearest(documents: np.ndarray, threshold: float) -> np.ndarray:
    """NEAREST of each but the first of a group, in the order of their numbers."""
    vectors = np.ascontiguousarray(documents["vector"])
    found = np.empty(len(documents), dtype=NEAREST)
    found["number"] = documents["number"]
    rows = max(1, BLOCK // max(1, len(documents)))
    for start in range(0, len(documents), rows):
        block = slice(start, start + rows)
        cosine = _cosines(vectors[block], vectors[: start + rows])
        cosine[np.triu_indices(len(cosine), start, cosine.shape[1])] = -1
        best = cosine.argmax(1)
        found["of"][block], found["cosine"][block] = documents["number"][best], cosine.max(1)
        found["pairs"][block] = (cosine >= threshold).sum(1)
    return found[1:]


def _evidence(place: Place, nearest: np.ndarray, passed: np.ndarray, count: int) -> dict[str, Any]:
    """How many pairs, how large the groups are, what other thresholds would drop, and the pairs nearest to this one."""
    groups = [np.bincount(runs.load(place.of("run", part))["group"], minlength=count) for part in place.parts]
    sizes = np.sort(np.sum(groups, axis=0))
    shown = np.sort(passed, order=("cosine", "number"))[:SHOWN]
    wanted = np.unique(np.concatenate([shown["number"], shown["of"]]))
    text = {row.number: " ".join(row.text.split())[:HEAD] for row in rows_of(place.parts, wanted)}
    return {
        "pairs": int(passed["pairs"].sum()),
        "groups": {"count": count, **{f"{share:.0%}": int(np.quantile(sizes, share)) for share in (0, 0.5, 0.9, 1)}},
        "would_drop": {str(each): int((nearest["cosine"] >= each).sum()) for each in SWEPT},
        "examples": [[round(float(each["cosine"]), 4), text[each["of"]], text[each["number"]]] for each in shown],
    }
