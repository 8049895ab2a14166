"""The page of a run, or of several beside one another: one file of HTML that needs nothing else and runs no script.

Everything that comes from a run is escaped (`fedtune.report.markup`), and a content security policy forbids scripts, the
network and any style but ours, so that hostile text in a run does nothing even if escaping had a hole.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import fedtune
from fedtune.errors import ReportError
from fedtune.numbers import in_bytes, in_loss, in_time
from fedtune.report import sections
from fedtune.report.answers import answers, answers_compared
from fedtune.report.curve_section import compared, curves
from fedtune.report.drawing import sign
from fedtune.report.markup import Content, Html, cut, join, tag
from fedtune.report.run import Run, read_run
from fedtune.report.stylesheet import STYLE
from fedtune.report.table import measured
from fedtune.run_folder import replace_file

NAME = "report.html"
FIRST_LINE = "<!doctype html><!-- a report of fedtune -->"
MOST_RUNS = 60


def report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of the runs in `folders`; returns where it is (default: in the run's folder, or here for several).

    Raises:
        ReportError: no folder, too many, or `out` is a file that is no report. RunFolderError: not a run folder.
    """
    if not 0 < len(folders) <= MOST_RUNS:
        raise ReportError(f"A report is of 1 to {MOST_RUNS} runs, not {len(folders)}: name their folders.")
    runs = [read_run(folder) for folder in folders]
    target = out or (folders[0] / NAME if len(runs) == 1 else Path(NAME))
    _check_replaceable(target)
    replace_file(target, page(runs).encode())
    return target


def page(runs: Sequence[Run]) -> str:
    """The HTML of one run, or of a comparison."""
    title, body = _of_one(runs[0]) if len(runs) == 1 else _of_several(runs)
    style = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{style}'; base-uri 'none'; form-action 'none'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", title),
        tag("style", Html(STYLE)),
    )
    made = f"Made by fedtune {fedtune.__version__}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC."
    page_body = tag("body", tag("main", body, tag("footer", made)))
    return FIRST_LINE + "\n" + tag("html", head, page_body, lang="en") + "\n"


def _check_replaceable(target: Path) -> None:
    """Only a report is replaced by a report."""
    if not target.exists():
        return
    with target.open("rb") as file:
        if file.read(len(FIRST_LINE)) != FIRST_LINE.encode():
            raise ReportError(f"'{target}' exists and is not a report: give another file with --out.", path=str(target))


# ---------------------------------------------------------------------- one run


def _of_one(run: Run) -> tuple[str, Html]:
    title = cut(f"{run.algorithm}: {run.path.resolve().name}", sections.LONGEST_CELL)
    parts: list[Content] = [
        tag("h1", title),
        tag("p", _model(run), class_="quiet path"),
        sections.state(run),
        sections.tiles(run),
        curves(run),
        sections.categories(run),
        answers(run),
        sections.clients(run),
        sections.rounds(run),
        sections.events(run),
        sections.settings(run),
        sections.versions(run),
    ]
    return title, join(parts)


def _model(run: Run) -> str:
    model, data, seed = (cut(str(run.used.get(name, "-")), sections.LONGEST_CELL) for name in ("model", "data", "seed"))
    return f"model {model}, data {data}, seed {seed}, in {run.path}"


# ---------------------------------------------------------------------- several


def _of_several(runs: Sequence[Run]) -> tuple[str, Html]:
    names = distinct([run.path for run in runs])
    title = f"{len(runs)} runs compared"
    troubles = [
        tag("div", f"{name}: {cut(text, sections.MOST_TEXT)}", class_="notice")
        for name, run in zip(names, runs, strict=True)
        for text in (run.error, *run.problems)
        if text
    ]
    parts = [tag("h1", title), *troubles, _summaries(runs, names), compared(runs, names), _categories(runs, names)]
    return title, join([*parts, answers_compared(runs, names), _settings(runs, names), _digests(runs, names)])


