"""Similarity and probe against numbers worked out elsewhere, and a probe that can tell features from noise."""

import math

import pytest
import torch
import torch.nn.functional as F

from ds_pretrain.evaluation.embeddings import probe, read_scores, read_table, similarity, spearman


def test_spearman_is_the_textbook_one():
    """With ties: the ranks have covariance 7.25 and variances 9.5."""
    a, b = torch.tensor([1.0, 2, 2, 4, 5]), torch.tensor([3.0, 1, 4, 4, 9])
    assert spearman(a, b) == pytest.approx(7.25 / 9.5)
    assert spearman(a, a.exp()) == pytest.approx(1) and spearman(a, -a) == pytest.approx(-1)
    assert math.isnan(spearman(a, torch.ones(5)))


def test_similarity_of_known_vectors():
    """Two directions: equal pairs have distance 0, orthogonal ones 2."""
    vectors = {"a": [2.0, 0], "b": [0, 3.0]}
    found = similarity(lambda texts: torch.tensor([vectors[t] for t in texts]), [("a", "a", 5), ("b", "b", 5), ("a", "b", 0)])
    assert (found.spearman, found.alignment, found.equal) == (pytest.approx(1), 0, 2)
    near = 3 + 3  # pairs of equal vectors among three a and three b
    assert found.uniformity == pytest.approx(math.log((near + (15 - near) * math.exp(-4)) / 15))
    with pytest.raises(ValueError, match="2 pairs are too few"):
        similarity(lambda texts: torch.zeros(len(texts), 2), [("a", "b", 1)] * 2)


def test_a_probe_finds_what_is_in_the_features_and_nothing_in_noise():
    examples = [(f"text {i}", "odd" if i % 2 else "even") for i in range(400)]

    def informed(texts):
        kind = torch.tensor([int(text.split()[1]) % 2 for text in texts])
        return F.one_hot(kind, 2).float() + 0.1 * torch.randn(len(texts), 2, generator=torch.Generator().manual_seed(0))

    def noise(texts):
        return torch.randn(len(texts), 2, generator=torch.Generator().manual_seed(1))

    found = probe(informed, noise, examples)
    assert found.accuracy == 1 and found.untrained < 0.65 and found.majority < 0.65 and found.classes == 2
    assert found.train + found.test == 400 and 40 < found.test < 120
    with pytest.raises(ValueError, match="3 texts of 1 classes are not enough"):
        probe(noise, noise, [("a", "x"), ("b", "x"), ("c", "x")])


def test_a_table_names_the_line_that_is_wrong(tmp_path):
    file = tmp_path / "pairs.tsv"
    file.write_text("a\tb\t1\na\tb\n")
    with pytest.raises(ValueError, match=r"pairs.tsv:2 has 2 columns separated by tabs, 3 are needed"):
        read_table(file, 3)
    file.write_text("")
    with pytest.raises(ValueError, match="is empty"):
        read_table(file, 3)
    with pytest.raises(ValueError, match=r"there.tsv is no file: give one with lines of 3 columns"):
        read_table(tmp_path / "not there.tsv", 3)


@pytest.mark.parametrize(
    ("line", "told"), [("a\tb\tnan", "score 'nan'"), ("a\tb\tfoo", "score 'foo'"), ("a\t \t1", "an empty column")]
)
def test_a_bad_score_or_an_empty_sentence_is_told_with_its_line(tmp_path, line, told):
    file = tmp_path / "pairs.tsv"
    file.write_text(f"a\tb\t1\n{line}\n")
    with pytest.raises(ValueError, match=f"pairs.tsv:2 has .*{told}"):
        read_scores(file)
