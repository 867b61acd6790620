"""Text to ids and back: four kinds of tokenizer behind one type.

`tokenizers` trains byte-level BPE and WordPiece, `sentencepiece` trains unigram and BPE; all four share one block of
reserved ids at the front of the vocabulary (padding, end of document, [MASK], mode tokens, sentinels ...). Text that
spells a reserved token is encoded as the text it is, which is checked whenever a tokenizer is made or loaded.

Byte-level BPE gives back any text exactly, and so do the sentencepiece kinds (bytes stand in for rare characters,
nothing is normalised away) but for U+2581, their own space mark, which comes back as a space. WordPiece lower-cases and
drops spacing as BERT does, and knows the characters seen in training only: its bits per byte mean little.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Literal, Protocol

import numpy as np
import sentencepiece
import tokenizers
import xxhash
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from ds_pretrain.core.files import whole
from ds_pretrain.core.registry import unknown
from ds_pretrain.core.vocabulary import BEGIN, SENTINELS, Codec, Vocabulary
from ds_pretrain.data import corpus

Kind = Literal["bpe", "wordpiece", "unigram", "sp_bpe"]
KINDS: Mapping[str, str] = {
    "bpe": "byte-level BPE (GPT-2); gives back any text exactly",
    "wordpiece": "WordPiece (BERT, uncased); lower-cases, unknown characters become <unk>",
    "unigram": "sentencepiece unigram (T5, ALBERT), bytes for rare characters",
    "sp_bpe": "sentencepiece BPE (LLaMA), bytes for rare characters",
}
SENTINEL_NAMES = tuple(f"<extra_id_{i}>" for i in range(SENTINELS))
REQUIRED = ("<pad>", "<unk>", "<eod>", "<cls>", "<sep>", "<mask>")
RESERVED = (*REQUIRED, "[NLU]", "[S2S]", "[NLG]", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", *SENTINEL_NAMES)
"""In the order of their ids. There is no beginning-of-text token: the first token is predicted from <eod>."""
ALIASES: Mapping[str, tuple[str, ...]] = {
    "<pad>": ("[PAD]",),
    "<unk>": ("[UNK]",),
    "<eod>": ("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>", "[SEP]"),
    "<cls>": ("[CLS]", "<s>"),
    "<sep>": ("[SEP]", "</s>"),
    "<mask>": ("[MASK]",),
    "<fim_prefix>": ("<|fim_prefix|>", "<｜fim▁begin｜>", "▁<PRE>"),
    "<fim_middle>": ("<|fim_middle|>", "<｜fim▁end｜>", "▁<MID>"),
    "<fim_suffix>": ("<|fim_suffix|>", "<｜fim▁hole｜>", "▁<SUF>"),
}
"""What tokenizers from elsewhere call reserved tokens, best first (fill-in-the-middle: Qwen, DeepSeek-Coder, CodeLlama)."""
MINIMUM = len(RESERVED) + 256
"""The smallest vocabulary: the reserved ids and the bytes."""


class Engine(Protocol):
    """What a library's tokenizer is asked for."""

    size: int

    def find(self, name: str) -> int | None: ...

    def specials(self) -> dict[str, int]: ...

    def encode(self, texts: list[str]) -> Iterable[list[int]]: ...

    def decode(self, ids: list[int]) -> str: ...

    def piece(self, token: int) -> str: ...

    def surface(self, token: int) -> str: ...


class _Json:
    """A `tokenizer.json` of the tokenizers library."""

    def __init__(self, model: bytes) -> None:
        self.raw = tokenizers.Tokenizer.from_str(model.decode())
        self.raw.no_padding()
        self.raw.no_truncation()
        self.raw.encode_special_tokens = True  # is not saved, so it is set here and nowhere else
        self.size = max(self.raw.get_vocab().values()) + 1

    def find(self, name: str) -> int | None:
        return self.raw.token_to_id(name)

    def specials(self) -> dict[str, int]:
        return {token.content: i for i, token in self.raw.get_added_tokens_decoder().items() if token.special}

    def encode(self, texts: list[str]) -> Iterable[list[int]]:
        return (found.ids for found in self.raw.encode_batch_fast(texts, add_special_tokens=False))

    def decode(self, ids: list[int]) -> str:
        return self.raw.decode(ids, skip_special_tokens=False)

    def piece(self, token: int) -> str:
        return self.raw.id_to_token(token) or ""

    def surface(self, token: int) -> str:
        piece = self.piece(token)
        if isinstance(self.raw.model, models.WordPiece):
            return piece.removeprefix("##") if piece.startswith("##") else f" {piece}"
        return piece.replace("▁", " ") if "▁" in piece else self.raw.decode([token], skip_special_tokens=False)


