"""A run from Python: the API as users write it, what it records, what it refuses, and what must not change its losses."""

import json
import math
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch

from ds_pretrain import (
    CausalLanguageModeling,
    MaskedLanguageModeling,
    ParallelPlan,
    PreTrainer,
    PretrainingDataset,
    TextTokenizer,
    create_gpt_small,
    evaluate_perplexity,
)
from ds_pretrain.core.attention import AttentionPattern
from ds_pretrain.core.batch import Batch, Target
from ds_pretrain.curation.prepare import prepare
from ds_pretrain.data.dataset import Cursor
from ds_pretrain.data.mixing import MixedDataset
from ds_pretrain.evaluation.perplexity import evaluate
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.objectives import create
from ds_pretrain.parallel.spawn import spawn
from ds_pretrain.training import engine, metrics
from ds_pretrain.training.checkpoint import damages
from ds_pretrain.training.optimizer import OptimizerConfig
from ds_pretrain.training.signals import InterruptedRun
from ds_pretrain.training.trainer import DivergedError

TINY = ModelConfig(layers=2, hidden=32, heads=4)
STEP = ["step", "loss", "clm", "grad_norm", "lr", "target_tokens", "tokens", "tokens_per_second", "skipped_steps", "flops"]
EVALUATION = {"step", "tokens", "split", "loss", "perplexity", "bits_per_byte"}


def trainer(data, output=None, model=TINY, objective="clm", **more):
    dataset = PretrainingDataset(data, seq_len=32, objective=objective)
    settings = {"batch_size": 8, "max_steps": 5, "optimizer": OptimizerConfig(lr=1e-2, warmup_steps=2), "progress": False}
    return PreTrainer(model=model, objective=dataset.objective, dataset=dataset, output=output, **{**settings, **more})


