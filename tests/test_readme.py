"""The commands that the README opens with, in small; and that what they install is all they need.

Nothing is installed here (that is `.ci/run`): the set-up half of each line is checked against
pyproject.toml, the other half is run as it stands.
"""

import ast
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from tiny import TINY, folders

from cil.command_line import experiments, parse
from cil.methods.registry import check_names, expand

SHOWN = {"--help", "--print_config", "--fresh"}
ROOT = Path(__file__).parent.parent
RUN = "pip install -e . && python -m cil.run split_digits"
TEST = "pip install -e '.[dev]' && pytest"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def commands() -> list[str]:
    """The lines of the README's fenced code blocks, in order."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [line.strip() for block in blocks for line in block.splitlines() if line.strip()]


def distributions(requirements: list[str]) -> set[str]:
    """`jsonargparse[signatures]>=4` -> jsonargparse"""
    return {re.split(r"[\[<>=!~; ]", name)[0].lower().replace("_", "-") for name in requirements}


def imported() -> set[str]:
    """Top-level packages that any file of cil imports, type checking aside."""
    names = set()
    for path in (ROOT / "cil").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.partition(".")[0])
    return names - {"cil"} - set(sys.stdlib_module_names)


def test_the_readme_opens_with_the_two_commands() -> None:
    assert commands()[:2] == [RUN, TEST]


def test_it_names_every_experiment() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in experiments() if f"`{name}`" not in text] == []


def test_every_package_that_is_imported_is_declared() -> None:
    owners = metadata.packages_distributions()
    extras = PROJECT["optional-dependencies"]
    declared = distributions(PROJECT["dependencies"] + extras["hub"] + extras["explain"])
    for package in imported() - {"triton"}:  # comes with torch where there may be a GPU
        names = {name.lower().replace("_", "-") for name in owners[package]}
        assert names & declared, f"cil imports {package}, so pyproject.toml must declare {names}"


def test_every_package_that_is_declared_is_imported() -> None:
    owners = metadata.packages_distributions()
    used = {name.lower().replace("_", "-") for package in imported() for name in owners[package]}
    # Avalanche imports distutils, which Python 3.12 dropped and setuptools keeps.
    assert distributions(PROJECT["dependencies"]) - used <= {"setuptools"}


def test_the_dev_extra_brings_what_the_gate_runs() -> None:
    tools = distributions(PROJECT["optional-dependencies"]["dev"])
    assert {"pytest", "ruff", "mypy"} <= tools
    assert PROJECT["requires-python"] == ">=3.11"


RUNS = [line for line in commands() if "-m cil.run split" in line and "torchrun" not in line]
OTHERS = re.compile(r"python -m (experiments\.\w+|cil\.report|cil\.sweep) ?(.*)")


@pytest.mark.parametrize("line", RUNS)
def test_our_parser_takes_every_run_of_the_readme(line: str) -> None:
    words = shlex.split(line.partition("-m cil.run ")[2], comments=True)
    config, _ = parse(words[0], [w for w in words[1:] if w not in SHOWN and "config" not in w])
    check_names(expand([config.methods] if isinstance(config.methods, str) else config.methods))


def test_every_option_of_the_readme_s_other_commands_exists(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [match for match in map(OTHERS.match, commands()) if match]
    helps: dict[str, str] = {}
    for module in dict.fromkeys(match[1] for match in found):
        monkeypatch.setattr(sys, "argv", [module, "--help"])
        for loaded in (module, f"{module}.__main__"):  # by another test: it is run afresh
            monkeypatch.delitem(sys.modules, loaded, raising=False)
        with pytest.raises(SystemExit) as end:
            runpy.run_module(module, run_name="__main__")
        assert end.value.code == 0
        helps[module] = capsys.readouterr().out
    assert len(helps) > 8
    for module, words in (match.groups() for match in found):
        for option in re.findall(r"--\w+(?=[= ]|$)", words.partition(" #")[0]):
            assert option in helps[module] or option == "--methods", f"{module} has no {option}"


@pytest.mark.integration
def test_the_first_command_in_small(tmp_path: Path) -> None:
    python, *words = shlex.split(RUN.partition(" && ")[2])
    assert python == "python"
    line = [sys.executable, *words, *TINY, *folders(tmp_path), "--stream.stop_after=2"]
    result = subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    methods = ("var", "finetune", "replay", "joint")
    first = [row.strip("│ ").partition(" ")[0].rstrip("*") for row in result.stdout.splitlines()]
    assert tuple(word for word in first if word in methods)[:4] == methods
    assert (tmp_path / "split_digits" / "results.csv").exists()
    assert "Traceback" not in result.stderr
    assert "Warning" not in result.stderr
