"""From words on the command line to a Config, and from every mistake to one sentence."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cil import learning, run
from cil.command_line import describe, experiments, parse
from cil.config import Config, TrainerConfig

SLOW = {"torch", "avalanche", "pytorch_lightning", "wandb", "pandas", "matplotlib", "sklearn"}


def parsed(*arguments: str) -> Config:
    return parse("split_digits", arguments)[0]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence with which the command refuses these arguments."""
    assert run.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.endswith((".\n", "?\n"))
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("error: ").rstrip("\n")


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not refused here would train; that is no business of these tests."""

    def forbidden(*_: Any) -> None:
        raise AssertionError("this command line was taken for a good one")

    monkeypatch.setattr(learning, "_open_stream", forbidden)


def of_digits() -> Config:
    """What the schema says, but for what was picked for single methods, and two runs at a time."""
    path = Path(__file__).parent.parent / "configs" / "split_digits.yaml"
    shown = yaml.safe_load(path.read_text(encoding="utf-8"))
    return Config(tuned=shown["tuned"], trainer=TrainerConfig(jobs=2))


# --- good lines ---


def test_without_overrides_it_is_the_yaml_and_the_yaml_is_the_schema() -> None:
    assert parsed() == of_digits()


@pytest.mark.parametrize("spelling", [["--var.depth=6"], ["--var.depth", "6"]])
def test_an_override_in_both_spellings(spelling: list[str]) -> None:
    config = parsed(*spelling)
    assert config.var.depth == 6
    config.var.depth = Config().var.depth
    assert config == of_digits()


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("--methods=[var,joint]", "methods", ["var", "joint"]),
        ("--methods=joint", "methods", "joint"),
        ("--seeds=[0,1,2]", "seeds", [0, 1, 2]),
        ("--seeds=3", "seeds", 3),
        ("--stream.class_order=[1,0]", "stream.class_order", [1, 0]),
        ("--stream.class_order=null", "stream.class_order", None),
        ("--tokenizer.scales=[1, 2, 4]", "tokenizer.scales", [1, 2, 4]),
        ("--var.plasticity=copy", "var.plasticity", "copy"),
        ("--var.lr=1e-3", "var.lr", 1e-3),
        ("--var.lr=1", "var.lr", 1.0),
        ("--stream.augment=False", "stream.augment", False),  # as a W&B sweep writes it
        ("--stream.augment=false", "stream.augment", False),
        ("--wandb.entity=someone", "wandb.entity", "someone"),
        ("--runs=/somewhere/else", "runs", "/somewhere/else"),
    ],
)
def test_values_of_every_kind(argument: str, key: str, value: Any) -> None:
    found: Any = parsed(argument)
    for name in key.split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


def test_the_last_of_two_overrides_counts() -> None:
    assert parsed("--var.depth=6", "--var.depth=7").var.depth == 7


SPELLINGS = [
    ["--discriminative.lr=0.1"],
    ["--discriminative.lr", "0.1"],
    ["--discriminative={lr: 0.1}"],
]


def experiment(folder: Path) -> str:
    path = folder / "experiment.yaml"
    path.write_text(
        "discriminative: {lr: 0.5}\n"
        "tuned:\n"
        "  mas: {discriminative.mas_lambda: 3.0, discriminative.lr: 0.2}\n"
        "  ncm: {discriminative.lr: 0.4}\n"
        "  si: {discriminative.si_lambda: 10.0}\n"
    )
    return str(path)


def file(folder: Path, text: str) -> str:
    path = folder / f"{len(list(folder.iterdir()))}.yaml"
    path.write_text(text)
    return f"--config={path}"


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_what_is_asked_for_holds_for_methods_that_are_tuned_too(
    spelling: list[str], tmp_path: Path
) -> None:
    own = experiment(tmp_path)
    picks = file(tmp_path, "tuned: {mas: {discriminative.lr: 0.3}}")
    for line in ([picks, *spelling], [*spelling, picks]):
        config, _ = parse(own, line)
        assert config.discriminative.lr == 0.1
        assert config.tuned == {
            "mas": {"discriminative.mas_lambda": 3.0},
            "si": {"discriminative.si_lambda": 10.0},
        }
    both = "--tuned={mas: {discriminative.lr: 0.3}}"  # unless the same line asks for both
    config, _ = parse(own, [*spelling, both])
    assert config.tuned == {"mas": {"discriminative.lr": 0.3}}
    assert parse(own, ["--tuned={}"])[0].tuned == {}


@pytest.mark.parametrize("words", [1, 2])
def test_a_files_picks_are_laid_over_those_of_the_experiment(tmp_path: Path, words: int) -> None:
    picks = file(tmp_path, "tuned: {mas: {discriminative.lr: 0.3}, ewc: {discriminative.lr: 1}}")
    config, _ = parse(experiment(tmp_path), [picks] if words == 1 else picks.split("="))
    assert config.tuned == {
        "mas": {"discriminative.mas_lambda": 3.0, "discriminative.lr": 0.3},
        "ncm": {"discriminative.lr": 0.4},
        "si": {"discriminative.si_lambda": 10.0},
        "ewc": {"discriminative.lr": 1},
    }


def test_what_a_file_says_holds_for_methods_that_were_tuned_before(tmp_path: Path) -> None:
    own = experiment(tmp_path)
    plain = "discriminative: {lr: 0.7}\n"
    config, _ = parse(own, [file(tmp_path, plain + "tuned: {ncm: {discriminative.lr: 0.8}}")])
    assert config.discriminative.lr == 0.7
    assert config.tuned == {
        "mas": {"discriminative.mas_lambda": 3.0},
        "si": {"discriminative.si_lambda": 10.0},
        "ncm": {"discriminative.lr": 0.8},
    }
    picks = file(tmp_path, "tuned: {ncm: {discriminative.lr: 0.8}}")
    later = file(tmp_path, plain)  # two files, the second of which says it for all
    assert "ncm" not in parse(own, [picks, later])[0].tuned


def test_what_is_printed_is_what_would_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [experiment(tmp_path), "--discriminative.lr=0.1", "--print_config"]
    with pytest.raises(SystemExit):
        run.main(line)
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["discriminative"]["lr"] == 0.1
    assert printed["tuned"] == parse(line[0], line[1:2])[0].tuned
    assert "discriminative.lr" not in printed["tuned"]["mas"]


def test_fresh_is_no_part_of_the_config() -> None:
    assert parse("split_digits", ["--fresh"]) == (of_digits(), True)
    assert parse("split_digits", []) == (of_digits(), False)


def test_print_config_parses_back_to_the_same_config(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    overrides = ["--var.depth=6", "--stream.class_order=[1,0]", "--var.lr=1e-3", "--methods=joint"]
    with pytest.raises(SystemExit) as end:
        run.main(["split_digits", *overrides, "--print_config"])
    assert end.value.code == 0
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    assert parse(str(path), [])[0] == parsed(*overrides) != Config()
    assert parsed(f"--config={path}") == parsed(*overrides)


def test_a_yaml_may_leave_keys_out(tmp_path: Path) -> None:
    path = tmp_path / "short.yaml"
    path.write_text("# Short.\nvar:\n  depth: 2\n")
    config, _ = parse(str(path), [])
    assert config.var.depth == 2
    assert config.stream == Config().stream


# --- mistakes ---

SMALL = ["--stream.source=image_folder", "--stream.root=.", "--stream.image_size=8"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--var.dept=3"], ["no setting --var.dept", "did you mean --var.depth"]),
        (["--var.dept", "3"], ["no setting --var.dept", "did you mean --var.depth"]),
        (["--metods=[var]"], ["--metods", "did you mean --methods"]),
        (["--qqqqq=3"], ["no setting --qqqqq", "--help"]),
        (["--var={depth: 1, dpth: 3}"], ["command line", "var.dpth", "did you mean var.depth"]),
        (["--var.depth=abc"], ["command line", "var.depth", "abc", "a whole number"]),
        (["--var.depth", "abc"], ["var.depth", "abc", "a whole number"]),
        (["--var.depth=1.5"], ["var.depth", "1.5", "a whole number"]),
        (["--var.depth=null"], ["var.depth", "null", "a whole number"]),
        (["--var.depth=true"], ["var.depth", "a whole number"]),
        (["--var.depth"], ["--var.depth", "expected one argument"]),
        (["--var.lr=fast"], ["var.lr", "fast", "a number"]),
        (["--stream.augment=maybe"], ["stream.augment", "maybe", "true or false"]),
        (["--var=3"], ["var", "3", "a section of settings"]),
        (["--tokenizer.scales=3"], ["tokenizer.scales", "3", "a list of whole numbers"]),
        (["--tokenizer.scales=[1,a]"], ["tokenizer.scales", "a list of whole numbers"]),
        (["--stream.class_order=x"], ["stream.class_order", "list of whole numbers", "or null"]),
        (["--seeds=[a]"], ["seeds", "a list of whole numbers", "or a whole number"]),
        (["--seeds=[0,0]"], ["seeds", "each once"]),
        (["--seeds=[]"], ["seeds", "at least one"]),
        (["--seeds=-1"], ["seeds", "-1"]),
        (["--var.plasticity=adaptor"], ["var.plasticity", "adaptor", "embedding, adapter, trunk"]),
        (["--wandb.mode=on"], ["wandb.mode", "auto, online, offline, disabled"]),
        (["--trainer.accelerator=tpu"], ["trainer.accelerator", "auto, cpu, gpu"]),
        (
            ["--tuned={finetune: {discriminative.lr: [1,2]}}"],
            ["tuned.finetune gives discriminative.lr as [1, 2], which must be a number"],
        ),
        (["--tuned={ewc: {discriminative.lr: null}}"], ["discriminative.lr as null, which"]),
        (["--tuned={ewc: {discriminative.lr: discriminative.lr}}"], ["as discriminative.lr, wh"]),
        (["--trainer.workers=-1", "--fresh"], ["trainer.workers is -1", "give 0 to "]),
        (["--trainer.workers=100000"], ["trainer.workers is 100000", "give 0 to "]),
        (["--methods=[vra]"], ["no method 'vra'", "did you mean var"]),
        (["--methods=fintune"], ["no method 'fintune'", "did you mean finetune"]),
        (["--methods=qqqqq"], ["no method 'qqqqq'", "choose from var,"]),
        (["--methods=[]"], ["methods", "at least one"]),
        (["--methods=[var,var]"], ["methods", "each once"]),
        (
            [*SMALL, "--methods=[var,ewc]", "--discriminative.backbone=resnet18"],
            ["resnet18, which needs images of 16 px", "stream.image_size is 8: choose cnn"],
        ),
        (
            [*SMALL, "--methods=ewc", "--tuned={ewc: {discriminative.backbone: resnet50}}"],
            ["resnet50, which needs images of 16 px", "stream.image_size is 8: choose cnn"],
        ),
        (["--config=nowhere.yaml"], ["nowhere.yaml", "does not exist"]),
        (["extra"], ["'extra'", "--KEY=VALUE"]),
        (["-x"], ["'-x'", "--KEY=VALUE"]),
    ],
)
def test_a_mistake_on_the_command_line(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = refused(capsys, "split_digits", *arguments)
    for word in words:
        assert word.lower() in sentence.lower()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("var:\n  dept: 3\n", ["unknown key var.dept", "did you mean var.depth"]),
        ("vr:\n  depth: 3\n", ["unknown key vr.depth", "did you mean var.depth"]),
        ("method: [var]\n", ["unknown key method", "did you mean methods"]),
        ("qqqqq: 1\n", ["unknown key qqqqq", "--help"]),
        ("var:\n  depth: abc\n", ["var.depth", "abc", "a whole number"]),
        ("var:\n  plasticity: adaptor\n", ["var.plasticity", "adaptor", "one of embedding"]),
        ("var: 3\n", ["var", "3", "a section of settings"]),
        ("seeds: 3\nvar:\n", ["var", "null", "a section of settings"]),
        ("- 3\n", ["cannot be read as settings", "KEY: VALUE"]),
        ("var: [\n", ["cannot be read as settings"]),
        ("# Empty.\n", ["cannot be read as settings", "KEY: VALUE"]),
        ("", ["cannot be read as settings"]),
    ],
)
def test_a_mistake_in_a_yaml(
    text: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_text(text)
    for arguments in ([str(path)], [str(path), "--var.depth=2"]):
        sentence = refused(capsys, *arguments)
        for word in [str(path), *words]:
            assert word in sentence


def test_a_yaml_that_is_no_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_bytes(b"# Caf\xe9.\nvar:\n  depth: 2\n")
    assert f"{path} cannot be read as settings" in refused(capsys, str(path))
    assert "not UTF-8" in refused(capsys, "split_digits", f"--config={path}")
    assert describe(path).startswith("Caf")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("split_digit", ["no experiment 'split_digit'", "did you mean split_digits"]),
        ("qqqqq", ["no experiment 'qqqqq'", "choose one of split_cifar10, "]),
        ("nowhere.yaml", ["no experiment 'nowhere.yaml'"]),
        ("--methods=var", ["'--methods=var'", "experiment", "EXPERIMENT [--KEY=VALUE ...]"]),
    ],
)
def test_an_unknown_experiment(
    name: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = refused(capsys, name)
    for word in words:
        assert word in sentence


def test_a_mistake_ends_the_process_with_code_2_and_one_line() -> None:
    result = command("split_digits", "--var.dept=3")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == "error: There is no setting --var.dept: did you mean --var.depth?\n"


# --- help ---


def command(*arguments: str) -> "subprocess.CompletedProcess[str]":
    words = [sys.executable, "-m", "cil.run", *arguments]
    return subprocess.run(words, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [["--help"], ["split_digits", "--help"], []])
def test_help_waits_for_no_slow_import(arguments: list[str]) -> None:
    script = (
        "import sys; from cil import run\n"
        "try: run.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    words = [sys.executable, "-c", script, *arguments]
    result = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "usage: python -m cil.run" in result.stdout
    assert not SLOW & set(result.stderr.split())


def test_help_of_the_command_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--help", "-h"):
        assert run.main([flag]) == 0
        text = capsys.readouterr().out
        for line in ("python -m cil.run split_digits  ", "--methods=[var,joint]", "--fresh"):
            assert line in text


def test_help_of_an_experiment_holds_every_setting_its_sentence_and_its_value(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as end:
        run.main(["split_digits", "--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for setting in ("--var.depth", "--seeds", "--fresh", "--print_config", "--stream.class_order"):
        assert setting in text
    assert "Transformer blocks. (type: int, default: 3)" in text
    assert "(type: list[int], default: [1, 2, 3, 4])" in text


def test_alone_it_lists_every_experiment_in_one_line_each(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in experiments():
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert len(line.split()) > 5


def test_experiments_of_the_working_folder_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.yaml").write_text("# My own.\nvar:\n  depth: 2\n")
    monkeypatch.chdir(tmp_path)
    assert {"mine", "split_digits"} <= set(experiments())
    assert parse("mine", [])[0].var.depth == 2


def test_a_mistake_in_a_file_is_put_down_to_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("discriminative:\n  lrr: 0.3\n")
    sentence = refused(capsys, "split_digits", f"--config={path}", "--seeds=[0]")
    assert f"{path} has an unknown key discriminative.lrr" in sentence
