"""A `tokenizer.model` of sentencepiece as a `tokenizer.json` of the tokenizers library, which `transformers` opens.

Pieces keep their ids. Of a BPE model sentencepiece keeps only pieces and the order in which they were merged; every way to make
a piece of two others is a merge of that rank, which is what it tries when it encodes (Kudo and Richardson 2018): the ids of a
text are the same. A unigram model may take another of two splits that are equally likely (a line in a hundred), because one
library adds their scores in single and the other in double precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tokenizers
from sentencepiece import sentencepiece_model_pb2 as messages
from tokenizers import decoders, models, normalizers, pre_tokenizers

SPACE = "▁"
BPE = 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def converted(model: bytes) -> tokenizers.Tokenizer:
    """The same tokenizer. ValueError for a kind that has no counterpart."""
    message = messages.ModelProto.FromString(model)  # type: ignore[attr-defined]
    kind = message.trainer_spec.model_type
    if kind not in (1, BPE):
        raise ValueError("a sentencepiece model of words or characters has no counterpart in the tokenizers library")
    if message.trainer_spec.treat_whitespace_as_suffix:
        raise ValueError("a sentencepiece model with spaces behind its words has no counterpart in the tokenizers library")
    made = tokenizers.Tokenizer(_bpe(message) if kind == BPE else _unigram(message))
    spec = message.normalizer_spec
    made.normalizer = normalizers.Sequence([*_normalizers(spec)])
    if message.trainer_spec.split_by_whitespace and kind != BPE:
        made.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", left=1)] if spec.add_dummy_prefix else steps)
    made.add_special_tokens(
        [tokenizers.AddedToken(p.piece, normalized=False, special=True) for p in message.pieces if p.type in (UNKNOWN, CONTROL)]
    )
    made.add_tokens([tokenizers.AddedToken(p.piece, normalized=False) for p in message.pieces if p.type == USER_DEFINED])
    return made


def _normalizers(spec: Any) -> Iterator[Any]:
    """What sentencepiece does to a text before it looks for pieces."""
    if spec.precompiled_charsmap:
        yield normalizers.Precompiled(spec.precompiled_charsmap)
    if spec.remove_extra_whitespaces:
        yield normalizers.Strip()
        yield normalizers.Replace(tokenizers.Regex(" {2,}"), " ")
    if spec.add_dummy_prefix:
        yield normalizers.Prepend(SPACE)
    yield normalizers.Replace(" ", SPACE)


def _unigram(message: Any) -> models.Unigram:
    pieces = [(p.piece, p.score) for p in message.pieces]
    return models.Unigram(pieces, message.trainer_spec.unk_id, message.trainer_spec.byte_fallback)


def _bpe(message: Any) -> models.BPE:
    vocab = {p.piece: i for i, p in enumerate(message.pieces)}
    spec = message.trainer_spec
    return models.BPE(
        vocab, _merges(message.pieces, vocab), unk_token=spec.unk_piece, fuse_unk=True, byte_fallback=spec.byte_fallback
    )


def _merges(pieces: Sequence[Any], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """All ways to make a piece of two, the piece that was made first first."""
    usable = {p.piece for p in pieces if p.type in (NORMAL, USER_DEFINED)}
    ranked = sorted((p for p in pieces if p.type == NORMAL), key=lambda p: -p.score)
    return [
        (p.piece[:cut], p.piece[cut:])
        for p in ranked
        for cut in range(1, len(p.piece))
        if p.piece[:cut] in usable and p.piece[cut:] in usable
    ]
