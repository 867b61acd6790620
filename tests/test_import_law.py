"""The house stands only while its rooms keep to themselves: imports are read from the sources, nothing is executed."""

import ast
import sys
from pathlib import Path

import pytest

import ds_pretrain

ROOT = Path(ds_pretrain.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
MAY_IMPORT = {
    "core": set(),
    "objectives": {"core"},
    "data": {"core", "objectives"},
    "curation": {"core", "data"},
    "parallel": {"core"},
    "models": {"core", "parallel"},
    "interop": {"core", "objectives", "data", "parallel", "models", "training", "evaluation"},
    "planning": {"core", "objectives", "data", "parallel", "models", "training", "evaluation"},
    "training": {"core", "objectives", "data", "parallel", "models", "evaluation"},
    "evaluation": {"core", "objectives", "data", "parallel", "models", "training"},
    "sweep": {"core", "objectives", "data", "models", "parallel", "planning", "training", "evaluation"},
}
ROOMS = set(MAY_IMPORT)
ONLY_IN = {
    "torch.distributed": {"parallel", "training"},
    "deepspeed": {"training"},
    "megatron": {"parallel", "models"},
    "mpi4py": {"curation", "parallel"},
}


def room(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else ""


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_import_only_what_they_may(path):
    here = room(path)
    if here not in ROOMS:
        return
    others = {name.split(".")[1] for name in imported(path) if name.startswith("ds_pretrain.")} & ROOMS
    assert others - {here} <= MAY_IMPORT[here]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_libraries_stay_in_their_rooms(path):
    for library, rooms in ONLY_IN.items():
        if any(name == library or name.startswith(library + ".") for name in imported(path)):
            assert room(path) in rooms, f"{library} is imported in {path}"


def test_core_needs_torch_and_numpy_only():
    allowed = sys.stdlib_module_names | {"torch", "numpy", "ds_pretrain"}
    for path in FILES:
        if room(path) == "core":
            assert {name.split(".")[0] for name in imported(path)} <= allowed, path


def test_no_objective_is_named_where_layouts_live():
    from ds_pretrain.objectives import REGISTRY

    for path in FILES:
        if room(path) in {"parallel", "models", "training"}:
            words = {
                n.value
                for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(n, ast.Constant) and isinstance(n.value, str)
            }
            assert not words & set(REGISTRY), path


def test_the_law_knows_every_room():
    assert {room(path) for path in FILES} - {""} == ROOMS
