"""A frozen model: scores and text from a checkpoint, whatever trained it."""

from types import SimpleNamespace

import pytest
import torch

from ds_pretrain.data.dataset import PretrainingDataset
from ds_pretrain.evaluation.generate import Sampling, continue_all, ends_of, generate, unmask
from ds_pretrain.evaluation.perplexity import evaluate, evaluate_perplexity
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.objectives import create
from ds_pretrain.parallel.plan import ParallelPlan
from ds_pretrain.parallel.spawn import spawn
from ds_pretrain.training.engine import build_for
from ds_pretrain.training.inference import FrozenModel
from ds_pretrain.training.optimizer import OptimizerConfig
from ds_pretrain.training.trainer import PreTrainer


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    dataset = PretrainingDataset(data, seq_len=64, objective="clm")
    trainer = trainer_of(dataset, output)
    trainer.train()
    return trainer, dataset, output


def trainer_of(dataset, output):
    return PreTrainer(
        model=ModelConfig(layers=2, hidden=64, heads=4), objective=dataset.objective, dataset=dataset, batch_size=8,
        max_steps=40, optimizer=OptimizerConfig(lr=3e-3, warmup_steps=5), output=output, progress=False, seed=3,
    )  # fmt: skip


def test_the_untrained_network_is_what_the_run_began_with(trained, tmp_path):
    _, dataset, output = trained
    model, validation = FrozenModel(output, create("clm")), dataset.split("validation")
    begun = evaluate(trainer_of(dataset, tmp_path).model, validation)
    assert evaluate(model.untrained(model.seed), validation).nats == pytest.approx(begun.nats, rel=1e-6)
    assert evaluate(model.untrained(0), validation).nats != pytest.approx(begun.nats, rel=1e-6)


def test_a_frozen_model_scores_what_the_engine_scored(trained):
    trainer, dataset, output = trained
    validation = dataset.split("validation")
    frozen = FrozenModel(output, create("clm"))
    ours, theirs = evaluate(frozen, validation), evaluate(trainer.model, validation)
    assert ours.nats == pytest.approx(theirs.nats, rel=1e-6) and ours.tokens == theirs.tokens
    assert ours.bytes == int(validation.store.text[:, 0].sum())
    assert evaluate_perplexity(frozen, validation) == pytest.approx(ours.perplexity)
    assert ours.perplexity < 900 < dataset.vocab.size


def score_on_two(output, data):
    dataset = PretrainingDataset(data, seq_len=64, objective="clm")
    found = evaluate(FrozenModel(output, create("clm"), ParallelPlan(tensor=2)), dataset.split("validation"))
    return found.nats, found.accuracy


def test_a_checkpoint_loads_on_tensor_ranks(trained, data):
    _, dataset, output = trained
    alone = evaluate(FrozenModel(output, create("clm")), dataset.split("validation"))
    nats, accuracy = spawn(2, score_on_two, output, data)
    assert nats == pytest.approx(alone.nats, rel=1e-6) and accuracy == alone.accuracy


def test_greedy_is_the_most_probable_and_sampling_repeats_with_its_seed(trained):
    _, dataset, output = trained
    model, vocab = FrozenModel(output, create("clm")), dataset.vocab
    ends = ends_of(model, vocab)
    prompt = dataset.tokenizer.encode("The import").tolist()
    greedy = list(generate(model, [vocab.eod, *prompt], ends, vocab.specials, Sampling(5, temperature=0)))
    logits = model.logits(torch.tensor([[vocab.eod, *prompt]]))[0]
    logits[sorted(vocab.specials - {vocab.eod})] = -torch.inf
    assert greedy[0] == int(logits.argmax())
    once, twice, other = (
        list(generate(model, [vocab.eod, *prompt], ends, vocab.specials, Sampling(80, top_k=50, seed=seed)))
        for seed in (1, 1, 2)
    )
    assert once == twice != other
    assert not set(once) & vocab.specials


PROMPTS = ("The import", "", "A class is a template for making objects, and", "for x in")


def texts_of(output, data, tensor, temperature, cache):
    """What comes of all prompts at once, step by step."""
    dataset = PretrainingDataset(data, seq_len=64, objective="clm")
    model, vocab = FrozenModel(output, create("clm"), ParallelPlan(tensor=tensor)), dataset.vocab
    prompts = [[vocab.eod, *dataset.tokenizer.encode(text).tolist()] for text in PROMPTS]
    return list(continue_all(model, prompts, frozenset({vocab.eod}), vocab.specials, Sampling(90, temperature, seed=3), cache))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_cache_changes_no_token(trained, data, temperature):
    """Ninety tokens: past the 64 positions of the model the window slides."""
    *_, output = trained
    plain = texts_of(output, data, 1, temperature, False)
    assert texts_of(output, data, 1, temperature, True) == plain and len(plain) > 64
    assert spawn(2, texts_of, output, data, 2, temperature, True) == plain


