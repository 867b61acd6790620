"""The audit tells what strays from what was asked for, once, and is silent about what does not."""

from dataclasses import dataclass

import pytest
from memory import VOCAB, corpus

from ds_pretrain.data.audit import Audit
from ds_pretrain.data.dataset import Cursor, Samples
from ds_pretrain.objectives import REGISTRY, MaskedLanguageModeling, create

MIXED = create("mixture", weights={"clm": 0.4, "fim": 0.3, "mdlm": 0.3})


def audited(objective, expected=None, rows=400):
    data = Samples(corpus(800), VOCAB, 64, objective, "train", 0)
    audit, cursor, told = Audit(expected or objective, VOCAB), Cursor(), []
    for _ in range(10):
        taken, cursor = data.rows(cursor, rows // 10)
        audit.add([data.collate(taken)], data.consumed(taken))
        told += audit.surprises()
    return audit, told


@pytest.mark.parametrize("objective", [*map(create, REGISTRY), MIXED], ids=[*REGISTRY, "of several"])
def test_no_objective_surprises_itself(objective):
    """And counts all that it promises, its components' promises included."""
    audit, told = audited(objective)
    assert told == [] and 0 < audit.shares["useful"] <= 1
    assert set(objective.expected) <= set(audit.shares)


@dataclass(frozen=True, kw_only=True)
class Wrong(MaskedLanguageModeling):
    """Promises another split than it makes."""

    @property
    def expected(self):
        return {"mlm/mask": 0.9, "mlm/random": 0.1}


def test_a_broken_promise_is_told_once_with_the_numbers():
    _, told = audited(create("mlm"), Wrong())
    (text,) = told
    assert text.startswith("warning: mlm/mask is ") and text.endswith(", 90.00% were asked for")


@pytest.mark.parametrize(
    ("made", "asked", "told"),
    [
        ({"name": "mlm", "mask_prob": 0.3}, {"name": "mlm"}, "mlm/rate"),
        ({"name": "fim", "rate": 0.2}, {"name": "fim"}, "fim/rewritten"),
        ({"name": "fim", "spm": 0.0}, {"name": "fim"}, "fim/spm"),
        ({"name": "ul2", "r": 0.0}, {"name": "ul2"}, "r/samples"),
    ],
)
def test_what_was_not_asked_for_is_told(made, asked, told):
    _, found = audited(create(**made), create(**asked))
    assert any(text.startswith(f"warning: {told} is ") for text in found), found
