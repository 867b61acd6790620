"""Sweep files: what they expand to, and what is wrong with them, told at once."""

import pytest
import yaml

from ds_pretrain.config import ConfigError, configs
from ds_pretrain.planning.speed import step_flops
from ds_pretrain.sweep.spec import parameters, read, whole_model

RUN = {
    "model": {"layers": 2, "hidden": 32, "heads": 4},
    "batch": {"global_size": 8, "seq_len": 64},
    "deepspeed": {"config": "zero1_fp32"},
    "optimizer": {"warmup_steps": 2},
    "train": {"max_steps": 6},
}
SIZES = {"small": {"model.hidden": 32}, "wide": {"model.hidden": 64, "model.layers": 3}}


@pytest.fixture
def write(data, tmp_path):
    """A sweep file with these values, read."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**RUN, "data": {"path": str(data)}}))

    def write(**values):
        path = tmp_path / "sweep.yaml"
        path.write_text(
            yaml.safe_dump({"run": str(tmp_path / "run.yaml"), "output": str(tmp_path / "out"), **values}, sort_keys=False)
        )
        return read(str(path))

    return write


def test_every_combination_is_a_cell_named_by_what_varies(write):
    spec = write(grid={"size": SIZES, "optimizer.lr": [1e-3, 3e-3], "seed": [0, 1]}, set={"train.save_every": 5})
    assert len(spec.cells) == 8 and len({cell.folder for cell in spec.cells}) == 8
    cell = spec.find("size=wide,lr=0.003,seed=1")
    assert (cell.config.model.hidden, cell.config.model.layers, cell.config.seed) == (64, 3, 1)
    assert cell.config.optimizer.lr == 3e-3 and cell.config.train.save_every == 5
    assert cell == spec.cells[7] == spec.find("7")
    spec.check()


def test_a_cell_may_start_from_another_run(write, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text((tmp_path / "run.yaml").read_text().replace("max_steps: 6", "max_steps: 9"))
    spec = write(grid={"start": {"this": {}, "that": {"run": str(other)}}})
    assert [cell.config.train.max_steps for cell in spec.cells] == [6, 9]


def test_a_sweep_that_grows_keeps_its_cells(write):
    before = write(grid={"size": SIZES, "seed": [0, 1]}).cells
    after = write(grid={"size": {"tiny": {"model.hidden": 16}, **SIZES}, "seed": [2, 0, 1]}).cells
    assert {cell.name for cell in before} < {cell.name for cell in after}


@pytest.mark.parametrize("budget, tokens", [
    ({"tokens": [20480]}, lambda n: 20480),
    ({"tokens_per_parameter": [0.5]}, lambda n: 0.5 * n),
    ({"flops": [3e9]}, lambda n: 3e9 / (6 * n)),
], ids=["tokens", "per parameter", "flops"])  # fmt: skip
def test_a_budget_sets_the_steps_of_each_size(write, budget, tokens):
    for cell in write(grid={"size": SIZES}, budget=budget).cells:
        trained = cell.config.train.max_steps * 8 * 64
        assert abs(trained - tokens(parameters(cell.config))) <= 8 * 64 / 2
        assert cell.config.train.eval_every == cell.config.train.max_steps


def test_an_isoflop_ladder_gives_every_size_the_same_compute(write):
    spec = write(grid={"size": SIZES}, budget={"flops": [4e9, 16e9], "warmup": 0.1})
    assert [cell.labels["flops"] for cell in spec.cells] == ["4G", "16G"] * 2
    for cell in spec.cells:
        spent = 6 * parameters(cell.config) * cell.config.train.max_steps * 8 * 64
        assert spent == pytest.approx(cell.length.value, rel=0.1)
        assert cell.config.optimizer.warmup_steps == round(0.1 * cell.config.train.max_steps)


def test_a_ladder_of_model_flops_gives_every_objective_the_same_compute(write):
    spec = write(grid={"objective.name": ["clm", "mlm", "electra"]}, budget={"model_flops": [4e9]})
    runs = {cell.config.objective["name"]: cell.config for cell in spec.cells}
    spent = {name: step_flops(run, whole_model(run)) for name, run in runs.items()}
    steps = {name: run.train.max_steps for name, run in runs.items()}
    assert steps["mlm"] > steps["clm"] and all(spent[name] * steps[name] == pytest.approx(4e9, rel=0.1) for name in spent)


@pytest.mark.parametrize("values, told", [
    ({"grid": {}}, "the grid is empty: give at least one field and its values"),
    ({"grid": {"seed": []}}, "seed has no values"),
    ({"gird": {"seed": [0]}}, "unknown key 'gird': did you mean 'grid'"),
    ({"grid": {"seed": [0]}, "budget": {"token": [1e6]}}, "unknown key in budget 'token': did you mean 'tokens'"),
    ({"grid": {"seed": [0]}, "budget": {"tokens": [1e6], "flops": [1e9]}}, "give one of tokens, tokens_per_parameter, flops"),
    ({"grid": {"seed": [0]}, "budget": {"tokens": [-5]}}, "tokens -5 is not above 0"),
    ({"grid": {"seed": [0]}, "ranks": 0}, "ranks: Input should be greater than or equal to 1"),
])  # fmt: skip
def test_a_file_that_makes_no_sense_is_refused_with_the_place(write, values, told):
    with pytest.raises(ConfigError) as refused:
        write(**values)
    assert told in str(refused.value)


@pytest.mark.parametrize("values, told", [
    ({"grid": {"model.hiden": [32, 64]}}, "all 2 cells: unknown key in model 'hiden': did you mean 'hidden'"),
    ({"grid": {"train.seed": [0, 1]}}, "all 2 cells: unknown key in train 'seed': write seed, outside any section"),
    ({"grid": {"lr": [1e-3]}}, "lr=0.001: unknown section 'lr': write optimizer.lr"),
    ({"grid": {"model.heads": [4, 3]}}, "heads=3: model.hidden 32 is not divisible by model.heads 3"),
    ({"grid": {"objective.name": ["clm", "mml"]}}, "name=mml: objective: unknown objective 'mml': did you mean 'mlm'"),
    ({"grid": {"seed": [0, 1, 0]}}, "seed=0: 1 cells are there more than once"),
    ({"grid": {"seed": [0]}, "ranks": 3}, "batch.global_size 8 is not divisible by 3 data ranks"),
    ({"grid": {"size": SIZES}, "budget": {"flops": [1e6]}}, "is less than half a step of 512 tokens"),
    ({"grid": {"data.path": ["nowhere"]}}, "data.path nowhere holds no prepared data"),
    ({"grid": {"output": ["a", "b"]}}, "grid.output: every cell has a folder of its own, so it varies nothing"),
    ({"grid": {"train.max_steps": [9, 20]}, "budget": {"tokens": [1e6]}}, "grid.train.max_steps: it follows from the budget"),
    ({"grid": {"a": {"one": {"seed": 3}, "two": {"seed": 3}}}}, "a=one and a=two are the same run"),
    ({"grid": {"seed": [0]}, "run": "quickstrat"}, "did you mean 'quickstart'"),
])  # fmt: skip
def test_a_cell_that_cannot_run_is_named_before_any_runs(write, values, told):
    with pytest.raises(ConfigError) as refused:
        write(**values).check()
    assert told in str(refused.value)


def test_scores_that_cannot_be_are_told_before_any_cell_runs(write, data):
    scores = {
        "a": {"by": "eval", "data": "nowhere"},
        "b": {"by": "eval", "data": str(data), "split": "tset"},
        "c": {"by": "memorised"},
    }
    with pytest.raises(ConfigError) as refused:
        write(grid={"objective.name": ["clm", "mlm"]}, scores=scores).check()
    told = str(refused.value)
    assert "all 2 cells: scores.a: there is no nowhere" in told and "did you mean 'test'" in told
    assert "name=mlm: scores.c: mlm continues no text" in told


def test_a_sweep_over_another_replaces_what_it_names(tmp_path):
    (tmp_path / "small.yaml").write_text("run: quickstart\noutput: small\nset: {seed: 3}\ngrid: {seed: [0, 1]}\n")
    large, larger = tmp_path / "large.yaml", tmp_path / "larger.yaml"
    large.write_text(f"base: {tmp_path / 'small.yaml'}\noutput: large\nset: {{}}\n")
    larger.write_text(f"base: {large}\noutput: larger\n")
    spec = read(str(large))
    assert (spec.output, spec.run, spec.set, spec.grid) == ("large", "quickstart", {}, {"seed": [0, 1]})
    with pytest.raises(ConfigError, match="has a base itself: name a sweep file that has none"):
        read(str(larger))
    large.write_text("base: sizs\noutput: large\n")
    with pytest.raises(
        ConfigError, match=r"large.yaml: 1 problem\n  - base: unknown sweep configuration 'sizs': did you mean 'sizes'"
    ):
        read(str(large))


@pytest.mark.parametrize("path", sorted((configs() / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_sweep_lacks_nothing_but_its_data(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = read(path.stem)
    assert spec.folder.name == path.stem and len({cell.name for cell in spec.cells}) == len(spec.cells) > 3
    with pytest.raises(ConfigError) as refused:
        spec.check()
    absent = ("holds no prepared data", "there is no data/", "has no checkpoints")
    assert all(any(word in problem for word in absent) for problem in refused.value.problems), refused.value


def test_unknown_cells_and_files_are_refused_with_the_nearest(write):
    spec = write(grid={"seed": [0, 1]})
    with pytest.raises(ValueError, match="did you mean 'seed=1'"):
        spec.find("sed=1")
    with pytest.raises(ValueError, match="cell 2: the sweep has 2, 0 to 1"):
        spec.find("2")
    with pytest.raises(ValueError, match="unknown sweep"):
        read("sizs")
