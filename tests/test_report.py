"""The page of an experiment, as text: what stands in it, where it leads, and what it refuses."""

import io
import itertools
import os
import re
import subprocess
import sys
import tomllib
from base64 import b64decode
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import finished
import pytest
from PIL import Image

from cil import run
from cil.errors import UserError
from cil.records import read_runs
from cil.report import page as page_module
from cil.report import pictures
from cil.report.__main__ import main
from cil.report.page import write_report
from cil.table import over_seeds, percent

ROOT = Path(__file__).parent.parent


class Page(HTMLParser):
    """The elements of a page: (tag, attributes, text directly in it), in their order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {k: v or "" for k, v in attributes}, []))

    def handle_data(self, data: str) -> None:
        if self.elements:
            self.elements[-1][2].append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes, _ in self.elements if name == tag]

    def texts(self, tag: str) -> list[str]:
        return ["".join(text).strip() for name, _, text in self.elements if name == tag]

    def text(self) -> str:
        return " ".join("".join("".join(text) for _, _, text in self.elements).split())

    def links(self) -> list[str]:
        """Those to files and folders, as paths beside the page."""
        return [unquote(a["href"]) for a in self.all("a") if not a["href"].startswith("#")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished.experiment(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page(write_report(folder))


def refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence with which the command refuses a folder."""
    assert main([str(folder)]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    return error


def test_it_shows_the_numbers_of_the_table(folder: Path, page: Page) -> None:
    numbers = over_seeds(read_runs(folder))
    shown = page.texts("a")
    for method in ("var-adapter", "finetune", "joint"):
        start = shown.index(method)
        expected = percent(numbers.loc[method, "last_accuracy"]).replace("±", "\u00a0±\u00a0")
        assert shown[start + 1] == expected
    assert shown.index("joint") < shown.index("var-adapter") < shown.index("finetune")
    text = page.text()
    assert "3 methods, 2 seeds, 5 finished runs" in text
    assert re.search(r"highest last accuracy is 99\.5.% \(joint\)", text)
    assert "methods that store no image, var-adapter reaches the most" in text


def test_every_number_leads_to_its_run_folder(folder: Path, page: Page) -> None:
    for view in read_runs(folder):
        link = f"{view.method}/seed{view.seed}/"
        assert page.links().count(link) == 1 + 10  # the row's own and each of its numbers
    ids = {attributes["id"] for _, attributes, _ in page.elements if "id" in attributes}
    inner = {a["href"][1:] for a in page.all("a") if a["href"].startswith("#")}
    assert inner <= ids
    assert {"runs-var-adapter", "runs-joint"} <= inner


def test_all_it_needs_is_in_it_and_all_it_links_to_is_there(page: Page) -> None:
    sources = [value for _, a, _ in page.elements for k, value in a.items() if k in SOURCES]
    assert sources
    assert all(source.startswith("data:image/") for source in sources)
    for tag in ("script", "link"):
        assert not any("src" in a or a.get("href", "data:,") != "data:," for a in page.all(tag))
    assert not re.findall(r"url\(|@import|https?://", page.path.read_text())
    for link in page.links():
        assert (page.path.parent / link).exists(), link


SOURCES = ("src", "srcset")


def test_a_page_elsewhere_leads_to_the_same_folders(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "some where" / "a.html"
    assert main([str(folder), f"--output={place}"]) == 0
    links = Page(place).links()
    assert links
    targets = {(place.parent / link).resolve() for link in links}
    assert (folder / "joint" / "seed0").resolve() in targets
    assert all(target.exists() for target in targets)


def test_names_are_text_and_never_code(folder: Path, page: Page, tmp_path: Path) -> None:
    assert len(page.all("script")) == 1
    assert "alert(1)" not in "".join(page.texts("script"))
    assert "<script>alert(1)</script>" in page.text()
    odd = tmp_path / '"><script>alert(2)</script>' / "javascript:alert(3)" / "seed0"
    finished.picture(finished.finish(odd, 0.5), "<img src=x onerror=alert(4)>")
    other = Page(write_report(odd.parent.parent))
    assert len(other.all("script")) == 1
    assert not any("onerror" in attributes for _, attributes, _ in other.elements)
    hrefs = [a["href"] for a in other.all("a")]
    assert any("alert%283%29" in href for href in hrefs)
    assert not any(href.startswith("javascript:") for href in hrefs)


def test_pictures_of_the_runs_say_what_they_show(page: Page) -> None:
    drawn, *_ = [image for image in page.all("img") if image["alt"].startswith("Images of 4")]
    assert "drawn by var-adapter, seed 0" in drawn["alt"]
    assert "12.5 %" in drawn["alt"]  # samples/drift
    (maps,) = [image for image in page.all("img") if image["alt"].startswith("Heat maps")]
    assert "first class group after each experience: 100, 90 %" in maps["alt"]
    (confusion,) = [image for image in page.all("img") if image["alt"].startswith("Which class")]
    assert "<script>alert(1)</script> for three, 2 images of 4" in confusion["alt"]
    curves = next(image for image in page.all("img") if "experiences learned" in image["alt"])
    assert "joint 99.5" in curves["alt"]
    (costs,) = [image for image in page.all("img") if "multiply-accumulates" in image["alt"]]
    assert "joint 99.5 %, 1.00 M and 20; var-adapter" in costs["alt"]
    assert all(image["alt"] for image in page.all("img"))
    headings = page.texts("h2")
    assert {"Samples", "Explanations", "Confusion", "Other figures"} <= set(headings)


def test_of_a_series_the_last_is_shown_and_the_others_are_linked(page: Page) -> None:
    captions = page.texts("figcaption")
    assert "samples_experience1.png" in captions
    assert "samples_experience0.png" not in captions
    assert "var-adapter/seed0/figures/samples_experience0.png" in page.links()
    assert "var-adapter/seed1/figures/" in page.links()


def test_large_pictures_become_small_and_the_page_has_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for method in ("a", "b"):
        place = finished.finish(tmp_path / "e" / method / "seed0", 0.5)
        finished.picture(place, "large", width=1600, noise=True)
    assert (place / "figures" / "large.png").stat().st_size > 3_000_000
    path = write_report(tmp_path / "e")
    assert path.stat().st_size < 2_500_000
    (one, other) = [a for a in Page(path).all("img") if a["alt"].startswith("large")]
    kind, data = one["src"].split(";base64,")
    assert kind == "data:image/webp"
    assert Image.open(io.BytesIO(b64decode(data))).width == pictures.WIDEST

    monkeypatch.setattr(pictures, "ALL_TOGETHER", int(1.5 * len(other["src"])))
    limited = Page(write_report(tmp_path / "e"))
    (shown,) = [a for a in limited.all("img") if a["alt"].startswith("large")]
    assert shown["alt"].startswith("large of a")
    assert "b/seed0/figures/large.png" in limited.links()


def test_a_large_matrix_is_a_picture(tmp_path: Path) -> None:
    many = finished.stream(
        class_names=[f"class {i}" for i in range(21)], experiences=[[i] for i in range(21)]
    )
    finished.finish(tmp_path / "e" / "a" / "seed0", 0.9, many)
    page = Page(write_report(tmp_path / "e"))
    (matrix,) = [a for a in page.all("img") if a["alt"].startswith("Accuracy matrix")]
    assert "between 12 and 100 per cent" in matrix["alt"]  # 0.9 ** 20
    assert not [a for a in page.all("table") if a.get("class") == "matrix"]


def test_matrices_are_means_over_seeds(page: Page) -> None:
    cells = [
        "".join(text).strip()
        for tag, attributes, text in page.elements
        if tag == "td" and "background" in attributes.get("style", "")
    ]
    # joint of one seed; var-adapter of .90 and .92; finetune of .1 twice
    assert cells == ["100", "99", "100", "100", "91", "100", "100", "10", "100"]


def test_what_a_reader_must_know_stands_above_the_table(page: Page, tmp_path: Path) -> None:
    text = page.text()
    assert "Unfinished: joint seed 1, 1 of 2 experiences learned" in text
    assert "Methods with fewer than 2 seeds: joint (1)." in text
    assert "cannot be compared" not in text
    finished.finish(tmp_path / "e" / "a" / "seed0", 0.5)
    facts = finished.stream(fingerprint="another", evaluated_on="validation")
    finished.finish(tmp_path / "e" / "b" / "seed0", 0.5, facts)
    other = Page(write_report(tmp_path / "e"))
    text = other.text()
    assert "did not all see the same stream" in text
    assert "evaluated on held-out training images" in text
    assert "another" in text
    assert "0123456789abcdef" in text
    assert not [image for image in other.all("img") if "multiply-accumulates" in image["alt"]]


def test_a_stream_cut_short_is_another_stream(tmp_path: Path) -> None:
    """As `--stream.stop_after` leaves it: with fewer class groups, and the same fingerprint."""
    folder = tmp_path / "e"
    finished.finish(folder / "finetune" / "seed0", 0.1)
    finished.finish(folder / "joint" / "seed0", 0.99)
    short = finished.stream(experiences=[[0, 1]])
    finished.finish(folder / "ewc" / "seed0", 0.5, short)
    page = Page(write_report(folder))
    text = page.text()
    assert "did not all see the same stream" in text
    assert "On the stream of joint, finetune: The highest last accuracy is 99.5" in text
    assert "ewc" in page.texts("a")
    (costs,) = [image["alt"] for image in page.all("img") if "multiply-accumulates" in image["alt"]]
    assert "joint 99.5 %" in costs
    assert "finetune 55.0 %" in costs
    assert "ewc" not in costs
    finished.finish(folder / "lwf" / "seed0", 0.5, short)
    costs = [a["alt"] for a in Page(write_report(folder)).all("img") if "accumulates" in a["alt"]]
    assert sorted("ewc" in alt for alt in costs) == [False, True]


def test_configuration_environment_and_stream_are_there(page: Page) -> None:
    pre = page.texts("pre")
    assert any("method: finetune" in text and "seed: 1" in text for text in pre)
    assert any("commit: c0ffee" in text for text in pre)
    assert any("likelihood_evaluations: 0.0" in text for text in pre)
    text = page.text()
    for fact in ("fedcba", "0123456789abcdef", "test images", "two & two, three", "commit: c0ffee"):
        assert fact in text


def test_the_same_runs_give_the_same_bytes(folder: Path, page: Page) -> None:
    before = page.path.read_bytes()
    assert write_report(folder).read_bytes() == before


def test_several_experiments_are_refused_by_name(tmp_path: Path, capsys) -> None:
    for name in ("one", "two"):
        finished.finish(tmp_path / name / "a" / "seed0", 0.5)
    error = refused(tmp_path, capsys)
    assert (
        f"of the experiments one, two: name the place of one, such as {tmp_path / 'one'}." in error
    )
    assert main([str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    assert (tmp_path / "two" / "report.html").exists()


def test_a_sweep_is_no_experiment_and_its_trials_are(tmp_path: Path, capsys) -> None:
    """Two settings, each with two seeds: none of their means is one over four seeds."""
    for number, (lr, seed) in enumerate(itertools.product([0.001, 0.01], [0, 1])):
        place = tmp_path / f"trial{number}" / "some_digits" / "finetune" / f"seed{seed}"
        finished.finish(place, 0.5, settings={"discriminative": {"lr": lr}})
    error = refused(tmp_path, capsys)
    assert "The runs of finetune differ in discriminative.lr, which is 0.001 in" in error
    assert error.endswith(f"such as {tmp_path / 'trial0'}.")
    assert not (tmp_path / "report.html").exists()
    assert main([str(tmp_path / "trial0")]) == 0


def cut_picture(run_folder: Path) -> None:
    finished.picture(run_folder, "cut")
    path = run_folder / "figures" / "cut.png"
    path.write_bytes(path.read_bytes()[:60])


def no_cost(run_folder: Path) -> None:
    path = run_folder / "summary.json"
    path.write_text(path.read_text().replace("learning_macs", "learning"))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut.png is damaged": cut_picture,
    "accuracy_matrix.csv is damaged": lambda run: (run / "accuracy_matrix.csv").write_text("x"),
    "summary.json is damaged": lambda run: (run / "summary.json").write_text("{"),
    "summary.json lacks learning_macs": no_cost,
    "No run in": lambda run: (run / "summary.json").unlink(),
    "There is no folder": lambda run: os.rename(run.parent.parent, run.parent.parent.parent / "z"),
    "stream.json is damaged": lambda run: (run / "stream.json").write_text("{}"),
    "report.html": lambda run: (run.parent.parent / "report.html").mkdir(),
}


@pytest.mark.parametrize("sentence", DAMAGES)
def test_what_cannot_be_read_or_written_ends_in_a_sentence(
    sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = finished.finish(tmp_path / "e" / "a" / "seed0", 0.5)
    DAMAGES[sentence](place)
    assert sentence in refused(tmp_path / "e", capsys)


def test_help_explains_and_waits_for_nothing() -> None:
    script = (
        "import sys; from cil.report.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: assert not {'pandas', 'matplotlib', 'jinja2'} & set(sys.modules)"
    )
    line = [sys.executable, "-c", script]
    result = subprocess.run(line, capture_output=True, text=True, check=True, cwd=ROOT)
    assert "python -m cil.report runs/split_digits" in result.stdout


def test_a_page_that_fails_costs_a_run_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run._write_page(folder)
    assert capsys.readouterr().out == f"report: {folder / 'report.html'}\n"
    for error in (UserError("One sentence."), RuntimeError("a fault of ours")):

        def fail(_: Path, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(page_module, "write_report", fail)
        run._write_page(folder)
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err == f"warning: the report was not written: {error}\n"


def test_the_templates_are_installed_with_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["cil"]
    packed = {path for pattern in patterns for path in (ROOT / "cil").glob(pattern)}
    assert set(page_module.TEMPLATES.iterdir()) <= packed