class _Model:
    """A `tokenizer.model` of sentencepiece."""

    def __init__(self, model: bytes) -> None:
        self.raw = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.size = self.raw.get_piece_size()
        off = os.environ.get("TOKENIZERS_PARALLELISM", "").lower() in ("0", "false", "off", "no")
        self.threads = 1 if off else os.cpu_count() or 1

    def find(self, name: str) -> int | None:
        found = self.raw.piece_to_id(name)
        return found if self.raw.id_to_piece(found) == name else None

    def specials(self) -> dict[str, int]:
        raw = self.raw
        ids = (i for i in range(self.size) if raw.is_control(i) or raw.is_unknown(i) or raw.is_unused(i))
        return {raw.id_to_piece(i): i for i in ids}

    def encode(self, texts: list[str]) -> Iterable[list[int]]:
        return self.raw.encode(texts, out_type=int, num_threads=self.threads)

    def decode(self, ids: list[int]) -> str:
        return self.raw.decode(ids)

    def piece(self, token: int) -> str:
        return self.raw.id_to_piece(token)

    def surface(self, token: int) -> str:
        piece = self.piece(token)
        return self.raw.decode([token]) if self.raw.is_byte(token) else piece.replace("▁", " ")


ENGINES: Mapping[str, Callable[[bytes], Engine]] = {"tokenizer.json": _Json, "tokenizer.model": _Model}


