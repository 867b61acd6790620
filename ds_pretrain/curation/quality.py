"""Which documents are worth training on: the published rules, each with a name that can be counted.

A rule set is a frozen dataclass of thresholds. It may take lines away (`clean`), and it says of each rule whether a page breaks
it (`judge`); `screen` cleans with all sets first, so that every rule judges the text that would be trained on, and reports all
broken rules instead of the first. Everything is a pure function of one text.

Sources, and where datatrove 0.10 (src/datatrove/pipeline/filters) differs from the papers:
- gopher, gopher_repetition: Rae et al. 2021 (arXiv 2112.11446), appendix A.1. datatrove's words are spaCy's, with punctuation
  apart; ours lie between white space, as in Dolma. datatrove counts "the" but not "The"; we count both. See also `repetition`.
- c4: Raffel et al. 2020 (JMLR 21), 3 sentences and 5 words a line, as in the code that made C4 (tensorflow/datasets,
  c4_utils.py); datatrove has the preprint's 5 and 3, and takes ' for a line's end. We follow the code. It keeps no line that
  ends in a citation, for the space left before it; we strip that. The list of bad words is left out, as in datatrove.
- fineweb: Penedo et al. 2024 (arXiv 2406.17557), 0.1 of characters in repeated lines; datatrove's default is 0.01. The bounds
  themselves break a rule, as the paper says. Quotes end a line, which datatrove has given up. The newline rule is datatrove's.
- shape: ours, wide enough for prose, code and logs; set tighter bounds for one of them.

The price of white space for words: a language without spaces breaks gopher's rules. The price of counting marks for sentences:
"Dr. No" has two. Lines are never blank and have no space around them, here and in all rules (datatrove counts blank ones for
gopher's bullets and ellipses).
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from ds_pretrain.core.registry import Registry
from ds_pretrain.curation.repetition import repeated_grams, repeats

Tier = Literal["high", "medium", "low"]
POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
SENTENCE = re.compile(r"""[.!?]["')\]”’]*\s+""")
"""Where a sentence ends inside a line."""
PARAGRAPH = re.compile(r"\n\s*\n")


@dataclass(frozen=True)
class Page:
    """A text and its parts, each found once for all rules."""

    text: str

    @cached_property
    def words(self) -> list[str]:
        return self.text.split()

    @cached_property
    def lines(self) -> list[str]:
        """Without blank ones, without space around them."""
        return [line for line in map(str.strip, self.text.splitlines()) if line]

    @cached_property
    def paragraphs(self) -> list[str]:
        return PARAGRAPH.split(self.text.strip())


class Rules:
    """A set of rules: what it removes, and which of its rules a page breaks."""

    def clean(self, text: str) -> tuple[str, Mapping[str, int]]:
        """The text without the lines that go, and how many went, by rule. Cleaning twice is cleaning once."""
        return text, {}

    def judge(self, page: Page) -> dict[str, bool]:
        """Every rule by name, and whether the page breaks it."""
        raise NotImplementedError


RULES: Registry[type[Rules]] = Registry("rule set")


@dataclass(frozen=True)
class Verdict:
    """What `screen` found. text: without removed lines. reasons: all broken rules. removed: lines taken away, by rule."""

    text: str
    reasons: tuple[str, ...] = ()
    removed: Mapping[str, int] = field(default_factory=dict)


def screen(text: str, rules: Sequence[Rules]) -> Verdict:
    """Clean a text with every rule set, then judge what is left by every rule set."""
    removed: Counter[str] = Counter()
    for one in rules:
        text, gone = one.clean(text)
        removed.update(gone)
    page = Page(text)
    reasons = tuple(name for one in rules for name, broken in one.judge(page).items() if broken)
    return Verdict(text, reasons, dict(removed))


def _check_order(rules: Rules, *names: str) -> None:
    for name in names:
        least, most = getattr(rules, f"least_{name}"), getattr(rules, f"most_{name}")
        if least > most:
            raise ValueError(f"{type(rules).__name__}: least_{name} {least} is above most_{name} {most}: nothing would be kept")


