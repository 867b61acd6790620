"""Where commands print: what was asked for, and beside it what happens."""

import sys
from typing import Annotated

import typer
from rich.console import Console

out = Console(highlight=False, width=None if sys.stdout.isatty() else 120)  # a log is no 80 columns wide
err = Console(stderr=True, highlight=False)
Output = Annotated[str, typer.Argument(help="The output folder of a run, or of an import.")]
