"""From the command line and an experiment's YAML to a Config; every mistake becomes one sentence.

No import here may cost seconds: `--help` goes through it.
"""

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

import cil
from cil.config import Config
from cil.errors import UserError

set_parsing_settings(docstring_parse_attribute_docstrings=True)

Tuned = dict[str, dict[str, Any]]  # method -> setting -> value
USAGE = "python -m cil.run EXPERIMENT [--KEY=VALUE ...]"


def experiments() -> dict[str, Path]:
    """Experiment name -> its YAML: those of ./configs, and those that come with the source tree."""
    folders = [Path(cil.__file__).parent.parent / "configs", Path("configs")]
    files = [file for folder in folders for file in sorted(folder.glob("*.yaml"))]
    return {file.stem: file for file in files}


def describe(path: Path) -> str:
    """An experiment in one line: the first comment of its YAML."""
    first = path.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    return first.removeprefix("#").strip()


def find(experiment: str) -> Path:
    """The YAML of an experiment, by name or by path.

    Raises:
        UserError: there is none.
    """
    known = experiments()
    if experiment.startswith("-"):
        raise UserError(f"'{experiment}' stands where the experiment's name belongs: {USAGE}.")
    if experiment in known:
        return known[experiment]
    if experiment.endswith((".yaml", ".yml")) and Path(experiment).is_file():
        return Path(experiment)
    hint = near(experiment, known) or f"choose one of {', '.join(known) or 'none here'}."
    raise UserError(f"There is no experiment '{experiment}': {hint}")


def parse(experiment: str, arguments: Sequence[str]) -> tuple[Config, bool]:
    """An experiment's Config with `arguments` laid over it, and whether to start afresh.

    Files given with --config lie over the experiment in their order, what else is on the line over
    all of them. `--help` and `--print_config` print and exit.

    Raises:
        UserError: unknown experiment, unknown key or a value of the wrong type.
    """
    path = find(experiment)
    parser = _parser(path.stem)
    if {"-h", "--help"} & set(arguments):
        parser.default_config_files = [str(path)]  # so that the help shows this file's values
    files, line = _files_apart(arguments)
    files = [f"--config={path}", *files]
    # Each for itself first: a mistake is put down to where it is, and what is tuned needs to know.
    layers = [_parsed(parser, files[:1], str(path), alone=True)]
    layers += [_parsed(parser, [f], f.partition("=")[2], alone=True) for f in files[1:]]
    plain = [word for word in line if not word.startswith("--print_config")]
    asked = _parsed(parser, plain, "the command line", alone=True)
    _check_plain(asked.get("tuned") or {})
    tuned = _tuned(layers, asked, anew="tuned" in given(line))
    line = [*line, f"--tuned={json.dumps(tuned)}"]  # so that --print_config shows it
    parsed = _parsed(parser, [*files, *line], "the command line")
    values = parser.instantiate(parsed)
    return Config(**{field.name: values[field.name] for field in fields(Config)}), parsed.fresh


