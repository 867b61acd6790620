"""A checkpoint is whole or not there: whatever is done to its files is found, and the run goes on from the one before."""

import errno
import json
import math
import multiprocessing
import pickle
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
import xxhash

from ds_pretrain.data.dataset import PretrainingDataset
from ds_pretrain.models.config import ModelConfig
from ds_pretrain.parallel.spawn import spawn
from ds_pretrain.training import checkpoint, state
from ds_pretrain.training.checkpoint import Snapshot, damages, newest, steps
from ds_pretrain.training.trainer import PreTrainer

TINY = ModelConfig(layers=2, hidden=32, heads=4)


def trainer(data, output, model=TINY, objective="clm", seq_len=32, **more):
    dataset = PretrainingDataset(data, seq_len=seq_len, objective=objective)
    settings = {"batch_size": 4, "max_steps": 4, "save_every": 2, "keep": 3, "progress": False}
    return PreTrainer(model=model, objective=dataset.objective, dataset=dataset, output=output, **{**settings, **more})


def numbers(folder):
    return [int(path.name.removeprefix("step-")) for path in steps(folder)]


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A trained run with checkpoints at steps 2 and 4, and its trainer."""
    output = tmp_path_factory.mktemp("run")
    made = trainer(data, output)
    made.train()
    return made


@pytest.fixture
def folder(run, tmp_path):
    """A copy of its checkpoints to break."""
    shutil.copytree(run.output / "checkpoints", tmp_path / "run" / "checkpoints")
    return tmp_path / "run" / "checkpoints"


def test_a_snapshot_holds_every_parameter_and_kind(run):
    snapshot = Snapshot(run.output / "checkpoints" / "step-4")
    fragments = {fragment.shard.name: fragment for fragment in state.fragments(run.model)}
    assert len(fragments) == len(list(run.model.module.parameters()))
    assert set(snapshot.index) == {(name, kind) for name in fragments for kind in state.KINDS}
    for (name, kind), _ in snapshot.index.items():
        whole, shard = snapshot.whole(name, kind), fragments[name].shard
        assert whole.shape == shard.shape == snapshot.shapes[name] and whole.dtype == torch.float32
        assert torch.equal(shard.take(whole).reshape(-1), fragments[name].views[kind])
    assert damages(snapshot.path) == [] and newest(run.output / "checkpoints") == snapshot.path


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1 << position % 8
    path.write_bytes(data)


def mutations(size):
    """(name, change) for a file of this many bytes."""
    positions = [0, 7, 8, 40, size - 1, *random.Random(size).sample(range(size), 8)]
    yield from ((f"flip {p}", lambda path, p=p: flip(path, p)) for p in positions)
    yield from ((f"cut to {n}", lambda path, n=n: path.write_bytes(path.read_bytes()[:n])) for n in (0, 9, size // 2, size - 1))
    yield "longer", lambda path: path.write_bytes(path.read_bytes() + b"\n")
    yield "deleted", Path.unlink
    yield "other bytes", lambda path: path.write_bytes(bytes(size))


def test_every_damage_to_every_file_is_found_and_named_and_the_step_before_is_taken(folder):
    latest = folder / "step-4"
    files = sorted(latest.iterdir())
    assert len(files) >= 2 and files[0].name == "manifest.json"
    for file in files:
        good = file.read_bytes()
        for name, change in mutations(len(good)):
            change(file)
            assert any(str(file) in text for text in damages(latest)), (file.name, name)
            assert newest(folder) == folder / "step-2", (file.name, name)
            file.write_bytes(good)
    assert newest(folder) == latest


def test_a_file_that_does_not_belong_is_found(folder):
    for name in ("rank-00001-000.safetensors", "notes.txt"):
        (folder / "step-4" / name).write_bytes(b"x")
        assert damages(folder / "step-4") == [f"{folder / 'step-4' / name}: not part of this checkpoint"]
        assert newest(folder) == folder / "step-2"
        (folder / "step-4" / name).unlink()


@pytest.mark.parametrize("edit", [("step", 3), ("counters", {}), ("cursor", [0, 0]), ("files", [])])
def test_an_edited_manifest_is_found(folder, edit):
    path = folder / "step-4" / "manifest.json"
    sealed = json.loads(path.read_bytes())
    sealed["manifest"][edit[0]] = edit[1]
    path.write_text(json.dumps(sealed, indent=1, sort_keys=True))
    assert "does not match its own checksum" in damages(path.parent)[0]
    assert newest(folder) == folder / "step-2"


def test_a_run_falls_back_and_replaces_the_damaged_checkpoint(data, run, folder):
    flip(next((folder / "step-4").glob("*.safetensors")), 1000)
    again = trainer(data, folder.parent)
    assert again.step == 2
    again.train()
    assert numbers(folder) == [4, 2] and damages(folder / "step-4") == []
    first, second = (Snapshot(where / "step-4") for where in (run.output / "checkpoints", folder))
    assert all(torch.equal(first.whole(*key), second.whole(*key)) for key in first.index)
    again.save()  # of the same step: once more
    assert numbers(folder) == [4, 2] and damages(folder / "step-4") == [] and len(list(folder.iterdir())) == 2


def test_pruning_never_prefers_a_damaged_checkpoint_of_a_later_step(data, folder):
    flip(folder / "step-4" / "manifest.json", 100)
    again = trainer(data, folder.parent, save_every=1, max_steps=3, keep=1)
    again.train()
    assert newest(folder) == folder / "step-3" and not (folder / "step-2").exists()


def test_nothing_sound_is_refused(data, folder):
    for path in steps(folder):
        (path / "manifest.json").unlink()
    for read in (lambda: newest(folder), lambda: trainer(data, folder.parent)):
        with pytest.raises(ValueError, match="is sound: move the folder away"):
            read()


def refused(data, output):
    with pytest.raises(ValueError, match="is sound: move the folder away"):
        trainer(data, output)
    return True


def test_nothing_sound_is_refused_on_every_rank(data, folder):
    for path in steps(folder):
        (path / "manifest.json").unlink()
    assert spawn(2, refused, data, folder.parent)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"hidden": 64}, r"embed\.position\.weight: \(32, 32\) in the checkpoint, \(32, 64\) in the model"),
        ({"layers": 3}, r"layers\.2\.\S+: absent in the checkpoint, \([\d, ]+\) in the model"),
        ({"layers": 1}, r"layers\.1\.\S+: \([\d, ]+\) in the checkpoint, absent in the model"),
        ({"heads": 2}, "heads 4 in the checkpoint, 2 in the model"),
        ({"activation": "relu"}, "activation gelu_tanh in the checkpoint, relu in the model"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(data, folder, change, said):
    with pytest.raises(ValueError, match=said) as error:
        trainer(data, folder.parent, TINY.model_copy(update=change))
    assert "checkpoint of another model" in str(error.value)


@pytest.mark.parametrize("change", [{"objective": "mlm"}, {"seq_len": 64}])
def test_a_checkpoint_of_other_data_or_another_objective_is_refused(data, folder, change):
    with pytest.raises(ValueError, match=r"was trained with clm on data .* use another output"):
        trainer(data, folder.parent, **change)


@pytest.mark.parametrize("fails", [".safetensors", "manifest.json"])
def test_a_full_disk_leaves_what_was_there(data, folder, monkeypatch, fails):
    again = trainer(data, folder.parent, max_steps=6)
    write = checkpoint._write_synced

    def full(path, content):
        if path.name.endswith(fails):
            path.write_bytes(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    monkeypatch.setattr(checkpoint, "_write_synced", full)
    with pytest.raises(OSError, match=r"step 6 was not saved: rank 0: .*No space left.*Earlier ones are as they were"):
        again.train()
    assert sorted(path.name for path in folder.iterdir()) == ["step-2", "step-4"]
    assert all(damages(path) == [] for path in steps(folder))
    monkeypatch.undo()
    again.save()
    assert newest(folder) == folder / "step-6"


def test_what_a_killed_attempt_left_is_ignored_and_overwritten(data, folder):
    for stale in ("step-6.tmp", "step-5.tmp"):
        shutil.copytree(folder / "step-4", folder / stale)
        (folder / stale / "half").write_bytes(b"x")
    shutil.copytree(folder / "step-2", folder / "step-0.old")
    assert newest(folder) == folder / "step-4" and numbers(folder) == [4, 2]
    trainer(data, folder.parent, max_steps=6).train()
    assert numbers(folder) == [6, 4, 2] and damages(folder / "step-6") == []
    assert {path.name for path in folder.iterdir()} == {"step-2", "step-4", "step-6"}


def test_prune_keeps_as_many_as_asked(data, tmp_path):
    trainer(data, tmp_path, save_every=1, max_steps=5, keep=2).train()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-4", "step-5"]


def train_for_ever(data, output):
    trainer(data, output, save_every=1, max_steps=10**6).train()


def test_a_process_killed_while_it_saves_leaves_a_sound_newest_checkpoint(data, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ds_pretrain.training.trainer"])
    chance, folder, reached = random.Random(5), tmp_path / "checkpoints", 0
    for _ in range(4):
        process = context.Process(target=train_for_ever, args=(data, tmp_path))
        process.start()
        limit = time.monotonic() + 120
        while max(numbers(folder), default=0) <= reached and time.monotonic() < limit:
            time.sleep(0.01)
        time.sleep(chance.random())
        process.kill()
        process.join()
        assert process.exitcode == -9
        found = newest(folder)
        assert found is not None and damages(found) == [] and found == steps(folder)[0]
        now = Snapshot(found).manifest["step"]
        assert now > reached
        reached = now


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_in_the_place_of_a_file_is_never_read(data, folder, tmp_path):
    """Even with a manifest made to fit it."""
    shutil.rmtree(folder / "step-2")
    path, went_off = next((folder / "step-4").glob("*.safetensors")), tmp_path / "went-off"
    path.write_bytes(pickle.dumps(Bomb(went_off)))
    manifest = checkpoint.read_manifest(folder / "step-4")
    manifest["files"] = [
        {"name": path.name, "bytes": path.stat().st_size, "xxh3_128": xxhash.xxh3_128_hexdigest(path.read_bytes())}
    ]
    seal = xxhash.xxh3_128_hexdigest(json.dumps(manifest, indent=1, sort_keys=True).encode())
    sealed = json.dumps({"manifest": manifest, "xxh3_128": seal}, indent=1, sort_keys=True)
    (folder / "step-4" / "manifest.json").write_text(sealed)
    assert damages(folder / "step-4") == []
    with pytest.raises(ValueError, match="not readable"):
        trainer(data, folder.parent)
    assert not went_off.exists()
    pickle.loads(path.read_bytes())  # the bomb works
    assert went_off.exists()


def test_a_missing_piece_is_refused(folder, monkeypatch):
    snapshot = Snapshot(folder / "step-4")
    name = max(snapshot.shapes, key=lambda name: math.prod(snapshot.shapes[name]))
    snapshot.index[name, "master"].pop()
    with pytest.raises((ValueError, IndexError)):
        snapshot.whole(name)
