"""Every registered objective from a run file to its scores, by the commands that people type."""

import json

import numpy as np
import pytest
import yaml
from test_cli import ends, ok

from ds_pretrain.config import configs, load_run
from ds_pretrain.objectives import REGISTRY, create

QUICK = sorted(path.stem for path in (configs() / "runs").glob("quickstart*.yaml"))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Trains a run of an objective once; returns its output."""
    folder, made = tmp_path_factory.mktemp("objectives"), {}

    def run(name, **fields):
        if name not in made:
            decoder = create(name).kind == "causal"
            size = {"layers": 1, "hidden": 32, "heads": 4}
            values = {
                "model": size if decoder else {"preset": "bert-1m", **size},
                "objective": {"name": name, **fields},
                "data": {"path": str(data)},
                "batch": {"global_size": 8, "micro_size": 4, "seq_len": 96},
                "optimizer": {"lr": 3e-3, "warmup_steps": 2},
                "train": {"max_steps": 4, "eval_every": 4, "eval_tokens": 2000},
                "output": str(folder / name),
            }
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
            ok("train", folder / f"{name}.yaml")
            made[name] = folder / name
        return made[name]

    return run


@pytest.mark.parametrize("name", REGISTRY)
def test_it_trains_and_is_scored(trained, name):
    output, objective = trained(name), create(name)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    heads = [head.name for head in objective.heads]
    assert all(any(line.get(head, 0) > 0 for line in lines) for head in heads) and lines[0]["target_tokens"] > 0
    shown = ok("eval", output, "--split", "validation", "--max-tokens", "2000")
    assert f"{name} at step 4" in shown
    scores = json.loads((output / "eval-validation.json").read_text())[f"{name} at step 4"]
    assert ("perplexity" in scores) == (objective.measure == "likelihood")
    assert ("loss_error" in scores) == (objective.measure == "bound")
    if len(heads) > 1:
        assert {f"{head}/loss" for head in heads} <= scores.keys()
    for head in objective.heads:
        assert head.classes == 2 or f"{head.name}/recall" not in scores


def test_a_mixture_keeps_its_counts(trained):
    manifest = json.loads((trained("mixture") / "checkpoints" / "step-4" / "manifest.json").read_text())["manifest"]
    assert set(manifest["consumed"]) == {"clm", "mlm"} and sum(manifest["consumed"].values()) >= 4 * 8


def test_infilling_and_reading_from_left_to_right(trained):
    output = trained("fim")
    assert "exact" in ok("infill", output, "--documents", "2", "--tokens", "4", "--split", "train")
    told = ok("infill", output, "--before", "def f(x):", "--after", "return y", "--tokens", "4")
    assert told.startswith("def f(x):") and told.rstrip().endswith("return y")
    ok("eval", output, "--split", "validation", "--max-tokens", "2000")
    assert "bits_per_byte" in json.loads((output / "eval-validation.json").read_text())["clm at step 4"]


def test_masks_are_filled_and_vectors_written(trained, tmp_path, monkeypatch, capsys):
    told = ok("fill", trained("mlm"), "--text", "import <mask> as <mask>", "--top", "3")
    assert told.count("%") == 6 and told.count("'") == 12 and "Ġ" not in told, "texts, not their spelling in a file"
    code, text = ends(monkeypatch, capsys, "fill", trained("mlm"), "--text", "nothing to find")
    assert code == 2 and "there is no mask in the text: write <mask>" in text
    code, text = ends(monkeypatch, capsys, "fill", trained("clm"), "--text", "a <mask>")
    assert code == 2 and "predicts no masked words" in text
    (tmp_path / "texts.txt").write_text("one\ntwo words\nthree more words\n")
    ok("embed", trained("mlm"), tmp_path / "texts.txt", "-o", tmp_path / "vectors.npy", "--unit")
    vectors = np.load(tmp_path / "vectors.npy")
    assert vectors.shape[0] == 3 and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("name", ["simcse", "mlm", "electra", "clm"])
def test_embeddings_are_probed_and_compared(trained, tmp_path, name):
    texts, pairs = tmp_path / "texts.tsv", tmp_path / "pairs.tsv"
    texts.write_text("".join(f"{'def f(): return' if i % 2 else 'to be or not'} {i}\t{i % 2}\n" for i in range(40)))
    pairs.write_text("a dog\ta dog\t5\na dog\tan if statement\t1\na house\tthe house\t4\n")
    assert "untrained" in ok("probe", trained(name), texts)
    assert "uniformity" in ok("similarity", trained(name), pairs)


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        (
            {"name": "mixture", "weights": {"clm": -1, "mlm": 1}},
            "must not be negative and not all be 0; at sample 0: clm -1, mlm 1",
        ),
        ({"name": "mixture", "weights": {"clm": 0}}, "not all be 0"),
        ({"name": "mixture", "weights": {"clmm": 1}}, "did you mean 'clm'"),
        ({"name": "span_corruption", "mean_span": 1, "density": 0.5}, "the tokenizer has 256 sentinels"),
        ({"name": "prefix_lm", "ratio": 1.5}, "ratio must lie between 0 and 1, got 1.5"),
        ({"name": "simcse", "supervised": True}, "documents looked at have no example of simcse: document 0 has"),
        ({"name": "electra", "generator_size": 0}, "generator_size must lie in (0, 1], got 0"),
        ({"name": "nsp", "short_prob": 2}, "short_prob must lie in [0, 1], got 2"),
    ],
)
def test_impossible_settings_are_refused_before_training(data, tmp_path, monkeypatch, capsys, objective, said):
    file = tmp_path / "run.yaml"
    model = {"preset": "bert-1m", "layers": 1, "hidden": 32, "heads": 4}
    values = {"model": model, "objective": objective, "data": {"path": str(data)}, "output": str(tmp_path / "out")}
    file.write_text(yaml.safe_dump({**values, "batch": {"global_size": 4, "seq_len": 2048}}))
    code, text = ends(monkeypatch, capsys, "train", file)
    assert code == 2 and said in text and "Traceback" not in text
    assert not (tmp_path / "out").exists()


def test_token_types_and_pipelines_are_checked(data, monkeypatch, capsys, tmp_path):
    run = ["quickstart_nsp", f"data.path={data}", f"output={tmp_path / 'out'}"]
    code, text = ends(monkeypatch, capsys, "train", *run, "model.token_types=0")
    assert code == 2 and "nsp uses 2 token types, model.token_types is 0" in text
    code, text = ends(monkeypatch, capsys, "train", *run, "parallel.pipeline=2")
    assert code == 2 and "1 rank: not a multiple of parallel.tensor 1 x parallel.pipeline 2 = 2" in text


def test_every_objective_has_a_small_run():
    assert {load_run(name).objective["name"] for name in QUICK} >= set(REGISTRY)