def _files_apart(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The --config=FILE among the arguments, and the other ones."""
    files: list[str] = []
    line: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--config" and (file := next(words, None)) is not None:
            word = f"--config={file}"
        (files if word.startswith("--config=") else line).append(word)
    return files, line


def _tuned(layers: Iterable[Namespace], line: Namespace, anew: bool) -> Tuned:
    """What is tuned for single methods, after all files and the line.

    Files add to what those below them have tuned. What a file or the line gives plainly was asked
    for later than that, and holds for every method. With `anew` the line says all that is tuned.
    """
    tuned: Tuned = {}
    for layer in (*layers, line):
        tuned = {} if anew and layer is line else _without(tuned, {key for key, _ in layer.items()})
        for method, own in (layer.get("tuned") or {}).items():
            tuned[method] = tuned.get(method, {}) | own
    return tuned


def _without(tuned: Tuned, keys: set[str]) -> Tuned:
    """What is tuned but for some settings, and methods for which nothing is left."""
    left = {m: {key: own[key] for key in own if key not in keys} for m, own in tuned.items()}
    return {method: own for method, own in left.items() if own or not tuned[method]}


def given(arguments: Sequence[str]) -> set[str]:
    """The keys that are asked for as --KEY=VALUE."""
    return {argument[2:].partition("=")[0] for argument in arguments if argument[:2] == "--"}


def _check_plain(tuned: Tuned) -> None:
    """Raises UserError where the line gives a list, a section or null for what is tuned.

    In its place jsonargparse leaves all the text of --tuned.
    """
    for method, own in tuned.items():
        for key, value in own.items():
            text = value if isinstance(value, str) and key in value else ""
            said = yaml.safe_load(text)
            if isinstance(said, dict) and key in (said.get(method) or {}):
                wrong = said[method][key]
                raise UserError(
                    f"tuned.{method} gives {key} as {'null' if wrong is None else wrong}, which "
                    "must be a number, a word, true or false."
                )


def near(word: str, known: Iterable[str]) -> str:
    """A hint at what was meant, or an empty string."""
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {matches[0]}?" if matches else ""


def _parser(name: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog=f"python -m cil.run {name}",
        usage=f"python -m cil.run {name} [--KEY=VALUE ...]",
        description="Run the methods of an experiment over its stream and print one table. "
        "Interrupted at any moment, the same line goes on where it stopped.",
        exit_on_error=False,
        allow_abbrev=False,  # --var.dept would set var.depth
    )
    parser.add_argument("--config", action="config", help="another YAML laid over the experiment's")
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="delete the records of the selected methods and seeds and start over",
    )
    parser.add_class_arguments(Config, fail_untyped=False)
    return parser


def _parsed(
    parser: ArgumentParser, arguments: Sequence[str], place: str, alone: bool = False
) -> Namespace:
    """What the arguments say; `alone`: nothing of what they leave out."""
    try:
        parsed = parser.parse_args(list(arguments), defaults=not alone)
    except ArgumentError as error:
        raise UserError(_sentence(str(error), parser, place)) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place} cannot be read as settings: its text, or that of a file it names, is not "
            "UTF-8."
        ) from error
    for name in (field.name for field in fields(Config) if field.name in parsed):
        if is_dataclass(_type(name)) and not isinstance(parsed[name], Namespace):
            raise UserError(_wrong(name, parsed[name], place))
    return parsed


def _sentence(message: str, parser: ArgumentParser, place: str) -> str:
    """jsonargparse's message in one sentence that names `place`, with the nearest existing key."""
    flags = [flag for flag in parser._option_string_actions if not flag.endswith("+")]
    if match := re.search(r"unrecognized arguments: (\S+)", message):
        flag = match[1].partition("=")[0]
        if not flag.startswith("--"):
            return f"'{flag}' was not understood: settings are written --KEY=VALUE."
        hint = near(flag, flags) or f"see `{parser.prog} --help` for the settings."
        return f"There is no setting {flag}: {hint}"
    if match := re.search(r"(?:Group '([\w.]+)' .*)?[Oo]ption '([\w.]+)'", message):
        key = ".".join(part for part in match.groups() if part)
        hint = near(key, [flag[2:] for flag in flags])
        hint = hint or f"see `{parser.prog} --help` for the settings."
        return f"{place} has an unknown key {key}: {hint}"
    if match := re.search(r'Parser key "([\w.]+)"', message):
        value = re.search(r"(?:Got value:|Given value:|Unable to load config) (.+)", message)
        if value:
            return _wrong(match[1], value[1], place)
        message = message.partition(":")[2]
    if "Unexpected config" in message:
        message = "there are no KEY: VALUE lines"
    detail = " ".join(message.split()).removesuffix(".")
    return f"{place} cannot be read as settings: {detail}."


def _wrong(key: str, value: Any, place: str) -> str:
    value = "null" if value in (None, "None") else value
    return f"{place} gives {key} as {value}, but it must be {_words(_type(key))}."


def _type(key: str) -> Any:
    """The declared type of a dotted key."""
    kind: Any = Config
    for name in key.split("."):
        kind = get_type_hints(kind)[name]
    return kind


def _words(kind: Any) -> str:
    """A type as a user would say it."""
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    lists = {int: "a list of whole numbers such as [1,2]", str: "a list of words such as [a,b]"}
    if kind in plain or kind is NoneType:
        return plain.get(kind, "null")
    if is_dataclass(kind):
        return "a section of settings"
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if get_origin(kind) is dict:
        return "settings by method such as {ewc: {discriminative.lr: 0.01}}"
    if get_origin(kind) is list:
        inner = get_args(kind)[0]
        return lists.get(inner, "a list of such lists as [[1,2],[3,4]]")
    return " or ".join(_words(part) for part in get_args(kind))
