import json
from pathlib import Path

import pytest
import yaml

from ds_pretrain.config import ConfigError, RunConfig, configs, find, keys_of, load_run, parse_run
from ds_pretrain.runs import run_of
from ds_pretrain.sweep.spec import Spec
from ds_pretrain.training.deepspeed_json import stage_of

BASE = {"data": {"path": "nowhere"}, "train": {"max_steps": 1000}}


def problems(world=1, vocab=None, **sections):
    return parse_run({**BASE, **sections}).check(world, vocab)


def test_a_misspelt_key_is_told_with_the_nearest_one():
    with pytest.raises(ConfigError) as error:
        parse_run({**BASE, "model": {"hiden": 64}, "optimizer": {"learning_rate": 1}, "bach": {}})
    text = str(error.value)
    assert "did you mean 'hidden'" in text and "did you mean 'batch'" in text
    assert "learning_rate" in text and len(error.value.problems) == 3


@pytest.mark.parametrize("kind", [RunConfig, Spec])
def test_every_key_of_a_file_is_explained(kind):
    keys = keys_of(kind)
    assert len({key for key, _, _ in keys}) == len(keys) > 10
    assert not [key for key, _, meaning in keys if not meaning]


def test_a_key_in_the_wrong_place_is_told_with_its_own():
    with pytest.raises(ConfigError) as error:
        parse_run({**BASE, "train": {"seed": 1, "lr": 2}, "min_lr": 3})
    assert error.value.problems == [
        "unknown key in train 'seed': write seed, outside any section",
        "unknown key in train 'lr': write optimizer.lr",
        "unknown section 'min_lr': write optimizer.min_lr",
    ]


def test_wrong_types_and_missing_keys_are_listed_together():
    with pytest.raises(ConfigError) as error:
        parse_run({"batch": {"global_size": 0}, "optimizer": {"lr": "fast"}})
    assert len(error.value.problems) == 3
    assert "data is required" in str(error.value)


def test_every_contradiction_is_found_at_once():
    found = problems(
        6,
        vocab=600,
        model={"heads": 6, "hidden": 100, "kv_heads": 4, "layers": 2, "vocab": 512, "positions": 64},
        parallel={"tensor": 4, "pipeline": 3},
        batch={"global_size": 10, "seq_len": 128},
        deepspeed={"config": "zero3_bf16.json"},
        objective={"name": "mml"},
        optimizer={"warmup_steps": 5000, "min_lr": 1.0},
    )
    text = "\n".join(found)
    for part in (
        "hidden 100 is not divisible by model.heads 6",
        "heads 6 is not divisible by model.kv_heads 4",
        "heads 6 is not divisible by parallel.tensor 4",
        "layers 2 is less than parallel.pipeline 3",
        "6 ranks: not a multiple",
        "ZeRO stage 3 does not run with parallel.pipeline 3",
        "did you mean 'mlm'",
        "seq_len 128 is longer than model.positions 64",
        "model.vocab 512 is below the tokenizer's 600 ids",
        "warmup_steps 5000",
        "min_lr 1.0 is above",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"deepspeed": {"config": "zero0_fp32.json"}, "parallel": {"pipeline": 2}}, "ZeRO stage 0 with"),
        ({"deepspeed": {"config": "zero2_fp32.json"}, "parallel": {"pipeline": 2}}, "ZeRO stage 2"),
        ({"batch": {"global_size": 7, "micro_size": 2}}, "is not divisible by 2 data ranks x batch.micro_size 2 = 4: use 8"),
        ({"parallel": {"sequence": True}}, "parallel.sequence needs parallel.tensor above 1"),
        ({"parallel": {"tensor": 2, "sequence": True}, "batch": {"seq_len": 33}}, "seq_len 33 is not divisible"),
        ({"model": {"preset": "bert-1m"}}, "objective clm is causal"),
        ({"deepspeed": {"config": "zero1_fp16.json"}}, "fp16 needs a GPU"),
        ({"deepspeed": {"config": "zero1_fp33"}}, "did you mean 'zero1_fp32'"),
    ],
)  # fmt: skip
def test_each_contradiction_says_numbers_and_fix(sections, message):
    found = problems(2, **sections)
    assert len(found) == 1 and message in found[0]