@dataclass(frozen=True, eq=False)
class TextTokenizer:
    """A trained tokenizer.

    file: the name of the model's file, which says whose it is. model: the bytes of that file.
    specials: ids that are not text, by name; those at or above the model's own size exist here only.
    """

    file: str
    model: bytes
    specials: Mapping[str, int]

    def __post_init__(self) -> None:
        own = [self._engine.piece(i) for i in self.specials.values() if i < self._engine.size]  # names from elsewhere
        texts = [*self.specials, *own]
        for text, ids in zip(texts, self._engine.encode(texts), strict=True):
            unknown = {self.specials["<unk>"]} - {self.specials["<eod>"]}  # which may stand in for it
            if caught := self.vocabulary.specials.intersection(ids) - unknown:
                raise ValueError(
                    f"this {self.file} encodes the text {text!r} to the special id {min(caught)}, so a document could "
                    "forge it: mark the token as special (or control) in the tokenizer"
                )

    @classmethod
    def train(
        cls, source: str | Path | Sequence[str | Path] | Iterator[str], vocab_size: int, kind: Kind = "bpe"
    ) -> TextTokenizer:
        """Train on files (one path, or a list of them; see `corpus`) or on an iterator of texts.

        vocab_size counts everything, reserved ids included; too little text gives a smaller vocabulary.
        """
        check_kind(kind, vocab_size)
        if isinstance(source, (str, Path)):
            source = [source]
        texts = (doc.text for path in source for doc in corpus.read(path)) if isinstance(source, Sequence) else iter(source)
        if kind in ("bpe", "wordpiece"):
            return cls("tokenizer.json", _train_json(texts, vocab_size, kind), {n: i for i, n in enumerate(RESERVED)})
        return cls("tokenizer.model", _train_model(texts, vocab_size, kind), {n: i for i, n in enumerate(RESERVED)})

    @classmethod
    def load(
        cls,
        path: str | Path,
        extend: bool = False,
        stand_in: bool = False,
        known: Mapping[str, str | int] = MappingProxyType({}),
    ) -> TextTokenizer:
        """Load a folder that `save` wrote, or a tokenizer.json or tokenizer.model from elsewhere (or its folder).

        extend: append the reserved tokens that a tokenizer from elsewhere lacks, after its own ids. stand_in: let <eod> stand
        for the required ones that it lacks, which serves causal models, whose embeddings then stay as they are. known: tokens
        by our names, as it spells or numbers its special ones, where that is known; others go by what they are mostly called.
        """
        path = Path(path)
        files = [path] if path.is_file() else [path / name for name in ENGINES if (path / name).is_file()]
        if not files:
            raise ValueError(f"no tokenizer at {path}: it has neither {' nor '.join(ENGINES)}")
        found = [(file, *_opened(file)) for file in files]
        found.sort(key=lambda each: (-each[2].size, each[0].suffix == ".json"))  # of a model and its copy in json the model
        source, model, engine = found[0]
        file, saved = _kind_of(source), source.with_name("specials.json")
        if saved.is_file():
            return cls._verified(file, model, saved)
        return cls(file, model, _find_specials(engine, source, extend, stand_in, known))

    @classmethod
    def _verified(cls, file: str, model: bytes, saved: Path) -> TextTokenizer:
        try:
            content = json.loads(saved.read_bytes())
            specials, digest = content["specials"], content["digest"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{saved} is damaged: train or copy the tokenizer again") from None
        if _digest(model, specials) != digest:
            raise ValueError(f"{saved.parent / file} or {saved.name} is damaged (their digest differs): copy them again")
        return cls(file, model, specials)

    def save(self, folder: str | Path) -> None:
        """Write the model and, last, specials.json into a folder; each file is whole or not there."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        content = {"digest": self.digest, "specials": dict(self.specials)}
        for name, data in ((self.file, self.model), ("specials.json", (json.dumps(content, indent=1) + "\n").encode())):
            with whole(folder / name) as file:
                file.write(data)

    @cached_property
    def _engine(self) -> Engine:
        return ENGINES[self.file](self.model)

    @cached_property
    def _names(self) -> dict[int, str]:
        return {i: name for name, i in reversed(list(self.specials.items()))}  # the first name of an id wins

    @cached_property
    def digest(self) -> str:
        """xxh3-128 of the model and the specials: equal digests make equal ids."""
        return _digest(self.model, self.specials)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The ids that objectives ask for."""
        pad, unk, eod, cls, sep, mask = (self.specials[name] for name in REQUIRED)
        sentinels = tuple(self.specials[name] for name in SENTINEL_NAMES if name in self.specials)
        everything = frozenset(self.specials.values())
        return Vocabulary(
            len(self), pad, eod, unk, cls, sep, mask, sentinels, everything,
            names=dict(self.specials), surfaces=self._surfaces, codec=Codec(self.encode, self.decode),
        )  # fmt: skip

    def _surfaces(self) -> list[str]:
        """The text of every id, with the space that its vocabulary keeps in front of words."""
        return ["" if i in self._names else self._engine.surface(i) for i in range(len(self))]

    @cached_property
    def _size(self) -> int:
        return max(self._engine.size, *(i + 1 for i in self.specials.values()))

    def __len__(self) -> int:
        return self._size

    def encode(self, text: str) -> np.ndarray:
        """int32 ids; no special is added and none is read from the text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The same for many texts, on all cores (one, where TOKENIZERS_PARALLELISM=false)."""
        return [np.array(ids, dtype=np.int32) for ids in self._engine.encode(list(texts))]

    def decode(self, ids: Iterable[int], skip_specials: bool = False) -> str:
        """Back to text; specials are spelled out unless they are skipped."""
        array = np.fromiter(ids, dtype=np.int64)
        for extreme in (array.min(), array.max()) if len(array) else ():
            self._check(int(extreme))
        special = self.vocabulary.is_special[array]
        if skip_specials:
            array, special = array[~special], np.zeros(0, dtype=bool)
        parts, start = [], 0
        for place in np.flatnonzero(special).tolist():
            parts += [self._engine.decode(array[start:place].tolist()), self._names[int(array[place])]]
            start = place + 1
        return "".join([*parts, self._engine.decode(array[start:].tolist())])

    @property
    def appended(self) -> dict[str, int]:
        """Special ids that exist here only, not in the tokenizer's own file."""
        return {name: i for name, i in self.specials.items() if i >= self._engine.size}

    def spelling(self, token: int) -> str:
        """One id as the tokenizer's own file spells it, ours where it has none."""
        return self._engine.piece(token) if token < self._engine.size else self._names[token]

    def token(self, token: int) -> str:
        """One id as its vocabulary spells it, for display."""
        self._check(token)
        return self._names.get(token) or self._engine.piece(token)

    def text(self, token: int) -> str:
        """The text of one id, with the space that its vocabulary keeps in front of words; the name of a special."""
        self._check(token)
        return self._names.get(token) or self._engine.surface(token)

    def _check(self, token: int) -> None:
        if not 0 <= token < len(self):
            raise ValueError(f"id {token} is outside the vocabulary of {len(self)} ids")

    def __reduce__(self) -> tuple[type[TextTokenizer], tuple[str, bytes, dict[str, int]]]:
        return TextTokenizer, (self.file, self.model, dict(self.specials))


def check_kind(kind: str, vocab_size: int) -> None:
    """ValueError for a tokenizer that cannot be trained."""
    if kind not in KINDS:
        raise ValueError(unknown("kind of tokenizer", kind, KINDS))
    if vocab_size < MINIMUM:
        raise ValueError(
            f"vocab_size {vocab_size} is too small: at least {MINIMUM} ({len(RESERVED)} reserved ids and 256 bytes)"
        )


def _digest(model: bytes, specials: Mapping[str, int]) -> str:
    return xxhash.xxh3_128_hexdigest(model + json.dumps(dict(specials), sort_keys=True).encode())


def _kind_of(path: Path) -> str:
    return "tokenizer.model" if path.suffix == ".model" else "tokenizer.json"


def _opened(path: Path) -> tuple[bytes, Engine]:
    model = path.read_bytes()
    try:
        return model, ENGINES[_kind_of(path)](model)
    except Exception as error:
        raise ValueError(f"{path} is not a readable {_kind_of(path)}: {error}") from None


def _find_specials(engine: Engine, path: Path, extend: bool, stand_in: bool, known: Mapping[str, str | int]) -> dict[str, int]:
    there = frozenset(engine.specials().values())
    told = {name: engine.find(token) if isinstance(token, str) else token for name, token in known.items()}
    specials = {name: token for name, token in told.items() if token in there}
    if specials.get(BEGIN) == specials.get("<eod>"):
        specials.pop(BEGIN, None)  # it needs no name of its own
    for name in (each for each in RESERVED if each not in specials):
        found = (engine.find(spelling) for spelling in (name, *ALIASES.get(name, ())))
        if (token := next((i for i in found if i is not None), None)) is not None:
            specials[name] = token
    specials |= {name: i for name, i in engine.specials().items() if i not in specials.values()}
    if stand_in and "<eod>" in specials:
        specials |= {name: specials["<eod>"] for name in REQUIRED if name not in specials}
    missing = [name for name in RESERVED if name not in specials]
    if extend:
        specials |= {name: engine.size + i for i, name in enumerate(missing)}
    elif lacking := [name for name in REQUIRED if name in missing]:
        raise ValueError(
            f"{path} has no {', '.join(lacking)}: add them to it, or load it with extend=True, which appends the "
            f"{len(missing)} reserved tokens it lacks after its {engine.size} ids"
        )
    return specials


def _train_json(texts: Iterator[str], vocab_size: int, kind: str) -> bytes:
    reserved = [AddedToken(name, special=True, normalized=False) for name in RESERVED]
    if kind == "bpe":
        model = tokenizers.Tokenizer(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=reserved, initial_alphabet=alphabet, show_progress=False
        )
        model.train_from_iterator(texts, trainer)
        return model.to_str().encode()
    model = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    model.normalizer = normalizers.BertNormalizer(lowercase=True)
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    model.decoder = decoders.WordPiece()
    kept = list(texts)
    alphabet = _alphabet(kept, model.normalizer, (vocab_size - len(RESERVED)) // 4)
    # The trainer numbers "##x" pieces in hash order and breaks ties by number, so runs would differ: we number them.
    pieces = [AddedToken(f"##{char}", special=True, normalized=False) for char in alphabet]
    model.train_from_iterator(
        kept,
        trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            special_tokens=reserved + pieces,
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            show_progress=False,
        ),
    )
    content = json.loads(model.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in RESERVED]
    return json.dumps(content, ensure_ascii=False).encode()


def _alphabet(texts: list[str], normalizer: normalizers.Normalizer, limit: int) -> list[str]:
    """The most frequent characters, a quarter of the room at most: each one takes two ids ("x" and "##x")."""
    count: Counter[str] = Counter()
    for text in texts:
        count.update(normalizer.normalize_str(text))
    ranked = sorted((char for char in count if not char.isspace()), key=lambda char: (-count[char], char))
    return sorted(ranked[:limit])


def _train_model(texts: Iterator[str], vocab_size: int, kind: str) -> bytes:
    written = io.BytesIO()
    # The library reads lines and drops those over its limit of bytes, so longer ones are cut here.
    lines = (line[i : i + 1000] for text in texts for line in text.splitlines() for i in range(0, len(line), 1000))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=written,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            model_type="bpe" if kind == "sp_bpe" else "unigram",
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            pad_id=0,
            unk_id=1,
            eos_id=2,
            bos_id=-1,
            pad_piece="<pad>",
            unk_piece="<unk>",
            eos_piece="<eod>",
            control_symbols=list(RESERVED[3:]),
            max_sentence_length=4096,
            minloglevel=2,
        )
    except RuntimeError as error:
        if need := re.search(r"Vocabulary size is smaller than required_chars. \d+ vs (\d+)", str(error)):
            raise ValueError(
                f"vocab_size {vocab_size} is too small: this text needs at least {need[1]} ({len(RESERVED)} reserved "
                "ids, 256 bytes and its common characters)"
            ) from None
        raise ValueError(f"sentencepiece could not train on this text: {error}") from None
    return written.getvalue()
