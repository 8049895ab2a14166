"""Reports in a real headless browser: no error, nothing fetched, nothing executed, and no scrolling sideways on a phone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Page, browser, program
from run_lines import line, write_lines

from fedtune.report import page as pages
from fedtune.report.markup import Html
from fedtune.report.page import report
from fedtune.run_folder import RunFolder

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(program() is None, reason="no chromium: apt-get install chromium"),
]
PNG, PDF = b"\x89PNG", b"%PDF"
EVIL = (
    "<script>window.pwned=1</script>",
    "</style><script>pwned=2</script><style>",
    "</title><img src=x onerror='window.pwned=3'>",
    '"><svg onload=pwned=4>',
    "<iframe src='javascript:parent.pwned=5'></iframe><meta http-equiv=refresh content='0;url=https://example.org/'>",
    "]]><!-- --><a href='https://example.org/?x'>x</a><link rel=stylesheet href=https://example.org/a.css>",
    "\u202eevil\u0000 " + "unbreakable" * 400,
)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture
def hostile(run: RunFolder) -> RunFolder:
    """Hostile text wherever a run has text."""
    clients = tuple(EVIL)
    rows = [line(0), line(1, clients=clients, refused={EVIL[0]: EVIL[1]}), line(2, digest=EVIL[2], seconds={EVIL[3]: 1.0})]
    write_lines(run, rows)
    for name in ("summary.json", "versions.json"):
        run.write_json(name, {text: text for text in EVIL})
    used = {**run.config().as_mapping(), "model": EVIL[0], "algorithm": EVIL[2], **{text: text for text in EVIL}}
    run.write_json("config.json", {"asked": {}, "used": used})
    run.write_json("error.json", {"type": EVIL[3], "message": EVIL[4]})
    run.write_json("generated_round_0.json", {"texts": EVIL, "prompts": EVIL, "references": EVIL})
    run.write_json("generated_round_4.json", {"texts": EVIL[::-1]})
    return run


def clean(page: Page, path: Path) -> None:
    """The page made no noise and asked for nothing but itself."""
    assert page.messages == []
    assert page.requests == [path.absolute().as_uri()]


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
@pytest.mark.parametrize("runs", [1, 3])
def test_a_report_is_quiet_and_fits(chromium: Page, run: RunFolder, tmp_path: Path, width: int, runs: int) -> None:
    made = report([run.path] * runs, tmp_path / "report.html")
    for dark in (False, True):
        chromium.open(made, width=width, dark=dark)
        clean(chromium, made)
        assert chromium.evaluate("document.documentElement.scrollWidth") == width
        assert chromium.evaluate("document.querySelectorAll('svg.chart').length") >= 4
    assert chromium.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
    chromium.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(PNG)
    chromium.pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(PDF)


@pytest.mark.parametrize("runs", [1, 2])
def test_hostile_text_is_shown_and_does_nothing(chromium: Page, hostile: RunFolder, tmp_path: Path, runs: int) -> None:
    made = report([hostile.path] * runs, tmp_path / "report.html")
    chromium.open(made, width=390)
    clean(chromium, made)
    assert chromium.evaluate("typeof pwned") == "undefined"
    assert chromium.evaluate("document.querySelectorAll('script,img,iframe,link,a,svg[onload]').length") == 0
    assert chromium.evaluate("document.documentElement.scrollWidth") == 390
    assert EVIL[2] in chromium.evaluate("document.body.innerText")


def test_the_policy_stops_what_escaping_would_let_through(
    chromium: Page, run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "_model", lambda _: Html("".join(EVIL[:4]) + "<p style='color:red'>x</p>"))
    made = report([run.path], tmp_path / "report.html")
    chromium.open(made)
    assert chromium.evaluate("typeof pwned") == "undefined"
    assert any("Content Security Policy" in message for message in chromium.messages)
