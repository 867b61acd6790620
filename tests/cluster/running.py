"""A small run for clusters, and what it is to be compared with."""

import json

RUN = {
    "model": {"layers": 2, "hidden": 32, "heads": 4, "dropout": 0.1, "attention_dropout": 0.0},
    "batch": {"global_size": 8, "seq_len": 64},
    "optimizer": {"lr": 3e-3, "warmup_steps": 2},
    "deepspeed": {"config": "zero1_fp32"},
    "train": {"max_steps": 60, "save_every": 10, "watchdog_seconds": 60},
}


def losses(out):
    """By step, as far as the run is."""
    lines = (out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").exists() else []
    found = (json.loads(line) for line in lines if line.endswith("}"))
    return {line["step"]: line["loss"] for line in found if "lr" in line}


def unbroken(out, expected):
    """Whether every step has the loss that one process has."""
    found = losses(out)
    return found.keys() == expected.keys() and all(abs(found[step] / expected[step] - 1) < 1e-5 for step in found)