def lines(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(output):
    return [line["loss"] for line in lines(output) if "lr" in line]


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """40 steps of a causal model, evaluated every 20."""
    made = trainer(data, tmp_path_factory.mktemp("run"), max_steps=40, eval_every=20)
    made.train()
    return made


def test_the_api_of_the_contract_trains_a_masked_model(data):
    tokenizer = TextTokenizer.load(data / "tokenizer")
    dataset = PretrainingDataset(data_path=str(data), tokenizer=tokenizer, seq_len=32, objective="mlm")
    objective = MaskedLanguageModeling(mask_prob=0.15, mask_token_prob=0.8, random_token_prob=0.1)
    made = PreTrainer(model=create_gpt_small(vocab_size=len(tokenizer), layers=1, hidden=32, heads=2), objective=objective,
                      dataset=dataset, plan=ParallelPlan(tensor=1, pipeline=1), batch_size=4, learning_rate=3e-4,
                      max_steps=2)  # fmt: skip
    result = made.train()
    assert made.step == 2 and result.finite and made.optimizer.lr == 3e-4
    assert 0.7 * math.log(len(tokenizer)) < result.loss < 1.3 * math.log(len(tokenizer))
    with pytest.raises(ValueError, match="the loss of mlm is not the likelihood of the text, so it has no perplexity"):
        evaluate_perplexity(made.model, dataset.split("test"))


def test_the_api_of_the_contract_gives_the_perplexity_of_a_causal_model(run):
    test = run.dataset.split("test")
    perplexity = evaluate_perplexity(run.model, test)
    scores = evaluate(run.model, test)
    assert perplexity == math.exp(scores.nats / scores.tokens)
    assert 2 < perplexity < run.dataset.vocab.size / 2
    assert scores.tokens == test.evaluation().tokens and scores.bytes == int(test.store.text[:, 0].sum())


def test_the_loss_falls(run):
    found = losses(run.output)
    assert len(found) == 40 and abs(found[0] - math.log(run.dataset.vocab.size)) < 0.5
    assert sum(found[-5:]) / 5 < found[0] - 1


def test_metrics_lines_have_the_keys_of_the_contract(run):
    found = lines(run.output)
    steps, evaluations = [line for line in found if "lr" in line], [line for line in found if "split" in line]
    assert [line["step"] for line in steps] == list(range(1, 41))
    assert all([key for key in line if key != "mfu"] == STEP and line["loss"] == line["clm"] for line in steps)
    assert [line["step"] for line in evaluations] == [20, 40]
    assert all(line.keys() >= EVALUATION and line["split"] == "validation" for line in evaluations)
    assert [line["lr"] for line in steps] == [run.optimizer.rate(step, 40) for step in range(1, 41)]
    tokens = [line["tokens"] for line in steps]
    assert all(a < b <= a + 8 * 32 for a, b in zip([0, *tokens], tokens, strict=False))


def test_a_masked_run_records_its_accuracy_and_no_perplexity(data, tmp_path):
    trainer(data, tmp_path, objective="mlm", max_steps=2, eval_every=2, eval_tokens=2000).train()
    found = lines(tmp_path)
    assert [*found[0]][:4] == ["step", "loss", "mlm", "grad_norm"]
    assert "accuracy" in found[-1] and not {"perplexity", "bits_per_byte"} & found[-1].keys()


def test_a_finished_run_does_nothing(data, run):
    before = written(run.output)
    again = trainer(data, run.output, max_steps=40, eval_every=20)
    assert again.step == 40 and again.tokens == run.tokens and again.cursor == run.cursor
    assert again.train() is None
    assert written(run.output) == before


def written(output):
    """When each file was written, but for the lock, which says who was here last."""
    return {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file() and path.name != "lock"}


@pytest.mark.parametrize("stage", [0, 1])
def test_a_diverged_run_stops_without_a_checkpoint(data, tmp_path, stage):
    made = trainer(data, tmp_path, max_steps=2, save_every=1, deepspeed={"zero_optimization": {"stage": stage}})
    made.train()
    made.max_steps = 4
    with torch.no_grad():
        next(made.model.module.parameters()).fill_(torch.nan)
    with pytest.raises(DivergedError, match=r"step 3: loss nan.*Nothing was saved"):
        made.train()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-1", "step-2"]
    last = lines(tmp_path)[-1]
    assert last["step"] == 3 and last["loss"] == "nan"
    assert trainer(data, tmp_path, max_steps=4, deepspeed={"zero_optimization": {"stage": stage}}).step == 2


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_activation_checkpointing_changes_no_loss(data, tmp_path, dropout):
    """Bit for bit in the forward pass, dropout included; its gradients are summed in another order."""
    model = TINY.model_copy(update={"dropout": dropout})
    for name in ("with", "without"):
        trainer(data, tmp_path / name, model, activation_checkpointing=name == "with").train()
    assert losses(tmp_path / "with")[0] == losses(tmp_path / "without")[0]
    assert losses(tmp_path / "with") == pytest.approx(losses(tmp_path / "without"), rel=1e-6)


def test_micro_batches_change_no_loss(data, tmp_path):
    for size in (8, 2):
        trainer(data, tmp_path / str(size), micro_batch_size=size).train()
    assert losses(tmp_path / "8") == pytest.approx(losses(tmp_path / "2"), rel=1e-5)


def test_bf16_trains_close_to_fp32(data, run, tmp_path):
    half = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}
    made = trainer(data, tmp_path, max_steps=40, deepspeed=half)
    made.train()
    assert next(made.model.module.parameters()).dtype == torch.bfloat16
    assert losses(tmp_path) == pytest.approx(losses(run.output), rel=0.03)
    assert losses(tmp_path) != losses(run.output)


FP16 = {"zero_optimization": {"stage": 1}, "fp16": {"enabled": True, "initial_scale_power": 40, "hysteresis": 1}}