def test_a_prompt_is_continued_the_same_in_any_company(trained, data):
    _, dataset, output = trained
    model, vocab = FrozenModel(output, create("clm")), dataset.vocab
    ends = ends_of(model, vocab)
    prompts = [dataset.tokenizer.encode(text).tolist() for text in PROMPTS]
    texts = [[vocab.eod, *prompt] for prompt in prompts]
    together = list(continue_all(model, texts, frozenset({vocab.eod}), vocab.specials, Sampling(40, temperature=0)))
    for number, prompt in enumerate(prompts):
        alone = list(generate(model, [vocab.eod, *prompt], ends, vocab.specials, Sampling(40, temperature=0)))
        assert alone == [step[number] for step in together if step[number] is not None]


@pytest.mark.parametrize("style", [{"preset": "llama-1m", "kv_heads": 2}, {"preset": "gpt2-small", "hidden": 64, "heads": 4}])
def test_reading_on_gives_the_logits_of_reading_all(mesh, style):
    model = untrained(mesh, ModelConfig(**style, layers=3, vocab=101, positions=32))
    tokens = torch.randint(0, 101, (3, 20), generator=torch.Generator().manual_seed(2))
    real = torch.arange(20) >= torch.tensor([[0], [7], [11]])
    with model.reading() as read:
        found = [read(tokens[:, :13], real[:, :13]), *(read(tokens[:, i : i + 1], real[:, i : i + 1]) for i in range(13, 20))]
    for step, got in enumerate(found, start=13):
        for row, start in enumerate((0, 7, 11)):
            torch.testing.assert_close(got[row], model.logits(tokens[row : row + 1, start:step])[0], rtol=0, atol=1e-4)


def untrained(mesh, shape):
    """A frozen model with initial weights, wide enough to tell places apart."""
    model = FrozenModel.__new__(FrozenModel)
    objective = create("clm")
    model.build, model.objective = build_for(objective, shape.model_copy(update={"init_std": 0.2}), mesh, 32), objective
    return model.untrained(0)


def test_what_cannot_be_loaded_or_generated_is_refused(trained, tmp_path):
    *_, output = trained
    with pytest.raises(ValueError, match=r"no checkpoint in .*train the run first"):
        FrozenModel(tmp_path, create("clm"))
    with pytest.raises(ValueError, match=r"parallel\.pipeline=1"):
        FrozenModel(output, create("clm"), ParallelPlan(pipeline=2))
    masked = FrozenModel(output, create("mlm"))
    with pytest.raises(ValueError, match="left to right"):
        next(generate(masked, [], frozenset({2}), frozenset()))


class Counting:
    """A diffusion model that is surest of what stands furthest left, and always says the number of the place."""

    class objective:
        measure, name = "bound", "counting"

    def __init__(self, positions=100):
        self.seen, self.build = [], SimpleNamespace(model=SimpleNamespace(positions=positions))

    def logits_at(self, tokens, chosen):
        self.seen.append(int(chosen.sum()))
        places = chosen[0].nonzero()[:, 0]
        logits = torch.zeros(len(places), 100)
        logits[torch.arange(len(places)), places] = 20.0 - places
        return logits


def test_unmasking_uncovers_the_surest_first_block_by_block():
    model = Counting()
    found = unmask(model, [50, 51], 99, frozenset({99}), Sampling(10, temperature=0), block=4, steps=2)
    assert found == list(range(2, 12))
    assert model.seen == [4, 2, 4, 2, 2, 1], "two passes a block, half of it each"
    once, twice = (unmask(model, [], 99, frozenset({99}), Sampling(3, 0.8, seed=1)) for _ in range(2))
    assert once == twice
    assert 99 not in unmask(model, [1], 99, frozenset({99}), Sampling(64, 5.0))
    with pytest.raises(ValueError, match="is no diffusion"):
        unmask(trained_for("mlm"), [], 99, frozenset())


def trained_for(name):
    return type("Model", (), {"objective": create(name)})()


def test_unmasking_more_than_there_are_positions_is_refused_with_the_numbers():
    with pytest.raises(ValueError, match=r"a prompt of 2 tokens and 10 new ones are more than the 11 positions .* at most 9"):
        unmask(Counting(11), [50, 51], 99, frozenset({99}), Sampling(10))
