"""Method names: what they are built from and which settings they depend on. Imports are lazy."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from cil.command_line import near
from cil.config import (
    Config,
    DiffusionConfig,
    DiscriminativeConfig,
    SamplesConfig,
    StreamConfig,
    TokenizerConfig,
    TrainerConfig,
    VARConfig,
)
from cil.errors import UserError
from cil.methods.recipes import RECIPES

PLASTICITIES: tuple[str, ...] = get_args(VARConfig.__annotations__["plasticity"])
DISCRIMINATIVE = tuple(RECIPES)
# Sections whose settings belong to methods.
TUNABLE = ("tokenizer", "var", "diffusion", "discriminative")
KINDS = ("var", "diffusion")  # each is, under its bare name, one of its plasticities
PLASTIC = tuple(f"{kind}-{plasticity}" for kind in KINDS for plasticity in PLASTICITIES)
GENERATIVE = (*KINDS, *PLASTIC)
NAMES = (*GENERATIVE, *DISCRIMINATIVE)
# Names that stand for several methods.
SETS = {
    "all": (*PLASTIC, *DISCRIMINATIVE),
    "generative": PLASTIC,
    "discriminative": DISCRIMINATIVE,
    "exemplar_free": (*PLASTIC, *(n for n, r in RECIPES.items() if r.exemplar_free)),
}


def expand(names: list[str]) -> list[str]:
    """The methods that `names` stand for, some of which may be the names of sets, each once."""
    return list(dict.fromkeys(m for name in names for m in SETS.get(name, (name,))))


def check_names(names: list[str]) -> None:
    """Raises UserError when there is no such method, or one is named twice, or none is."""
    for name in names:
        known = (*NAMES, *SETS)
        if name not in known:
            hint = near(name, known) or f"choose from {', '.join(known)}."
            raise UserError(f"There is no method '{name}': {hint}")
    if not names or len(set(names)) < len(names):
        raise UserError(f"methods is {names}: name at least one, and each once.")


def check_seeds(seeds: list[int]) -> None:
    """Raises UserError when a seed is out of range, or one is named twice, or none is."""
    if not seeds or len(set(seeds)) < len(seeds) or not all(0 <= s < 2**32 for s in seeds):
        raise UserError(f"seeds is {seeds}: give at least one from 0 to {2**32 - 1}, each once.")


def check_samples(samples: SamplesConfig) -> None:
    """Raises UserError for numbers that nothing can be drawn with."""
    for key, least, most in (("per_class", 0, 1000), ("guidance", 0, 100), ("steps", 1, 1000)):
        value = getattr(samples, key)
        if not least <= value <= most:
            raise UserError(f"samples.{key} is {value}: give {least} to {most}.")


def check_batches(names: list[str], config: Config, devices: int) -> None:
    """Raises UserError when a batch cannot be shared evenly by devices that learn together."""
    kinds = dict.fromkeys(_kind(name) for name in names if name in GENERATIVE)
    for section in ("tokenizer", *kinds) if kinds else ():
        size = getattr(config, section).batch_size
        if size % devices:
            raise UserError(
                f"{section}.batch_size is {size}, which {devices} devices cannot share evenly: "
                f"give a multiple of {devices}."
            )


def check_sides(names: list[str], config: Config) -> None:
    """Raises UserError for images too small for a backbone, where the settings alone say so.

    `build` says it of any stream, but of a folder only once all its images have been read.
    """
    size = config.stream.image_size
    for name in names:
        if name not in DISCRIMINATIVE or size is None:
            continue
        backbone = tuned(name, config).discriminative.backbone
        if backbone not in ("auto", "cnn"):  # or this import's seconds would be for nothing
            from cil.methods.checks import check_backbone

            check_backbone(backbone, size, f"stream.image_size is {size}")


def settings(name: str, config: Config, seed: int) -> dict[str, Any]:
    """The settings that a run of this method depends on: what must not change on resuming."""
    config = tuned(name, config)
    sections = {"seed": seed, "method": name, "stream": asdict(config.stream)}
    if name in DISCRIMINATIVE:
        own = asdict(config.discriminative)
        return sections | {"discriminative": {k: own[k] for k in RECIPES[name].settings(own)}}
    own = asdict(_generative(name, config))
    if not own.get("cca_steps"):  # how to align means nothing where nothing is aligned
        own = {k: v for k, v in own.items() if not k.startswith("cca_")}
    return sections | {"tokenizer": asdict(config.tokenizer), _kind(name): own}


def is_of(settings: Mapping[str, Any], kind: str) -> bool:
    """Whether these are the settings of a "generative" or of a "discriminative" method of cil."""
    sections = KINDS if kind == "generative" else (kind,)
    return any(section in settings for section in sections)


def build(name: str, config: Config, stream: Any) -> Any:
    """A method, ready for the first experience of `stream`.

    Raises:
        UserError: its settings do not fit each other or the stream's images.
    """
    from cil.methods.training import find_device

    config = tuned(name, config)
    device, cache = find_device(config.trainer), Path(config.cache)
    if name in DISCRIMINATIVE:
        from cil.methods.discriminative import Discriminative

        own, trainer = config.discriminative, config.trainer
        show = trainer.progress
        return Discriminative(
            name, stream, own, cache, device=device, trainer=trainer, show_progress=show
        )
    method, chosen = _generative_method(name), _generative(name, config)
    return method(name, stream, config.tokenizer, chosen, config.trainer, cache)


def _generative_method(name: str) -> Any:
    if _kind(name) == "var":
        from cil.methods.var import VARMethod

        return VARMethod
    from cil.methods.diffusion import DiffusionMethod

    return DiffusionMethod


def tuned(name: str, config: Config, place: str | None = None) -> Config:
    """The settings with those laid over them that `config.tuned` has for this method alone.

    `place` is where messages say that these stand.

    Raises:
        UserError: there is no such setting, the method does not read it, or its value is of another
            type or none of those to choose from.
    """
    place = place or f"tuned.{name}"
    sections: dict[str, dict[str, Any]] = {}
    for key, value in config.tuned.get(name, {}).items():
        section, _, field = key.partition(".")
        own = getattr(config, section, None)
        if section not in TUNABLE or not hasattr(own, field):
            raise UserError(f"{place} names the setting {key}, which is none of a method.")
        if not _reads(name, section, field):
            raise UserError(f"{place} names the setting {key}, which {name} does not read.")
        hint = get_type_hints(type(own))[field]
        choices = _choices(hint)
        kind = type(getattr(own, field))
        if kind is float and type(value) is int:
            value = float(value)
        listed = type(value) is list and any(get_origin(part) is list for part in get_args(hint))
        if choices and value not in choices and not listed:
            wanted = f"one of {', '.join(choices)}"
            raise UserError(f"{place} gives {key} as {value}, which must be {wanted}.")
        if not choices and type(value) is not kind:
            raise UserError(f"{place} gives {key} as {value}, which must be {kind.__name__}.")
        sections.setdefault(section, {})[field] = value
    return replace(config, **{n: replace(getattr(config, n), **v) for n, v in sections.items()})


def _reads(name: str, section: str, field: str) -> bool:
    """Whether a method's run depends on a setting of one of the `TUNABLE` sections."""
    if name in DISCRIMINATIVE:
        return section == "discriminative" and field in RECIPES[name].settings([field])
    if field == "plasticity" and name in PLASTIC:  # its name says that
        return False
    return section in ("tokenizer", _kind(name))