def test_bf16_with_stage_0_and_round_robin_are_refused(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"bf16": {"enabled": True}, "zero_optimization": {"stage": 0, "round_robin_gradients": True}}))
    found = "\n".join(problems(deepspeed={"config": str(path)}))
    assert "bf16 with ZeRO stage 0" in found and "round_robin_gradients" in found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable as JSON"),
        ("[]", "holds list, not a mapping"),
        ('{"bf16": true}', "sets bf16 to True, which is a section"),
        ('{"zero_optimization": {"stage": "auto"}}', 'sets zero_optimization.stage to "auto"'),
        ('{"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}}', 'zero_optimization.reduce_bucket_size to "auto"'),
        ('{"zero_optimization": {"stage": 4}}', "sets zero_optimization.stage to 4: there are 0, 1, 2 and 3"),
        (
            '{"zero_optimization": {"stage": 1}, "gradient_clipping": 3}',
            "sets gradient_clipping to 3, which belongs to the run",
        ),
    ],
)
def test_a_deepspeed_json_that_is_none_or_says_too_much_is_told(tmp_path, text, message):
    path = tmp_path / "mine.json"
    path.write_text(text)
    (found,) = problems(deepspeed={"config": str(path)})
    assert message in found


def test_overrides_reach_nested_keys_and_scientific_numbers(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(BASE))
    run = load_run(str(path), ["optimizer.lr=3e-4", "model.layers=7", "objective.name=mlm", "objective.mask_prob=0.2"])
    assert (run.optimizer.lr, run.model.layers) == (3e-4, 7)
    assert run.make_objective().mask_prob == 0.2
    with pytest.raises(ConfigError, match=r"section\.key=value"):
        load_run(str(path), ["model.layers"])
    with pytest.raises(ValueError, match="no such file"):
        load_run(str(tmp_path / "absent.yaml"))
    path.write_text("- a list")
    with pytest.raises(ConfigError, match="mapping of sections"):
        load_run(str(path))
    path.write_text("a: [")
    with pytest.raises(ConfigError, match="not readable as YAML"):
        load_run(str(path))


@pytest.mark.parametrize("text, told", [
    ("", "data is required"),
    ("output: runs/a\ndata:\n", "data"),
    ("output: runs/a\ndata: {path: [a, b]}\n", "data.path"),
    ("output: [a]\ndata: {path: a}\n", "output"),
    ("- a\n", "mapping of sections"),
    ("a: [", "not readable as YAML"),
])  # fmt: skip
def test_settings_of_a_run_that_are_none_are_told(tmp_path, text, told):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=told):
        run_of(tmp_path)


def test_a_preset_is_overridden_by_the_fields_beside_it():
    model = parse_run({**BASE, "model": {"preset": "gpt2-small", "layers": 2}}).model
    assert (model.layers, model.hidden) == (2, 768)
    with pytest.raises(ConfigError, match="gpt2-small"):
        parse_run({**BASE, "model": {"preset": "gpt2-smal"}})


@pytest.mark.parametrize("path", sorted((configs() / "runs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_run_is_sound(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if yaml.safe_load(path.read_text()).get("init"):  # of weights that the user brings; it runs in tests/interop
        with pytest.raises(ConfigError, match=r"init .* has no checkpoints: give the output folder of a run"):
            load_run(path.stem)
        return
    config = load_run(path.stem)
    assert config.check(1 if "quickstart" in path.stem else 8, 32768) == [] and Path(config.output).name == path.stem


@pytest.mark.parametrize("path", sorted((configs() / "deepspeed").glob("*.json")), ids=lambda p: p.stem)
def test_every_shipped_deepspeed_file_says_its_stage(path):
    assert f"zero{stage_of(json.loads(path.read_text()))}" in path.stem
    assert find(path.stem, "deepspeed", ".json") == path
