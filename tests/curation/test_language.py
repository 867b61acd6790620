"""Languages of the Universal Declaration of Human Rights' first article, and a filter with one reason per field."""

import pickle
import random
import sys

import pytest

from ds_pretrain.curation import language
from ds_pretrain.curation.language import Languages, identify
from ds_pretrain.curation.quality import RULES, screen

ARTICLE = {
    "en": "All human beings are born free and equal in dignity and rights. They are endowed with reason and conscience and "
    "should act towards one another in a spirit of brotherhood.",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt und "
    "sollen einander im Geist der Brüderlichkeit begegnen.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison et de conscience "
    "et doivent agir les uns envers les autres dans un esprit de fraternité.",
    "es": "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como están de razón y conciencia, "
    "deben comportarse fraternalmente los unos con los otros.",
    "ru": "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью и должны "
    "поступать в отношении друг друга в духе братства.",
    "zh": "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心,并应以兄弟关系的精神相对待。",
}


def test_known_texts_in_any_order_and_company():
    codes = [*ARTICLE] * 2
    random.Random(0).shuffle(codes)
    found = identify([ARTICLE[code] for code in codes])
    assert [code for code, _ in found] == codes and all(probability > 0.5 for _, probability in found)
    assert found == [identify([ARTICLE[code]])[0] for code in codes]


def test_text_without_letters_is_undetermined_and_only_the_head_is_read():
    assert identify(["", " \n", "12 + 3", "\ud800", "…"]) == [("und", 0.0)] * 5
    head = (ARTICLE["en"] + " ") * 200
    assert identify([head + ARTICLE["ru"] * 9000]) == identify([head])
    assert identify([]) == []


def test_any_text_gets_an_answer():
    draw = random.Random(0)
    texts = [
        "".join(chr(draw.randrange(top)) for _ in range(draw.randrange(60)))
        for top in (0x80, 0x3000, 0x110000)
        for _ in range(300)
    ]
    assert all(0 <= probability <= 1 and code.isalpha() for code, probability in identify([*texts, "b" * (16 << 20)]))


def test_the_filter_has_one_reason_per_field():
    [(code, probability)] = identify([ARTICLE["de"]])
    text = ARTICLE[code]
    assert screen(text, [Languages(keep=("en", "de"), least=probability)]).reasons == ()
    assert screen(text, [Languages(keep=("en",), least=probability)]).reasons == ("language/other",)
    assert screen(text, [Languages(keep=("de",), least=probability + 1e-6)]).reasons == ("language/unsure",)
    assert screen("", [Languages()]).reasons == ("language/other", "language/unsure")
    rules = RULES["language"](keep=("de",))
    assert pickle.loads(pickle.dumps(rules)) == rules and screen(text, [rules]).text == text


def test_a_bad_filter_and_a_missing_package_are_explained(monkeypatch):
    with pytest.raises(ValueError, match=r"keep must be a list of codes, got 'en'"):
        Languages(keep="en")
    with pytest.raises(ValueError, match=r"between 0 and 1, got 50"):
        Languages(least=50)
    language._model.cache_clear()
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(ValueError, match=r"pip install 'py3langid"):
        identify(["text"])