def test_fp16_skips_overflows_until_the_scale_fits_and_resumes_with_it(data, tmp_path, fp16):
    straight = trainer(data, tmp_path / "a", max_steps=40, save_every=30, deepspeed=FP16)
    straight.train()
    skipped = [line["skipped_steps"] for line in lines(tmp_path / "a")]
    norms = [line["grad_norm"] for line in lines(tmp_path / "a")]
    assert skipped[0] == 1 and 10 < skipped[-1] < 30 and skipped[29] == skipped[-1]
    assert [norm is None for norm in norms] == [b > a for a, b in zip([0, *skipped], skipped, strict=False)]
    assert straight.model.scaler.cur_scale == 2.0 ** (40 - skipped[-1])
    shutil.copytree(tmp_path / "a/checkpoints/step-30", tmp_path / "b/checkpoints/step-30")
    resumed = trainer(data, tmp_path / "b", max_steps=40, deepspeed=FP16)
    assert resumed.step == 30 and vars(resumed.model.scaler)["cur_scale"] == 2.0 ** (40 - skipped[-1])
    resumed.train()
    assert losses(tmp_path / "b") == losses(tmp_path / "a")[30:]
    assert vars(resumed.model.scaler) == vars(straight.model.scaler)


def test_fp16_stops_when_the_scale_can_fall_no_further(data, tmp_path, fp16):
    config = {**FP16, "fp16": {**FP16["fp16"], "initial_scale_power": 36, "min_loss_scale": 2**33}}
    with pytest.raises(DivergedError, match=r"step 3: .*gradient norm inf"):
        trainer(data, tmp_path, max_steps=40, deepspeed=config).train()
    assert lines(tmp_path)[-1]["skipped_steps"] == 3


def test_a_resumed_run_has_one_line_for_each_step(data, tmp_path):
    trainer(data, tmp_path, max_steps=5, save_every=2, eval_every=5, keep=9).train()
    whole = (tmp_path / "metrics.jsonl").read_text()
    shutil.rmtree(tmp_path / "checkpoints/step-5")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed here
    trainer(data, tmp_path, max_steps=5, save_every=2, eval_every=5).train()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 5]
    assert losses(tmp_path) == [json.loads(line)["loss"] for line in whole.splitlines()[:5]]