def _choices(kind: Any) -> tuple[str, ...]:
    """The words that a setting declared as `kind` may be; none if it may be others."""
    if get_origin(kind) is Literal:
        words: tuple[str, ...] = get_args(kind)
        return words
    return tuple(word for part in get_args(kind) for word in _choices(part))


def check_tuned(config: Config) -> None:
    """Raises UserError when `tuned` names a method or a setting that does not exist."""
    for name in config.tuned:
        check_names([name])
        if name in SETS:
            raise UserError(f"tuned names {name}, which is many methods: name each by its own.")
        tuned(name, config)


# Settings of classification alone, which a finished method can be asked by instead of its own.
_CLASSIFICATION = {
    "var": ("schedule", "smoothing", "smoothing_samples", "smoothing_mean", "smoothing_sigma"),
    "diffusion": ("schedule",),
}


def asked_by(run: Any, values: Mapping[str, Any]) -> Any:
    """A `cil.records.RunView` whose method will classify by other settings than its own.

    `values` are settings of classification as SECTION.KEY, of which those of other kinds of methods
    than the run's are passed over.

    Raises:
        UserError: a setting is none of classification, or its value none that it can have.
    """
    for key in values:
        section, _, field = key.partition(".")
        if field not in _CLASSIFICATION.get(section, ()):
            known = [f"{section}.{k}" for section, own in _CLASSIFICATION.items() for k in own]
            hint = near(key, known) or f"choose from {', '.join(known)}."
            raise UserError(f"{key} is no setting of classification: {hint}")
    kind = _kind(run.method)
    own = {key: value for key, value in values.items() if key.partition(".")[0] == kind}
    if not own or kind not in run.config:
        return run
    config = replace(_learned_with(run), tuned={run.method: own})
    asked = getattr(tuned(run.method, config, place="--set"), kind)
    if asked.schedule == "adaptive" and asked != getattr(config, kind):
        raise UserError(
            f"{run.folder} has fitted margins for its own copies of an image alone, or none at "
            "all, so that var.schedule cannot be adaptive: choose varc or a_varc."
        )
    return replace(run, config={**run.config, kind: asdict(asked)})


