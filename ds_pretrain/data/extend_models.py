"""The models of two libraries as one that learns pieces: BPE and WordPiece of `tokenizers`, BPE and unigram of `sentencepiece`.

A piece is spelled as in the model's vocabulary (bytes as letters, `##` or U+2581 in front); new ones take the ids after all
old ones, those included that only `TextTokenizer` knows. Pieces do not cross what the library takes for the end of a word. The
price: sentencepiece does not lend its own rules for that, so where scripts meet is read off the names of Unicode.
"""

from __future__ import annotations

import json
import re
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Hashable, Sequence
from functools import cache
from itertools import groupby
from typing import Any

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from ds_pretrain.data.tokenizer import TextTokenizer

messages: Any = sentencepiece_model_pb2  # its classes are made at import, unseen by type checkers
LONGEST = 16
"""Characters of a piece of sentencepiece: its own default."""
SPACE = "▁"
BYTE = re.compile("<0x[0-9A-F]{2}>")
"""What stands for a byte of a character without a piece, in sentencepiece and what is derived from it."""
Parts = dict[str, tuple[int, ...]]
"""New pieces and the old ids that spell them."""
Words = Counter[tuple[str, ...]]
"""Words in pieces, and how often they come."""


def open_model(tokenizer: TextTokenizer) -> Model:
    """The model of a tokenizer, to be extended."""
    if tokenizer.file == "tokenizer.model":
        message = messages.ModelProto.FromString(tokenizer.model)
        kinds = {message.trainer_spec.UNIGRAM: Unigram, message.trainer_spec.BPE: SentenceBpe}
        if message.trainer_spec.model_type not in kinds:
            raise ValueError("a sentencepiece model of words or characters cannot be extended: train a tokenizer instead")
        return kinds[message.trainer_spec.model_type](message, tokenizer)
    content = json.loads(tokenizer.model)
    made = {"BPE": Bpe, "WordPiece": WordPiece}.get(content["model"]["type"])
    model = content["model"]
    if made is None or model.get("end_of_word_suffix") or (made is Bpe and model.get("continuing_subword_prefix")):
        raise ValueError(
            f"this {model['type']} of a tokenizer.json cannot be extended, only WordPiece and BPE without marks inside or at "
            "the end of words: is there a tokenizer.model of it?"
        )
    return made(content, tokenizer)


class Model(ABC):
    """A library's model, as the learner sees it. A piece is spelled as in the vocabulary, a dict of ids."""

    ids: dict[str, int]
    unknown: int

    def join(self, left: str, right: str) -> str:
        return left + right

    def key(self, left: str, right: str) -> Hashable | None:
        """What is counted of these neighbours; None where they may not be joined."""
        piece = self.join(left, right)
        return None if piece in self.ids else piece

    def order(self, left: str, right: str) -> Any:
        """Which of two equally common ones is first: by their ids, as the tokenizers library does."""
        return self.ids[left], self.ids[right]

    @abstractmethod
    def lacking(self, texts: Sequence[str]) -> Counter[str]:
        """The characters without a piece."""

    @abstractmethod
    def spell(self, piece: str) -> Sequence[int]:
        """The old ids of such a character."""

    @abstractmethod
    def words(self, texts: Sequence[str]) -> Words:
        """The text in pieces, new characters among them; no piece is to cross the end of a word."""

    @abstractmethod
    def add(self, piece: str, pair: tuple[str, str] | None = None) -> None:
        """Append a piece; where it is there already, another pair that makes it."""

    @abstractmethod
    def tobytes(self) -> bytes:
        """The model's file."""


class Bpe(Model):
    """BPE of a tokenizer.json: what is learned are pairs."""

    def __init__(self, content: dict[str, Any], tokenizer: TextTokenizer) -> None:
        self.content, self.old = content, tokenizers.Tokenizer.from_str(json.dumps(content))
        self.ids = content["model"]["vocab"]
        self.unknown = tokenizer.specials["<unk>"]
        self.closed = frozenset(tokenizer.specials.values())
        self.next = len(tokenizer)
        self.listed = not (merges := content["model"].get("merges")) or isinstance(merges[0], list)
        self.pairs = {tuple(merge) if self.listed else tuple(merge.split(" ")) for merge in merges or ()}
        for name, i in sorted(tokenizer.specials.items(), key=lambda item: item[1]):
            if i >= max(self.old.get_vocab().values()) + 1:  # known to `TextTokenizer` only, and its id must not be given away
                self.ids[name] = i
                token = {"id": i, "content": name, "special": True}
                content["added_tokens"].append(token | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False))

    def key(self, left: str, right: str) -> Hashable | None:
        closed = self.ids.get(left + right) in self.closed
        return None if closed or (left, right) in self.pairs else (left, right)

    def lacking(self, texts: Sequence[str]) -> Counter[str]:
        found: Counter[str] = Counter()
        for word, times in self._cut(texts).items():
            for place, char in enumerate(word):
                found[self.character(char, place)] += times
        return Counter({piece: times for piece, times in found.items() if piece not in self.ids})

    def character(self, char: str, place: int) -> str:
        return char

    def spell(self, piece: str) -> list[int]:
        return [token.id for token in self.old.model.tokenize(piece)]

    def words(self, texts: Sequence[str]) -> Words:
        model = tokenizers.Tokenizer.from_str(self.tobytes().decode()).model
        found: Words = Counter()
        for word, times in self._cut(texts).items():
            tokens = model.tokenize(word)
            for known, run in groupby(tokens, lambda token: token.id not in self.closed and not BYTE.fullmatch(token.value)):
                if known:
                    found[tuple(token.value for token in run)] += times
        return found

    def _cut(self, texts: Sequence[str]) -> Counter[str]:
        """What the model is asked for, as the steps before it leave it."""
        found: Counter[str] = Counter()
        for text in texts:
            text = self.old.normalizer.normalize_str(text) if self.old.normalizer else text
            cut = self.old.pre_tokenizer.pre_tokenize_str(text) if self.old.pre_tokenizer else [(text, None)]
            found.update(word for word, _ in cut)
        return found

    def add(self, piece: str, pair: tuple[str, str] | None = None) -> None:
        if piece not in self.ids:
            self.ids[piece] = self.next
            self.next += 1
        if pair:
            self.pairs.add(pair)
            self.content["model"]["merges"].append(list(pair) if self.listed else " ".join(pair))

    def tobytes(self) -> bytes:
        return json.dumps(self.content, ensure_ascii=False).encode()