def test_a_full_disk_stops_the_metrics_but_not_the_run(data, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(metrics, "_cut", lambda path, step: None)  # /dev/full reads as zeros without end
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    made = trainer(data, tmp_path, max_steps=3, save_every=0)
    made.train()
    assert made.step == 3
    assert [record.message for record in caplog.records if "make room; the run goes on" in record.message] == [
        "metrics are not being written ([Errno 28] No space left on device): make room; the run goes on"
    ]


def test_an_output_that_cannot_be_written_is_told_on_every_rank(data, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OSError, match=r"output .*taken/run cannot be written: .*Not a directory"):
        trainer(data, tmp_path / "taken" / "run")


def test_an_evaluation_holds_a_few_micro_batches_at_a_time(run, monkeypatch):
    test = run.dataset.split("test")
    whole, sizes = evaluate(run.model, test), []
    monkeypatch.setattr(engine, "AT_ONCE", 3)
    count = engine.count_totals
    monkeypatch.setattr(engine, "count_totals", lambda some, heads: sizes.append(len(some)) or count(some, heads))
    assert evaluate(run.model, test) == whole
    assert max(sizes) == 3 and len(sizes) > 1


def told_to_stop(data, output):
    """On two ranks: only the second gets the signal, in the middle of its third step."""
    made = trainer(data, output, max_steps=1000)
    collate, calls = made.dataset.collate, []

    def interrupting(rows):
        calls.append(rows)
        if made.mesh.rank == 1 and len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return collate(rows)

    made.dataset.collate = interrupting
    try:
        made.train()
    except InterruptedRun as stopped:
        assert stopped.exit_code == 143 and stopped.kept
        return made.step
    return None


def test_a_signal_to_one_rank_stops_all_of_them_with_one_checkpoint(data, tmp_path):
    step = spawn(2, told_to_stop, data, tmp_path)
    assert 1 <= step < 20
    assert damages(tmp_path / "checkpoints" / f"step-{step}") == []


def test_a_signal_to_a_run_without_an_output_ends_it_as_a_failure(data):
    made = trainer(data, None, max_steps=20, save_every=0)
    collate = made.dataset.collate
    made.dataset.collate = lambda rows: (made.step == 2 and os.kill(os.getpid(), signal.SIGUSR1)) or collate(rows)
    with pytest.raises(InterruptedRun, match="nothing is kept") as stopped:
        made.train()
    assert stopped.value.exit_code == 138


def test_a_file_stops_a_run_with_a_checkpoint_and_without_it_the_run_goes_on(data, tmp_path):
    made = trainer(data, tmp_path, max_steps=40, save_every=0)
    collate, stop = made.dataset.collate, tmp_path / "stop"
    made.dataset.collate = lambda rows: (made.step == 2 and stop.touch()) or collate(rows)
    with pytest.raises(InterruptedRun) as stopped:
        made.train()
    assert stopped.value.exit_code == 0 and f"remove {stop}, and the same command goes on" in str(stopped.value)
    stop.unlink()
    again = trainer(data, tmp_path, max_steps=made.step + 2)
    assert 2 < again.step == made.step < 40
    again.train()
    assert len(losses(tmp_path)) == made.step + 2


def test_a_loss_far_above_its_start_is_told_once(data, tmp_path, capsys):
    made = trainer(data, tmp_path, max_steps=12, optimizer=OptimizerConfig(lr=3.0, warmup_steps=0), progress=True)
    made.train()
    assert made.diverging and capsys.readouterr().out.count("the run is diverging") == 1
    assert not trainer(data, max_steps=5).diverging


def test_an_objective_the_dataset_was_not_made_for_is_refused(data, tmp_path):
    dataset = PretrainingDataset(data, seq_len=32, objective="mlm")
    for objective in (CausalLanguageModeling(), MaskedLanguageModeling(mask_prob=0.3)):
        with pytest.raises(ValueError, match=r"the dataset was made for MaskedLanguageModeling\(mask_prob=0.15.*is given"):
            PreTrainer(model=TINY, objective=objective, dataset=dataset, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_batch_sizes_that_do_not_divide_are_refused_with_the_arithmetic(data):
    with pytest.raises(ValueError, match=r"global batch size 10 must be a multiple of micro batch size 4 .* = 4: use 8"):
        trainer(data, batch_size=10, micro_batch_size=4)


def test_a_trainer_without_output_keeps_nothing_and_says_so(data):
    made = trainer(data, max_steps=1)
    made.train()
    with pytest.raises(ValueError, match="has no output folder"):
        made.save()


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_evaluation_is_the_same_for_every_micro_size_and_twice(data, objective):
    made = trainer(data, objective=objective, model=TINY.model_copy(update={"dropout": 0.1}))
    test = made.dataset.split("test")
    first, again = evaluate(made.model, test, 3000), evaluate(made.model, test, 3000)
    assert first == again
    for size in (1, 3, 8):
        made.model.micro_size = size
        other = evaluate(made.model, test, 3000)
        assert other.nats == pytest.approx(first.nats, rel=1e-6)
        assert (other.tokens, other.bytes, other.accuracy) == (first.tokens, first.bytes, first.accuracy)


def packed(segments, pattern):
    segment = torch.tensor(segments, dtype=torch.int32)
    position = torch.tensor([[row[:i].count(s) for i, s in enumerate(row)] for row in segments])
    return Batch(segment, position, pattern(segment), {})


@pytest.mark.parametrize(
    "pattern",
    [
        AttentionPattern.causal,
        AttentionPattern.full,
        lambda segment: AttentionPattern.prefix(segment, torch.full_like(segment, 2)),
    ],
    ids=["causal", "full", "prefix"],
)
def test_attended_pairs_are_those_of_the_dense_mask(pattern):
    batches = [
        packed([[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 2, 2, 3, 3, 3, 3]], pattern),
        packed([[1, 1, 1, 1, 0, 0, 0, 0]], pattern),
    ]
    assert metrics.attended_pairs(batches) == sum(int(batch.attention.dense().sum()) for batch in batches)
    assert metrics.real_tokens(batches) == 7 + 8 + 4


SWITCHED = [create("clm", reset_position=p, reset_attention=a) for p in (True, False) for a in (True, False)]


@pytest.mark.parametrize("objective", [*SWITCHED, create("mlm"), create("prefix_lm")], ids=str)
def test_attended_pairs_of_real_batches_are_those_of_the_dense_mask(data, objective):
    dataset = PretrainingDataset(data, seq_len=128, objective=objective)
    batch = dataset.collate(dataset.rows(Cursor(), 16)[0])
    assert metrics.attended_pairs([batch]) == int(batch.attention.dense().sum()) > 0


def test_flops_are_six_per_weight_and_token_and_twelve_per_pair_layer_and_width():
    model = ModelConfig(layers=2, hidden=32, heads=4, vocab=100, bias=False)
    base = model.flops(0, 10, 0)
    assert base == 6 * 10 * 2 * 12 * 32**2
    assert model.flops(50, 10, 0) - base == 12 * 2 * 32 * 50
    assert model.flops(0, 10, 7) - base == 6 * 100 * 32 * 7


def test_mfu_is_the_share_of_the_peak_and_unknown_on_other_devices(monkeypatch):
    model, segment = ModelConfig(layers=2, hidden=32, heads=4, vocab=100), [[1, 1, 1, 2, 2, 0]]
    weights = torch.tensor([[1.0, 1.0, 0.0, 0.5, 0.0, 0.0]])
    batch = replace(packed(segment, AttentionPattern.causal), targets={"clm": Target(weights.long(), weights, 2.5)})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flops = metrics.step_flops(model, CausalLanguageModeling(), [batch])
    assert flops == model.flops(6 + 3, 5, 3)
    assert metrics.mfu(flops, 1.0, 1) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert metrics.mfu(flops, 0.5, 2) == pytest.approx(flops / 0.5 / (2 * 989.5e12))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "unheard of")
    assert metrics.mfu(flops, 0.5, 2) is None


def test_flops_of_two_networks_count_the_vocabulary_in_the_generator_only():
    model, electra = ModelConfig(layers=2, hidden=32, heads=4, vocab=100, bias=False), create("electra")
    weights = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    targets = {"mlm": Target(weights.long(), weights, 2), "rtd": Target(torch.ones(1, 4).long(), torch.ones(1, 4), 4)}
    batch = replace(packed([[1, 1, 1, 1]], AttentionPattern.full), targets=targets)
    small = 6 * 4 * 2 * (4 * 8**2 + 2 * 8 * 32) + 12 * 2 * 8 * 16 + 6 * 100 * 32 * 2  # one head of 8, a quarter of 128
    assert metrics.step_flops(model, electra, [batch]) == 6 * 4 * 2 * 12 * 32**2 + 12 * 2 * 32 * 16 + small


def test_a_mixed_run_resumes_bit_for_bit_and_takes_new_weights(data, corpus, tmp_path):
    """The same losses with and without a stop, and after it other shares, with no piece read twice."""
    prepare([str(corpus)], tmp_path / "again", tokenizer=data / "tokenizer", split=(0.6, 0.2, 0.2), quiet=True)

    def mixed(output, steps, share):
        dataset = PretrainingDataset(data, seq_len=32, objective="clm")
        both = MixedDataset(dataset, {str(data): share, str(tmp_path / "again"): 1 - share})
        settings = {"batch_size": 8, "max_steps": steps, "optimizer": OptimizerConfig(lr=1e-2), "progress": False}
        return PreTrainer(
            model=TINY, objective=dataset.objective, dataset=both, output=tmp_path / output, eval_every=2, **settings
        )

    mixed("whole", 4, 0.75).train()
    mixed("parts", 2, 0.75).train()
    mixed("parts", 4, 0.75).train()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    changed = mixed("parts", 8, 0.0)
    before = changed.dataset.progress(changed.cursor)
    changed.train()
    after = lines(tmp_path / "parts")[-2]["sources"]
    folder = f"validation of {tmp_path / 'again'}"
    assert [line["split"] for line in lines(tmp_path / "parts") if "split" in line][-2:] == ["validation", folder]
    assert before[str(data)]["epochs"] == after[str(data)]["epochs"] and after[str(data)]["share"] < before[str(data)]["share"]
    with pytest.raises(ValueError, match="use another output"):
        trainer(data, tmp_path / "parts", max_steps=9)
