"""The page of an experiment in a browser: it opens, sorts, fits a phone, and asks no network.

A Chromium that is on the machine is used; without one these tests are skipped.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import finished
import pytest

from cil.report.page import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: apt-get install chromium"),
]

# The least contrast of any text with what is behind it, and where (WCAG 2.1, 1.4.3).
CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return canvas.getImageData(0, 0, 1, 1).data;
  };
  const light = (colour) => {
    const [r, g, b] = [...rgba(colour)].map((v) => v / 255)
      .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (rgba(colour)[3] === 255) return colour;
    }
    return "white";
  };
  document.querySelectorAll("details").forEach((each) => { each.open = true; });
  let least = [99, ""];
  for (const element of document.body.querySelectorAll("*")) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || element.tagName === "SCRIPT") continue;
    const pair = [light(getComputedStyle(element).color), light(behind(element))];
    const contrast = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    if (contrast < least[0]) least = [contrast, element.outerHTML.slice(0, 99)];
  }
  return least;
}"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(finished.experiment(tmp_path_factory.mktemp("browser")))


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Opened:
    """A page in a window; said: its console and errors, asked: addresses that it requested."""

    def __init__(self, browser: "playwright.Browser", path: Path, width: int, scheme: str) -> None:
        size = {"width": width, "height": 800}
        self.context = browser.new_context(viewport=size, color_scheme=scheme)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())

    def column(self, index: int) -> list[str]:
        cells = self.page.locator(f"#results-table tbody tr > :nth-child({index + 1})")
        return [text.strip().rstrip("*") for text in cells.all_inner_texts()]

    def sorted_by(self) -> dict[str, str]:
        """Heading -> direction, of the results."""
        headers = self.page.locator("#results-table th[scope=col]").all()
        found = {h.inner_text().strip(): h.get_attribute("aria-sort") or "" for h in headers}
        return {heading: how for heading, how in found.items() if how != "none"}


@pytest.fixture
def opened(browser: "playwright.Browser", path: Path, request: pytest.FixtureRequest):
    """The page at 1280 px in light colours, or with the parameters (width, scheme)."""
    width, scheme = getattr(request, "param", (1280, "light"))
    window = Opened(browser, path, width, scheme)
    yield window
    window.context.close()


def test_it_opens_without_errors_and_asks_for_nothing(opened: Opened, path: Path) -> None:
    opened.page.wait_for_load_state("networkidle")
    assert opened.said == []
    assert [url for url in opened.asked if not url.startswith("data:")] == [path.as_uri()]
    widths = opened.page.eval_on_selector_all("img", "all => all.map((img) => img.naturalWidth)")
    assert len(widths) >= 4
    assert all(width > 0 for width in widths)
    assert opened.page.title().startswith("some_digits")


def test_a_click_sorts_by_number_and_another_turns_it_round(opened: Opened) -> None:
    assert opened.sorted_by() == {"last %": "descending"}
    opened.page.get_by_role("button", name="train s").first.click()
    # As text 10 would stand before 9.50, and 100 before 20.
    assert opened.column(5) == ["9.50", "20", "100"]
    assert opened.column(0) == ["finetune", "joint", "var-adapter"]
    assert opened.sorted_by() == {"train s": "ascending"}
    opened.page.get_by_role("button", name="train s").first.click()
    assert opened.column(0) == ["var-adapter", "joint", "finetune"]
    assert opened.sorted_by() == {"train s": "descending"}
    opened.page.get_by_role("button", name="BWT").click()  # negative: the highest first
    assert opened.column(0) == ["joint", "var-adapter", "finetune"]
    opened.page.get_by_role("button", name="method").first.click()
    assert opened.column(0) == ["finetune", "joint", "var-adapter"]


def test_the_keyboard_sorts_and_keeps_its_place(opened: Opened) -> None:
    keyboard = opened.page.keyboard
    keyboard.press("Tab")
    focused = "document.activeElement.textContent.trim()"
    assert opened.page.evaluate(focused) == "Skip to the results"
    assert opened.page.locator(".skip").bounding_box()["x"] >= 0
    keyboard.press("Enter")
    for _ in range(20):
        keyboard.press("Tab")
        if opened.page.evaluate(focused) == "forget %":
            break
    outline = "getComputedStyle(document.activeElement).outlineWidth"
    assert float(opened.page.evaluate(outline).removesuffix("px")) >= 2
    keyboard.press("Enter")
    assert opened.column(0) == ["joint", "var-adapter", "finetune"]
    keyboard.press("Space")
    assert opened.column(0) == ["finetune", "var-adapter", "joint"]
    assert opened.page.evaluate(focused) == "forget %"
    assert opened.page.get_by_role("status").inner_text() == "Sorted by forget %, descending."


@pytest.mark.parametrize("opened", [(390, "light"), (320, "dark")], indirect=True)
def test_nothing_sticks_out_of_a_phone(opened: Opened) -> None:
    opened.page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    width, inner = opened.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width <= inner
    table = opened.page.locator("#results-table")
    assert table.bounding_box()["width"] > inner  # which has a room of its own to be moved in
    scroll = "element => element.closest('.scroll').scrollLeft = 200"
    table.evaluate(scroll)
    assert opened.page.locator("#results-table tbody th").first.bounding_box()["x"] >= 0


def test_a_phone_gets_narrow_curves(browser: "playwright.Browser", path: Path) -> None:
    shown = []
    for width in (390, 1280):
        window = Opened(browser, path, width, "light")
        shown.append(window.page.eval_on_selector("picture img", "img => img.naturalWidth"))
        window.context.close()
    assert shown[0] < shown[1]


@pytest.mark.parametrize("opened", [(1280, "light"), (1280, "dark")], indirect=True)
def test_text_stands_out_in_light_and_dark(opened: Opened, request) -> None:
    scheme = request.node.callspec.params["opened"][1]
    background = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", background)[:3])) / 3
    assert brightness > 200 if scheme == "light" else brightness < 60
    contrast, where = opened.page.evaluate(CONTRAST)
    assert contrast >= 4.5, where


def test_numbers_lead_to_runs_and_from_there_to_folders(opened: Opened) -> None:
    row = opened.page.locator("#results-table tbody tr", has_text="joint")
    runs = opened.page.locator("#runs-joint table")
    assert not runs.is_visible()
    row.locator("td a").first.click()
    assert runs.is_visible()
    assert runs.bounding_box()["y"] < 800
    href = runs.locator("td a").first.evaluate("link => link.href")
    assert (Path(unquote(urlsplit(href).path)) / "summary.json").exists()


def test_every_table_and_picture_can_be_read_aloud(opened: Opened) -> None:
    def count(selector: str) -> int:
        return opened.page.locator(selector).count()

    assert count("table") == count("table > caption") > 5
    assert count("th") == count("th[scope=col], th[scope=row]")
    assert count("img:not([alt]), img[alt='']") == 0
    movable = "[role=region]:is([aria-label], [aria-labelledby])"
    assert count("[tabindex='0']") == count(f"[tabindex='0']{movable}") > 5
    assert count("main") == count("h1") == 1
    ids = opened.page.eval_on_selector_all("[id]", "all => all.map((e) => e.id)")
    assert len(ids) == len(set(ids))


def test_on_paper_it_is_light_and_without_what_only_a_screen_can_do(opened: Opened) -> None:
    opened.page.emulate_media(media="print", color_scheme="dark")
    assert not opened.page.locator("nav").is_visible()
    assert opened.page.locator("#results-table").is_visible()
    contrast, where = opened.page.evaluate(CONTRAST)
    assert contrast >= 4.5, where
    assert opened.page.pdf(format="A4").startswith(b"%PDF")