class WordPiece(Bpe):
    """WordPiece of a tokenizer.json: the longest piece wins, so a piece is all there is to learn."""

    def __init__(self, content: dict[str, Any], tokenizer: TextTokenizer) -> None:
        super().__init__(content, tokenizer)
        self.inside = content["model"]["continuing_subword_prefix"]

    def join(self, left: str, right: str) -> str:
        return left + right.removeprefix(self.inside)

    def key(self, left: str, right: str) -> Hashable | None:
        return Model.key(self, left, right)

    def character(self, char: str, place: int) -> str:
        return self.inside + char if place else char

    def spell(self, piece: str) -> list[int]:
        other = piece.removeprefix(self.inside) if piece.startswith(self.inside) else self.inside + piece
        found = self.old.token_to_id(other)
        return [] if found is None else [found]

    def add(self, piece: str, pair: tuple[str, str] | None = None) -> None:
        super().add(piece)


class SentenceBpe(Model):
    """BPE of sentencepiece: neighbours become one wherever that is a piece, the earliest piece first."""

    def __init__(self, message: Any, tokenizer: TextTokenizer) -> None:
        self.message, self.old = message, sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
        self.unknown = tokenizer.specials["<unk>"]
        names = {i: name for name, i in tokenizer.specials.items()}
        for i in range(len(message.pieces), len(tokenizer)):  # known to `TextTokenizer` only, and its id must not be given away
            message.pieces.add(piece=names[i], type=message.SentencePiece.CONTROL)
        self.ids = {piece.piece: i for i, piece in enumerate(message.pieces)}
        self.last = min(piece.score for piece in message.pieces)

    def key(self, left: str, right: str) -> Hashable | None:
        a, b = left[-1], right[0]
        apart = b == SPACE or (a != SPACE and _script(b) not in (_script(a), "M"))
        return None if apart or len(left + right) > LONGEST else super().key(left, right)

    def lacking(self, texts: Sequence[str]) -> Counter[str]:
        found = Counter[str]()
        for text in texts:
            found.update(self.old.normalize(text))
        return Counter({char: times for char, times in found.items() if char not in self.ids and not char.isspace()})

    def spell(self, piece: str) -> list[int]:
        start = len(self.old.encode("\n"))  # behind it no space mark is put
        return self.old.encode("\n" + piece)[start:]

    def words(self, texts: Sequence[str]) -> Words:
        model = sentencepiece.SentencePieceProcessor(model_proto=self.tobytes())
        found: Words = Counter()
        for pieces in model.encode([line for text in texts for line in text.splitlines()], out_type=str):
            word: list[str] = []
            for piece in [*pieces, SPACE]:
                known = piece in self.ids and not BYTE.fullmatch(piece)
                if word and (not known or piece.startswith(SPACE)):
                    found[tuple(word)] += 1
                    word = []
                word += [piece] if known else []
        return found

    def add(self, piece: str, pair: tuple[str, str] | None = None) -> None:
        self.last -= 1
        self.ids[piece] = len(self.message.pieces)
        self.message.pieces.add(piece=piece, score=self.last)

    def tobytes(self) -> bytes:
        return self.message.SerializeToString()


class Unigram(SentenceBpe):
    """Unigram of sentencepiece: the likeliest way through a text wins, so pieces with their scores are learned."""

    def likeliest(self, texts: Sequence[str], pieces: int) -> Parts:
        """The likeliest pieces that are new, of a model trained on the text."""
        normalized = [self.old.normalize(text).replace(SPACE, " ") for text in texts]
        size = len(self.message.pieces) + pieces + len(set().union(*normalized))
        learned = messages.ModelProto.FromString(TextTokenizer.train(iter(normalized), size, "unigram").model)
        likely = [piece for piece in learned.pieces if piece.type == piece.NORMAL and piece.piece not in self.ids]
        characters = [piece for piece in likely if len(piece.piece) == 1][: pieces // 2]
        known = {piece.piece for piece in characters}
        fresh = [*characters, *(piece for piece in likely if piece.piece not in known)][:pieces]
        parts = {piece.piece: tuple(i for i in self.spell(piece.piece) if i != self.unknown) for piece in fresh}
        self.message.pieces.extend(fresh)
        return parts


@cache
def _script(char: str) -> str:
    """The script of a letter, Chinese and kana being one; of other characters a word for their kind."""
    if not char.isalpha():
        return "digit" if char.isdigit() else unicodedata.category(char)[0]
    script = unicodedata.name(char, "").partition(" ")[0].partition("-")[0]
    return "CJK" if script in ("HIRAGANA", "KATAKANA") else script
