"""Peak memory of import and export at several sizes of a model, beside the sizes of the model and of its largest tensor.

    pip install transformers
    python benchmarks/interop_memory.py

Each command is a process of its own, watched every few milliseconds. Memory is what the process holds by itself (anonymous
pages), less what it holds before the first tensor; pages of mapped files are the system's to take back and are not counted.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

SIZES = {"25M": (6, 512), "110M": (12, 768), "400M": (24, 1024)}
"""Layers and width of LLaMA-shaped models with 32,000 ids."""
VOCABULARY = 32_000
POLL = 0.005
MB = 1e6


class Watched(NamedTuple):
    """What a command took: seconds, and the most anonymous memory in bytes."""

    seconds: float
    peak: int


def main(sizes: Annotated[str, typer.Option(help=f"Of {', '.join(SIZES)}, comma-separated.")] = ",".join(SIZES)) -> None:
    """Write a folder of each size, import it, export it."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(
        f"{platform.machine()}, Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in ("ds_pretrain", "torch", "transformers", "safetensors"))
    )
    empty = watch("-c", "import ds_pretrain.cli, ds_pretrain.interop.commands, ds_pretrain.training.checkpoint").peak
    table = Table(
        "model", "parameters", "fp32, MB", "largest tensor, MB", "", "peak, MB", "of the model", "largest tensors", "s"
    )
    for name in sizes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            count, largest = made(*SIZES[name], Path(folder) / "hf")
            commands = {
                "import": ("-m", "ds_pretrain", "import", f"{folder}/hf", "-o", f"{folder}/run"),
                "export": ("-m", "ds_pretrain", "export", f"{folder}/run", "-o", f"{folder}/out"),
            }
            for what, command in commands.items():
                found = watch(*command)
                held = max(0, found.peak - empty)
                sides = (f"{count:,}", f"{4 * count / MB:,.0f}", f"{4 * largest / MB:,.0f}")
                shares = (f"{held / (4 * count):.2f}", f"{held / (4 * largest):.1f}")
                table.add_row(name, *sides, what, f"{held / MB:,.0f}", *shares, f"{found.seconds:.1f}")
    console.print(table)


def made(layers: int, width: int, folder: Path) -> tuple[int, int]:
    """A random model in a folder; its parameters, and the elements of its largest tensor."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=width * 8 // 3 // 64 * 64, num_hidden_layers=layers,
        num_attention_heads=width // 64, max_position_embeddings=1024,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="200MB")
    sizes = [parameter.numel() for parameter in model.parameters()]
    return sum(sizes), max(sizes)


def watch(*arguments: str) -> Watched:
    """Run Python and look at its memory until it ends. RuntimeError if it fails."""
    started, peak = time.monotonic(), 0
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(POLL)
        if process.returncode:
            raise RuntimeError(f"{' '.join(arguments)}: {process.stdout.read() if process.stdout else ''}")
    return Watched(time.monotonic() - started, peak)


def anonymous(process: int) -> int:
    """Bytes of anonymous memory of a process; 0 where it is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


if __name__ == "__main__":
    typer.run(main)
