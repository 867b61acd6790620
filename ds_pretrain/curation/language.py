"""Which language a text is in, by py3langid: naive Bayes over byte n-grams, 140 languages, its model inside the wheel.

It reads the first 16,384 characters: the price is a document that changes its language later. Probabilities are py3langid's
own, spread by length: eight words of English may get 0.5, so `least` is for documents and not for sentences. A text without a
single letter is "und" (ISO 639-2, undetermined) with probability 0, where the library would name a language at random.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from ds_pretrain.core.registry import unknown
from ds_pretrain.curation.quality import RULES, Page, Rules

HEAD = 1 << 14
"""Characters that are read."""
UNDETERMINED = ("und", 0.0)


def identify(texts: Iterable[str]) -> list[tuple[str, float]]:
    """The likeliest language of every text (ISO 639-1, where it has a code there) and its probability."""
    model = _model()
    heads = (text[:HEAD] for text in texts)
    return [model.classify(head) if any(map(str.isalpha, head)) else UNDETERMINED for head in heads]


@RULES.register("language")
@dataclass(frozen=True, kw_only=True)
class Languages(Rules):
    """Documents in some languages only."""

    keep: tuple[str, ...] = ("en",)
    """Codes of the languages that stay."""
    least: float = 0.5
    """Probability that the language has at least."""

    def __post_init__(self) -> None:
        if isinstance(self.keep, str) or not self.keep:
            raise ValueError(f"Languages: keep must be a list of codes, got {self.keep!r}: write ('en',)")
        known = [str(code) for code in _model().nb_classes]
        if strange := [code for code in self.keep if code not in known]:
            raise ValueError(unknown("language", strange[0], known))
        if not 0 <= self.least <= 1:
            raise ValueError(f"Languages: least must be a probability between 0 and 1, got {self.least}")

    def judge(self, page: Page) -> dict[str, bool]:
        [(code, probability)] = identify([page.text])
        return {"language/other": code not in self.keep, "language/unsure": probability < self.least}


@cache
def _model() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise ValueError("language identification needs py3langid: pip install 'py3langid>=0.4'") from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
