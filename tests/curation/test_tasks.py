"""Tasks are made of held-out documents alone, and each passage knows its file."""

import json
import shutil
from pathlib import Path

import pytest

from ds_pretrain.curation.prepare import prepare, split_of
from ds_pretrain.curation.tasks import make

SPLIT = (0.6, 0.1, 0.3)


@pytest.fixture(scope="module")
def prepared(corpus, tmp_path_factory):
    """A copy of the corpus, which may change, and what was prepared from it."""
    folder = tmp_path_factory.mktemp("tasks")
    shutil.copytree(corpus, folder / "text")
    prepare([str(folder / "text")], folder / "data", vocab_size=600, split=SPLIT, quiet=True)
    return folder


def test_passages_are_words_of_test_documents_under_their_file(prepared):
    made = make(prepared / "data", prepared / "tasks", least=3)
    rows = [line.split("\t") for line in (prepared / "tasks/passages.tsv").read_text().splitlines()]
    assert len(rows) == made.passages > 50 and len({file for _, file in rows}) == made.classes > 3
    for text, file in rows:
        whole = Path(file).read_text()
        assert split_of(whole, SPLIT) == "test"
        assert text in " ".join(whole.split()) and len(text.split()) >= 20
    counts = [sum(file == each for _, each in rows) for file in {file for _, file in rows}]
    assert min(counts) >= 3 and made.majority == max(counts) / len(rows)


def test_a_cloze_asks_for_the_word_that_follows(prepared):
    made = make(prepared / "data", prepared / "tasks", least=3)
    asked = [json.loads(line) for line in (prepared / "tasks/cloze.jsonl").read_text().splitlines()]
    texts = [path.read_text() for path in (prepared / "text").iterdir()]
    held_out = "\n".join(" ".join(text.split()) for text in texts if split_of(text, SPLIT) == "test")
    assert len(asked) == made.cloze > 50
    for each in asked:
        assert each["word"].isalpha() and f"{each['context']} {each['word']}" in held_out


def test_what_cannot_make_a_task_is_told(prepared, tmp_path):
    made = make(prepared / "data", tmp_path / "one", least=100000)
    assert made.passages == 0 < made.cloze and [file.name for file in (tmp_path / "one").iterdir()] == ["cloze.jsonl"]
    with pytest.raises(ValueError, match=r"manifest.json does not exist: give a folder that ds-pretrain prepare wrote"):
        make(tmp_path, tmp_path / "tasks")
    with pytest.raises(ValueError, match=r"unknown split that is held out 'train'.*test"):
        make(prepared / "data", tmp_path / "tasks", "train")
    assert not (tmp_path / "tasks").exists()
    changed = prepared.with_name("changed")
    shutil.copytree(prepared, changed)
    manifest = changed / "data/manifest.json"
    manifest.write_text(manifest.read_text().replace(str(prepared / "text"), str(changed / "text")))
    next((changed / "text").iterdir()).write_text("another text")
    with pytest.raises(ValueError, match=r"text has changed since .*data was prepared from it: prepare it again"):
        make(changed / "data", tmp_path / "tasks", least=3)
