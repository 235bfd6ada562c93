"""Imports point one way, and the costly or delicate packages stay where they belong.

Every file is read as a syntax tree, so imports inside functions count as well.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "cil").rglob("*.py"))

# Part -> the parts it may import, besides itself. Folders are one part each; from top to bottom.
ALLOWED = {
    "sweep": {"run", "learning", "trial", "command_line", "config", "errors", "files", "registry",
              "records", "table", "parallel"},
    "own": {"learning", "command_line", "config", "errors", "methods", "registry", "records",
            "streams", "table"},
    "run": {"learning", "command_line", "config", "errors", "table", "records", "parallel",
            "report", "trial"},
    "learning": {"config", "errors", "registry", "methods", "environment", "protocol", "streams",
                 "records", "tracking", "parallel", "launch", "trial"},
    "report": {"figures", "table", "records", "metrics", "plots", "errors", "files"},
    "figures": {"results", "table", "plots", "errors"},
    "editing": {"results", "registry", "methods", "edit", "streams", "records", "plots", "config",
                "errors"},
    "table": {"records", "results", "metrics", "plots", "errors"},
    "results": {"records", "wandb_runs", "errors"},
    "protocol": {"config", "errors", "methods", "streams", "records", "tracking", "metrics",
                 "parallel", "explain", "drift", "showing"},
    "showing": {"config", "methods", "streams", "records", "tracking", "plots", "explain", "drift"},
    "robustness": {"config", "errors", "files", "cache", "registry", "methods", "streams",
                   "records"},
    "adversarial": {"config", "errors", "methods", "ood", "records"},
    "ood": {"config", "errors", "files", "cache", "registry", "methods", "records"},
    "drift": {"explain", "plots"},
    "explain": {"models", "errors"},
    "insertion_deletion": {"errors"},
    "registry": {"command_line", "config", "errors", "methods", "streams"},
    "methods": {"config", "errors", "files", "cache", "streams", "classify", "models", "parallel",
                "generate"},
    "edit": {"generate", "models", "errors"},
    "generate": {"models", "errors"},
    "sample_metrics": {"errors"},
    "classify": {"models", "errors"},
    "models": {"errors"},
    "streams": {"config", "errors", "files", "cache", "parallel"},
    "tracking": {"wandb_access", "wandb_runs", "records", "errors", "files", "trial"},
    "wandb_runs": {"wandb_access", "errors"},
    "trial": {"errors"},
    "wandb_access": {"errors"},
    "records": {"errors", "files"},
    "cache": {"files", "parallel"},
    "files": {"errors"},
    "environment": {"config"},
    "launch": {"parallel", "config", "errors"},
    "parallel": {"config", "errors"},
    "command_line": {"config", "errors"},
    "plots": set(),
    "metrics": set(),
    "config": set(),
    "errors": set(),
}  # fmt: skip

# Package -> the files (or folders) that alone may import it.
CONFINED = {
    "wandb": {"tracking.py", "wandb_runs.py"},
    "captum": {"adversarial.py"},
    "avalanche": {"streams/", "methods/avalanche_plugins.py", "methods/avalanche_strategies.py"},
    "jsonargparse": {"command_line.py"},
    "pytorch_lightning": {"methods/"},
    "matplotlib": {"plots/", "records/", "streams/glyphs.py"},
    "rich": {"table.py"},
    "jinja2": {"report/"},
    "sklearn": {"streams/", "ood.py", "sweep/"},  # an AUROC; a Gaussian process
    "torchvision": {"streams/", "models/backbones.py"},  # its ResNets, rather than our own
    "huggingface_hub": {"models/official.py"},
}
# What a model may import: it knows no Lightning, no configuration and no files.
OF_MODELS = {"torch", "torchvision", "triton", "einops", "numpy", "math", "collections",
             "dataclasses", "typing", "copy", "functools", "contextlib", "cil"}  # fmt: skip


def imported(path: Path) -> Iterator[str]:
    """Dotted names that a file imports anywhere; `from cil import metrics` gives cil.metrics."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively: write the full name"
            names = [alias.name for alias in node.names]
            yield from (f"cil.{n}" for n in names) if node.module == "cil" else [node.module or ""]


def part(name: str) -> str | None:
    """The part a module of cil belongs to; the registry stands above the methods it builds."""
    words = name.split(".")
    if words[0] != "cil" or name in ("cil", "cil.__version__"):
        return None
    return "registry" if words[1:3] == ["methods", "registry"] else words[1]


def module(path: Path) -> str:
    words = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(word for word in words if word != "__init__")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "cil")))
def test_imports_point_one_way(path: Path) -> None:
    here = part(module(path))
    if here is None:
        assert not [name for name in imported(path) if part(name)]
        return
    assert here in ALLOWED, f"{path} is a new part: give it a line in the table"
    used = {part(name) for name in imported(path)} - {None, here}
    assert used <= ALLOWED[here], f"{path} may not import {used - ALLOWED[here]}"


def test_the_table_itself_has_no_way_back() -> None:
    def below(name: str, above: tuple[str, ...] = ()) -> None:
        assert name not in above, f"{' -> '.join([*above, name])} goes round"
        for lower in ALLOWED[name]:
            below(lower, (*above, name))

    for name in ALLOWED:
        below(name)
    parts = {part(module(path)) for path in FILES} - {None}
    assert parts == set(ALLOWED), "the table holds the parts that exist"


@pytest.mark.parametrize("package", CONFINED)
def test_a_package_stays_where_it_belongs(package: str) -> None:
    places = CONFINED[package]
    users = {
        str(path.relative_to(ROOT / "cil"))
        for path in FILES
        if package in {name.partition(".")[0] for name in imported(path)}
    }
    strangers = {user for user in users if not any(user.startswith(place) for place in places)}
    assert not strangers
    assert users, f"nothing imports {package} any more: take it out of the table"


def test_models_know_no_lightning_no_configuration_and_no_files() -> None:
    for path in FILES:
        if part(module(path)) == "models" and path.name != "official.py":  # it reads files
            used = {name.partition(".")[0] for name in imported(path)}
            assert used <= OF_MODELS, f"{path} imports {used - OF_MODELS}"
            calls = [node.func for node in ast.walk(ast.parse(path.read_text()))
                     if isinstance(node, ast.Call)]  # fmt: skip
            names = {ast.unparse(call) for call in calls}
            assert not names & {"open", "torch.load", "torch.save"}, f"{path} touches files"
