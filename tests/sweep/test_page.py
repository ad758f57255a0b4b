"""The HTML page: everything in it, nothing fetched, names escaped, tables that sort."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ssmlora_dist.sweep.document import Cell, Report, Section, Table
from ssmlora_dist.sweep.page import POLICY, page_text
from ssmlora_dist.sweep.report import write_report
from tests.sweep.results import full_sweep, lost, result, write_rows

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
BROWSER_SECONDS = 120
NASTY = "<script>alert(\"x\")</script> & '<b>' http://example.invalid/a.png"


class Elements(HTMLParser):
    """Tags with their attributes, and which of them were not closed in order."""

    VOID = frozenset({"meta", "img", "wbr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("sweep")
    points = [*full_sweep(), lost(NASTY, 1, reason=NASTY), result("lora", 9, name=NASTY)]
    write_rows(directory / "points.jsonl", [*points, f'{{"point": "{NASTY[:8]}'])
    return write_report(directory, baseline="lora")[0].read_text(encoding="utf-8")


def test_a_page_of_its_own(page: str) -> None:
    elements = Elements(page)
    images = elements.all("img")
    assert len(images) == 8
    assert all(str(image["src"]).startswith("data:image/png;base64,") for image in images)
    assert all(image["alt"] and image["width"] and image["height"] for image in images)
    assert all(str(link["href"]).startswith("#") for link in elements.all("a"))
    assert not {"link", "iframe", "object", "form"} & {tag for tag, _ in elements.found}
    assert {"content": POLICY, "http-equiv": "Content-Security-Policy"} in elements.all("meta")
    assert not re.search(r"https?:", page.replace("http://example.invalid", "")), "of a reason that is shown"
    assert "url(" not in page
    assert "@import" not in page


def test_names_are_text(page: str) -> None:
    elements = Elements(page)
    assert len(elements.all("script")) == 1
    assert not elements.all("b")
    assert elements.text.count(NASTY) >= 12, "as name, group and reason, in every table"
    assert html.escape(NASTY) in page


def test_links_lead_somewhere(page: str) -> None:
    elements = Elements(page)
    places = [section["id"] for section in elements.all("section")]
    assert [str(link["href"]).removeprefix("#") for link in elements.all("a")] == places
    assert len(places) == 10


def test_tables_can_be_read_aloud_and_sorted_by_keyboard(page: str) -> None:
    elements = Elements(page)
    tables, heads = elements.all("table"), [head for head in elements.all("th") if head["scope"] == "col"]
    assert len(elements.all("caption")) == len(tables) == 14
    assert len(elements.all("button")) == len(heads)
    assert all(button["type"] == "button" for button in elements.all("button"))
    assert all(head["scope"] in ("col", "row") for head in elements.all("th"))
    assert [tag for tag, _ in elements.found].count("html") == 1
    assert elements.all("html") == [{"lang": "en"}]


def test_light_and_dark(page: str) -> None:
    assert "color-scheme: light dark" in page
    light, dark = (
        set(re.findall(r"(--\w+):", part)) for part in page.split("prefers-color-scheme: dark")[:2]
    )
    assert light == dark, "every colour has one of its own in the dark"


SORTED = Table(
    "t",
    ["name", "value"],
    [
        [Cell("b10"), Cell("1,000", 1000.0)],
        [Cell("a"), Cell("")],
        [Cell("c"), Cell("nan", is_bad=True)],
        [Cell("B"), Cell("-2.5", -2.5, "[-3, 2]")],
        [Cell("d"), Cell("1e-07", 1e-7)],
        [Cell("b9"), Cell("1,000", 1000.0)],
    ],
)

PROBE = """<pre id="probe"></pre><script>
const names = () => Array.from(document.querySelectorAll("tbody th"), cell => cell.textContent);
const heads = () => Array.from(document.querySelectorAll("thead th"));
const states = () => heads().map(head => head.getAttribute("aria-sort"));
const seen = [[names(), states()]];
for (const column of [1, 1, 0, 0, 1]) {
  document.querySelectorAll("thead button")[column].click();
  seen.push([names(), states()]);
}
addEventListener("load", () => {
  const pictures = Array.from(document.images, image => image.complete && image.naturalWidth > 0);
  const fetched = performance.getEntriesByType("resource").map(entry => entry.name);
  const width = document.documentElement.scrollWidth;
  document.getElementById("probe").textContent = JSON.stringify({ seen, pictures, fetched, width });
});
</script></body>"""


def in_browser(page: str, directory: Path) -> Any:
    """What the probe says of the page in a window of 1280 pixels."""
    assert CHROMIUM is not None
    path = directory / "page.html"
    path.write_text(page.replace("</body>", PROBE), encoding="utf-8")
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1280,1000",
        "--dump-dom",
    ]
    command += [f"--user-data-dir={directory / 'profile'}", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=BROWSER_SECONDS, check=True)
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stdout[-2000:]
    return json.loads(html.unescape(found[1]))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_sorting_in_a_browser(tmp_path: Path) -> None:
    seen = in_browser(page_text(Report("r", [], [Section("s", [SORTED])])), tmp_path)["seen"]
    unsorted = ["b10", "a", "c", "B", "d", "b9"]
    assert seen == [
        [unsorted, [None, None]],
        [["B", "d", "b10", "b9", "c", "a"], [None, "ascending"]],
        [["c", "b10", "b9", "d", "B", "a"], [None, "descending"]],
        [["a", "B", "b9", "b10", "c", "d"], ["ascending", None]],
        [["d", "c", "b10", "b9", "B", "a"], ["descending", None]],
        [["B", "d", "b10", "b9", "c", "a"], [None, "ascending"]],
    ]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_in_a_browser(page: str, tmp_path: Path) -> None:
    found = in_browser(page, tmp_path)
    assert found["pictures"] == [True] * 8
    assert [name for name in found["fetched"] if not name.startswith("data:")] == []
    assert found["width"] <= 1280, "wide tables scroll, the page does not"
