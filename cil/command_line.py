"""From the command line and an experiment's YAML to a Config; every mistake becomes one sentence.

No import here may cost seconds: `--help` goes through it.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

import cil
from cil.config import Config
from cil.errors import UserError

set_parsing_settings(docstring_parse_attribute_docstrings=True)

USAGE = "python -m cil.run EXPERIMENT [--KEY=VALUE ...]"


def experiments() -> dict[str, Path]:
    """Experiment name -> its YAML: those of ./configs, and those that come with the source tree."""
    folders = [Path(cil.__file__).parent.parent / "configs", Path("configs")]
    files = [file for folder in folders for file in sorted(folder.glob("*.yaml"))]
    return {file.stem: file for file in files}


def describe(path: Path) -> str:
    """An experiment in one line: the first comment of its YAML."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip()


def find(experiment: str) -> Path:
    """The YAML of an experiment, by name or by path.

    Raises:
        UserError: there is none.
    """
    known = experiments()
    if experiment in known:
        return known[experiment]
    if experiment.endswith((".yaml", ".yml")) and Path(experiment).is_file():
        return Path(experiment)
    hint = near(experiment, known) or f"choose one of {', '.join(known) or 'none here'}"
    raise UserError(f"There is no experiment '{experiment}': {hint}.")


def parse(experiment: str, arguments: Sequence[str]) -> tuple[Config, bool]:
    """An experiment's Config with `arguments` laid over it, and whether to start afresh.

    `--help` and `--print_config` print and exit.

    Raises:
        UserError: unknown experiment, unknown key or a value of the wrong type.
    """
    path = find(experiment)
    parser = _parser(path.stem)
    if {"-h", "--help"} & set(arguments):
        parser.default_config_files = [str(path)]  # so that the help shows this file's values
    try:
        parsed = parser.parse_args([f"--config={path}", *arguments])
    except ArgumentError as error:
        raise UserError(_sentence(str(error), parser, path)) from error
    values = parser.instantiate(parsed)
    config = Config(**{field.name: values[field.name] for field in fields(Config)})
    return config, parsed.fresh


def near(word: str, known: Any) -> str:
    """A hint at what was meant, or an empty string."""
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {matches[0]}?".removesuffix("?") if matches else ""


def _parser(name: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog=f"python -m cil.run {name}",
        usage=f"python -m cil.run {name} [--KEY=VALUE ...]",
        description="Run the methods of an experiment over its stream and print one table. "
        "Interrupted at any moment, the same line goes on where it stopped.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="another YAML laid over the experiment's")
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="delete the records of the selected methods and seeds and start over",
    )
    parser.add_class_arguments(Config, fail_untyped=False)
    return parser


def _sentence(message: str, parser: ArgumentParser, path: Path) -> str:
    """jsonargparse's message in one sentence, with the nearest existing key or value."""
    keys = [key for action in parser._actions for key in action.option_strings]
    if match := re.search(r"unrecognized arguments: (\S+)", message):
        flag = match[1].partition("=")[0]
        if not flag.startswith("--"):
            return f"'{flag}' was not understood: settings are written --KEY=VALUE."
        hint = near(flag, keys) or "see --help for the settings"
        return f"There is no setting {flag}: {hint}."
    if match := re.search(r"(?:Group '([\w.]+)' .*)?option '([\w.]+)'", message):
        key = ".".join(part for part in match.groups() if part)
        hint = near(f"--{key}", keys).replace("--", "") or "see --help for the settings"
        return f"{path} has an unknown key {key}: {hint}."
    if match := re.search(r'Parser key "([\w.]+)"', message):
        wanted = re.search(r"(?:Expected an? |Subtypes: )(.+)", message)
        value = re.search(r"(?:Got value|Given value): (.+)", message)
        if wanted and value:
            return f"{match[1]} is {value[1]}, but must be {_kind(wanted[1])}."
    return " ".join(message.split())


def _kind(annotation: str) -> str:
    """A type as jsonargparse prints it, in words."""
    annotation = annotation.partition(". Got value")[0]
    annotation = re.sub(r"<class '(\w+)'>", r"\1", annotation)
    if choices := re.search(r"typing\.Literal\[(.+)\]", annotation):
        return f"one of {choices[1]}"
    for shape, words in (("[list[int], ", "a list of numbers or "), ("[list[str], ", "a list or ")):
        annotation = annotation.replace(shape, words)
    names = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
    names |= {"list[int": "a list of whole numbers such as [0,1]", "NoneType": "null"}
    head, _, last = annotation.rstrip("].").rpartition(" ")
    return f"{head} {names.get(last, last)}".strip()