@RULES.register("gopher")
@dataclass(frozen=True, kw_only=True)
class Gopher(Rules):
    """Is it prose? Rae et al. 2021, appendix A.1."""

    least_words: int = 50
    """Words between white space that a document has at least ..."""
    most_words: int = 100_000
    """... and at most."""
    least_length: float = 3
    """Mean characters of a word, at least ..."""
    most_length: float = 10
    """... and at most."""
    most_hashes: float = 0.1
    """Hash symbols per word."""
    most_ellipses: float = 0.1
    """Ellipses (... or …) per word."""
    most_bullets: float = 0.9
    """Share of lines that start with a bullet."""
    most_ellipsis_lines: float = 0.3
    """Share of lines that end with an ellipsis."""
    least_alphabetic: float = 0.8
    """Share of words with a letter in them."""
    least_stop_words: int = 2
    """Different stop words that occur at least."""
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")
    """In small letters. English: give others for another language."""
    bullets: tuple[str, ...] = ("•", "-", "*", "‣", "◦", "▪", "■")
    """The paper names none; datatrove has the first two."""

    def __post_init__(self) -> None:
        _check_order(self, "words", "length")

    def judge(self, page: Page) -> dict[str, bool]:
        words, lines, count = page.words, page.lines, len(page.words)
        ellipses = page.text.count("...") + page.text.count("…")
        bullets = sum(line.startswith(tuple(self.bullets)) for line in lines)
        trailing = sum(line.endswith(("...", "…")) for line in lines)
        letters = sum(word.isalpha() or any(map(str.isalpha, word)) for word in words)
        known = {word.strip(string.punctuation).lower() for word in set(words)}.intersection(self.stop_words)
        return {
            "gopher/word_count": not self.least_words <= count <= self.most_words,
            "gopher/word_length": not self.least_length <= _share(sum(map(len, words)), count) <= self.most_length,
            "gopher/hashes": _share(page.text.count("#"), count) > self.most_hashes,
            "gopher/ellipses": _share(ellipses, count) > self.most_ellipses,
            "gopher/bullets": _share(bullets, len(lines)) > self.most_bullets,
            "gopher/ellipsis_lines": _share(trailing, len(lines)) > self.most_ellipsis_lines,
            "gopher/alphabetic": _share(letters, count) < self.least_alphabetic,
            "gopher/stop_words": len(known) < self.least_stop_words,
        }


@RULES.register("gopher_repetition")
@dataclass(frozen=True, kw_only=True)
class GopherRepetition(Rules):
    """Does it repeat itself? Rae et al. 2021, table A1; characters are shares of the whole text's."""

    most_lines: float = 0.30
    """Share of lines that were there before."""
    most_line_chars: float = 0.20
    """Characters in them."""
    most_paragraphs: float = 0.30
    """Share of paragraphs (between blank lines) that were there before."""
    most_paragraph_chars: float = 0.20
    """Characters in them."""
    most_top: tuple[tuple[int, float], ...] = ((2, 0.20), (3, 0.18), (4, 0.16))
    """n, and the characters in all occurrences of the n-gram that occurs most, if it occurs twice."""
    most_duplicate: tuple[tuple[int, float], ...] = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))
    """n, and the characters in n-grams that were there before."""

    def judge(self, page: Page) -> dict[str, bool]:
        size = len(page.text)
        lines, line_chars = repeats(page.lines)
        paragraphs, paragraph_chars = repeats(page.paragraphs)
        broken = {
            "gopher_repetition/lines": _share(lines, len(page.lines)) > self.most_lines,
            "gopher_repetition/line_chars": _share(line_chars, size) > self.most_line_chars,
            "gopher_repetition/paragraphs": _share(paragraphs, len(page.paragraphs)) > self.most_paragraphs,
            "gopher_repetition/paragraph_chars": _share(paragraph_chars, size) > self.most_paragraph_chars,
        }
        longest = max((n for n, _ in (*self.most_top, *self.most_duplicate)), default=0)
        found = {n: (top, duplicate) for n, top, duplicate in repeated_grams(page.words, longest)}
        for kind, (name, bounds) in enumerate((("top", self.most_top), ("duplicate", self.most_duplicate))):
            for n, most in bounds:
                broken[f"gopher_repetition/{name}_{n}_gram"] = _share(found.get(n, (0, 0))[kind], size) > most
        return broken


@RULES.register("c4")
@dataclass(frozen=True, kw_only=True)
class C4(Rules):
    """Lines that read like sentences, and pages of several. Raffel et al. 2020; blank lines and citations go uncounted."""

    endings: tuple[str, ...] = (".", "?", "!", '"')
    """What a line ends in ("..." does not count). () keeps all: FineWeb did, as this rule alone takes 30% of the tokens."""
    least_words: int = 5
    """Words that a line has at least."""
    longest_word: int = 1000
    """Characters: a line with a longer word goes."""
    least_sentences: int = 3
    """Sentences on the lines that are left."""

    def clean(self, text: str) -> tuple[str, Mapping[str, int]]:
        kept, removed = [], Counter[str]()
        for line in Page(text).lines:
            line = CITATION.sub("", line).strip()
            if fault := self._fault(line):
                removed[f"c4/{fault}"] += 1
            else:
                kept.append(line)
        return "\n".join(kept), removed

    def _fault(self, line: str) -> str | None:
        words = line.split()
        if max(map(len, words), default=0) > self.longest_word:
            return "long_word"
        if self.endings and (not line.endswith(tuple(self.endings)) or line.endswith("...")):
            return "line_end"
        if len(words) < self.least_words:
            return "few_words"
        small = line.lower()
        if "javascript" in small:
            return "javascript"
        if any(policy in small for policy in POLICIES):
            return "policy"
        return "nested_citation" if CITATION.search(line) else None  # else a second cleaning would find more

    def judge(self, page: Page) -> dict[str, bool]:
        return {
            "c4/lorem_ipsum": "lorem ipsum" in page.text.lower(),
            "c4/curly_bracket": "{" in page.text,
            "c4/sentences": sum(len(SENTENCE.findall(line)) + 1 for line in page.lines) < self.least_sentences,
        }