def _learned_with(run: Any) -> Config:
    """The settings of a recorded run; UserError where they are not today's."""
    kinds = {"stream": StreamConfig, "tokenizer": TokenizerConfig, "var": VARConfig}
    kinds |= {"diffusion": DiffusionConfig, "discriminative": DiscriminativeConfig}
    try:
        return Config(**{n: kind(**run.config[n]) for n, kind in kinds.items() if n in run.config})
    except TypeError:
        raise _of_another_version(run) from None


def _of_another_version(run: Any) -> UserError:
    return UserError(f"{run.folder} was written by another version of cil: use that.")


def restore(run: Any, trainer: TrainerConfig, cache: Path) -> tuple[Any, Any]:
    """A finished run's method as it was at the end, and the stream it learned.

    `run` is a `cil.records.RunView`; `cache` is the folder of what is made once (scans, glyphs).

    Raises:
        UserError: its checkpoint is damaged, another version of cil wrote it, or its images are not
            there.
    """
    from cil.streams import open_stream

    if run.method not in NAMES:
        raise UserError(f"{run.folder} is of a method of your own, which cil cannot build.")
    config = replace(_learned_with(run), trainer=trainer)
    stream = open_stream(config.stream, cache)
    if stream.fingerprint != run.stream["fingerprint"]:
        raise UserError(
            f"The images of {stream.name} are not those that {run.folder} learned (their "
            f"fingerprints are {stream.fingerprint} and {run.stream['fingerprint']})."
        )
    method, state = build(run.method, config, stream), run.state()
    try:
        method.load_state(state)
    except KeyError:  # parts that are not today's
        raise _of_another_version(run) from None
    except RuntimeError as error:
        if "Error(s) in loading state_dict" not in str(error):  # out of memory, for one
            raise
        raise _of_another_version(run) from None  # names or shapes that are not today's
    return method, stream


def _kind(name: str) -> str:
    """Of a generative method: the section of its settings."""
    return name.partition("-")[0]


def _generative(name: str, config: Config) -> Any:
    """`var-copy` is `var` with that plasticity, whatever the configuration says."""
    own = getattr(config, _kind(name))
    return replace(own, plasticity=name.partition("-")[2] or own.plasticity)