def distinct(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of `paths` that tell them apart; the same path twice is numbered."""
    parts = [path.resolve().parts for path in paths]
    deepest = max(len(one) for one in parts)
    for depth in range(1, deepest + 1):
        names = ["/".join(one[-depth:]) for one in parts]
        if len(set(names)) == len(set(parts)):
            break
    return [name if names.count(name) == 1 else f"{name} ({names[: n + 1].count(name)})" for n, name in enumerate(names)]


def _summaries(runs: Sequence[Run], names: Sequence[str]) -> Html:
    head = [("run", False), ("algorithm", False), ("state", False), ("rounds", True), ("loss before", True), ("after", True)]
    scored = [score for score in sections.SCORES if any(run.values(score[1]) for run in runs)]
    head += [(name, True) for name, _ in scored]
    head += [("up", True), ("down", True), ("payload", True), ("time", True), ("not used", True)]
    rows = []
    for number, (name, run) in enumerate(zip(names, runs, strict=True)):
        before, after = sections.ends(run, "eval_loss")
        up, down = run.total("bytes_up"), run.total("bytes_down")
        done, of = run.rounds
        cells: list[Content] = [join([sign(number), " ", name]), run.algorithm, run.doing, f"{done} of {of}"]
        cells += [in_loss(before), tag("b", in_loss(after))]
        cells += [_from_to(*sections.ends(run, key)) for _, key in scored]
        cells += [in_bytes(up), in_bytes(down), in_bytes(up + down), in_time(run.seconds)]
        rows.append([*cells, str(sum(sum(client.reasons.values()) for client in run.clients))])
    return sections.heading("Summaries", sections.table(head, rows))


def _from_to(before: float | None, after: float | None) -> str:
    return f"{in_loss(before)} \u2192 {in_loss(after)}"


def _categories(runs: Sequence[Run], names: Sequence[str]) -> Html:
    """The loss of each category after the last round, and the accuracy where it was measured, a column a run."""
    last = [sections.of_categories(run.rows[-1]) if run.rows else {} for run in runs]
    found = list(dict.fromkeys(name for of in last for name in of))[: sections.MOST_CATEGORIES]
    rows = [[cut(name, sections.LONGEST_NAME) or "(none)", *(_scores(of.get(name, {})) for of in last)] for name in found]
    note = tag("p", "Held-out loss after the last round, and accuracy where it was measured.", class_="quiet")
    head = [("category", False), *((name, True) for name in names)]
    return sections.heading("Categories of the held-out samples", note, sections.table(head, rows)) if rows else Html("")


def _scores(scores: Mapping[str, object]) -> str:
    loss, accuracy = (measured(scores.get(key)) for key in ("eval_loss", "accuracy"))
    return in_loss(loss) + (f" ({in_loss(accuracy)})" if accuracy is not None else "")


def _settings(runs: Sequence[Run], names: Sequence[str]) -> Html:
    """The settings in which the runs differ; where they are stored is no difference."""
    keys = list(dict.fromkeys(key for run in runs for key in run.used if key not in ("out", "resume")))
    differing = [key for key in keys if len({repr(run.used.get(key)) for run in runs}) > 1][: sections.MOST_PAIRS]
    if not differing:
        return sections.heading("Configuration", tag("p", "The runs have the same settings."))
    head = [("setting", False), *((name, False) for name in names)]
    rows = [[key, *(cut(_value(run.used, key), 200) for run in runs)] for key in differing]
    note = tag("p", f"What differs; the other {len(keys) - len(differing)} settings are the same.", class_="quiet")
    return sections.heading("Configuration", note, sections.table(head, rows))


def _value(used: Mapping[str, object], key: str) -> str:
    return "-" if key not in used else str(used[key]) or '""'


def _digests(runs: Sequence[Run], names: Sequence[str]) -> Html:
    head = [("run", False), ("base model", False), ("model after the last round", False), ("fedtune", False), ("torch", False)]
    rows = []
    for name, run in zip(names, runs, strict=True):
        digests = [tag("span", text or "-", class_="code") for text in (run.digests.get("base model", ""), run.digest)]
        rows.append([name, *digests, *(str(run.versions.get(library, "-")) for library in ("fedtune", "torch"))])
    return sections.heading("Digests and versions", sections.table(head, rows))