@RULES.register("fineweb")
@dataclass(frozen=True, kw_only=True)
class FineWeb(Rules):
    """Is it a list or a menu? Penedo et al. 2024, section 3.6."""

    least_ended: float = 0.12
    """Share of lines that end in punctuation: this or less breaks the rule."""
    least_repeated_chars: float = 0.1
    """Share of characters in lines that were there before: this or more breaks it."""
    least_short: float = 0.67
    """Share of short lines: this or more breaks it."""
    short: int = 30
    """Characters: a line with fewer is short."""
    most_newlines: float = 0.3
    """Line ends per word."""
    endings: tuple[str, ...] = (".", "!", "?", '"', "'", "”", "’", "…", "。", "！", "？", "।", "؟", "۔", "։", "።")
    """What ends a sentence: FineWeb's first five, and the same of other scripts."""

    def judge(self, page: Page) -> dict[str, bool]:
        lines, newlines = page.lines, page.text.count("\n")
        ended = sum(line.endswith(tuple(self.endings)) for line in lines)
        short = sum(len(line) < self.short for line in lines)
        _, repeated = repeats(lines)
        return {
            "fineweb/line_end": _share(ended, len(lines)) <= self.least_ended,
            "fineweb/repeated_chars": _share(repeated, len(page.text) - newlines) >= self.least_repeated_chars,
            "fineweb/short_lines": _share(short, len(lines)) >= self.least_short,
            "fineweb/newlines": _share(newlines, len(page.words)) > self.most_newlines,
        }


@RULES.register("shape")
@dataclass(frozen=True, kw_only=True)
class Shape(Rules):
    """Is it text at all? Tables of numbers, drawings, binary and minified code are not."""

    most_symbols: float = 0.4
    """Share of characters that are neither letters, their marks, digits nor space."""
    most_digits: float = 0.3
    """Share of characters that are digits."""
    least_line: float = 8
    """Mean characters of a line, at least ..."""
    most_line: float = 5_000
    """... and at most. The Stack has 100 for code."""
    longest_line: int = 50_000
    """Characters of any line. The Stack has 1,000 for code."""

    def __post_init__(self) -> None:
        _check_order(self, "line")

    def judge(self, page: Page) -> dict[str, bool]:
        lines = list(map(len, page.lines))
        kinds: Counter[str] = Counter()
        for character, times in Counter(page.text).items():
            kinds[" " if character.isspace() else unicodedata.category(character)[0]] += times
        solid = len(page.text) - kinds[" "]
        return {
            "shape/symbols": _share(kinds["P"] + kinds["S"] + kinds["C"], solid) > self.most_symbols,
            "shape/digits": _share(kinds["N"], solid) > self.most_digits,
            "shape/mean_line": not self.least_line <= _share(sum(lines), len(lines)) <= self.most_line,
            "shape/longest_line": max(lines, default=0) > self.longest_line,
        }


JUDGES: tuple[Rules, ...] = (Gopher(), GopherRepetition(), C4(), FineWeb(), Shape())
TIERS: tuple[Tier, ...] = ("high", "medium", "low")


def tier(text: str, reasons: Iterable[str], judges: Sequence[Rules] = JUDGES) -> Tier:
    """A label by how many rule sets object: none is high, one medium, two or more low.

    Sets are counted and not rules, because rules of a set break together (a repeated line breaks ten). Each judges the text as
    it stands; `reasons` adds what is known already, so more reasons never raise a tier. The judges are made for prose on the
    web: give others for code, of which c4 and fineweb keep next to nothing.
    """
    objecting = {reason.partition("/")[0] for reason in reasons}
    for judge in judges:
        objecting |= {reason.partition("/")[0] for reason in screen(text, [judge]).reasons}
    return TIERS[min(len(objecting), 2)]


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
