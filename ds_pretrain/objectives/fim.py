"""Fill in the middle: a document A B C is rewritten so that B comes last, and a left-to-right model learns to infill.

Cut at two uniformly random places and moved before packing, so that no marker and no middle is ever cut off (Bavarian et
al. 2022). PSM writes <PRE> A <SUF> C <MID> B, SPM writes <PRE> <SUF> C <MID> A B; the end-of-document id follows the middle.
Attention is causal and every token is predicted. Cutting characters encodes the three parts anew, as they would be at
inference; where a part's tokens do not spell its text (a piece that starts inside a character) the cuts are between tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ds_pretrain.core.batch import Batch, Count, Document, Example, Head
from ds_pretrain.core.vocabulary import Codec, Vocabulary
from ds_pretrain.objectives.base import Objective, register
from ds_pretrain.objectives.causal import CausalLanguageModeling
from ds_pretrain.objectives.prefix import prefixed

NAMES = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")
SLACK = 6
"""Tokens that two cuts inside words may add; a document that would need more is cut between tokens."""


@register("fim")
@dataclass(frozen=True, kw_only=True)
class FillInTheMiddle(Objective):
    """Causal language modelling in which some documents are rewritten."""

    rate: float = 0.5
    """Share of documents that are rewritten."""
    spm: float = 0.5
    """Share of the rewritten in suffix-prefix-middle order."""
    cut: Literal["character", "token"] = "character"
    """Where a document may be cut."""

    heads = (Head("fim"),)
    kind = "causal"

    def __post_init__(self) -> None:
        for name, share in (("rate", self.rate), ("spm", self.spm)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {share}")
        if self.cut not in ("character", "token"):
            raise ValueError(f"cut must be 'character' or 'token', got {self.cut!r}")

    @property
    def likelihood(self) -> Objective:
        """Read from left to right, as the other half of its documents are."""
        return CausalLanguageModeling()

    @property
    def added(self) -> int:
        """Positions that rewriting may add: three markers, an end where the piece has none, cuts inside words."""
        return 4 + (SLACK if self.cut == "character" else 0)

    def piece(self, max_len: int) -> int:
        return max_len - self.added

    def size(self, tokens: np.ndarray) -> np.ndarray:
        return tokens + self.added

    def check(self, vocab: Vocabulary, max_len: int) -> list[str]:
        problems = vocab.lacks(self.name, NAMES)
        if max_len < 8 + self.added:
            problems.append(f"batch.seq_len {max_len} is too short for fim: at least {8 + self.added} positions are needed")
        if self.cut == "character" and not _joins(vocab.codec):
            problems.append(
                "fim with cut=character needs a tokenizer whose parts of a text join to the text, as byte-level BPE does; "
                "this one puts a space between them: use objective.cut=token"
            )
        return problems

    def example(self, docs: Sequence[Document], vocab: Vocabulary, max_len: int, rng: np.random.Generator) -> Example:
        (doc,) = docs
        tokens, before = doc.tokens[: self.piece(max_len)], vocab.begin if doc.before is None else doc.before
        if rng.random() < self.rate:
            tokens, before = self._rewrite(tokens[tokens != vocab.eod], vocab, rng), vocab.begin
        return prefixed(np.concatenate(([before], tokens)), 1, "fim")

    @property
    def expected(self) -> Mapping[str, float]:
        return {"fim/rewritten": self.rate, "fim/spm": self.spm}

    def counted(self, batch: Batch, vocab: Vocabulary) -> Mapping[str, Count]:
        pre, suf = (vocab.names[name] for name in NAMES[:2])
        starts = int(((batch.position == 0) & (batch.targets["fim"].weights != 0)).sum())
        rewritten = int((batch.inputs == pre).sum())
        spm = int(((batch.inputs[:, :-1] == pre) & (batch.inputs[:, 1:] == suf)).sum())
        return {"fim/rewritten": (rewritten, starts), "fim/spm": (spm, rewritten)}

    def _rewrite(self, tokens: np.ndarray, vocab: Vocabulary, rng: np.random.Generator) -> np.ndarray:
        a, b, c = self._parts(tokens, vocab, rng)
        pre, suf, mid = ([vocab.names[name]] for name in NAMES)
        order = [pre, suf, c, mid, a, b] if rng.random() < self.spm else [pre, a, suf, c, mid, b]
        return np.concatenate([*order, [vocab.eod]]).astype(np.int32)

    def _parts(self, tokens: np.ndarray, vocab: Vocabulary, rng: np.random.Generator) -> Sequence[np.ndarray]:
        where = rng.random(2)
        if self.cut == "character" and vocab.codec and not vocab.is_special[tokens].any():
            text = vocab.codec.decode(tokens.tolist())
            i, j = sorted(int(x) for x in where * (len(text) + 1))
            texts = (text[:i], text[i:j], text[j:])
            parts = [vocab.codec.encode(part) for part in texts]
            exact = all(vocab.codec.decode(ids.tolist()) == part for ids, part in zip(parts, texts, strict=True))
            whole = "\N{REPLACEMENT CHARACTER}" not in text
            if exact and whole and sum(map(len, parts)) <= len(tokens) + SLACK:
                return parts
        i, j = sorted(int(x) for x in where * (len(tokens) + 1))
        return tokens[:i], tokens[i:j], tokens[j:]


def _joins(codec: Codec | None) -> bool:
    """Whether a word that is cut is the same word again (sentencepiece and WordPiece start a new one)."""
    return codec is not None and codec.decode([*codec.encode("a").tolist(), *codec.encode("b").tolist()]) == "ab"
