"""The parts of the page of one run: state, numbers, categories, clients, rounds, settings, digests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from fedtune.config import RunConfig
from fedtune.methods import defaults_of
from fedtune.numbers import in_bytes, in_loss, in_ratio, in_time
from fedtune.report.markup import Content, Html, cut, join, tag
from fedtune.report.run import MOST_PHASES, Client, Run, phases
from fedtune.report.table import measured

MOST_CLIENTS, MOST_ROUNDS, MOST_EVENTS, MOST_TEXT = 200, 400, 100, 1500
LONGEST_NUMBER = 10  # characters, with its unit
LONGEST_CELL, LONGEST_NAME = 600, 80  # characters
MOST_CATEGORIES = 200
MOST_PAIRS = 200  # settings or versions: more than there are, unless the folder is a stranger's
BYTES_PER_WEIGHT = 4  # FedAvg on float32 weights, for comparison

STATES = {
    "finished": ("", "finished"),
    "running": ("wait", "still going on"),
    "paused": ("wait", "paused"),
    "stopped": ("wait", "stopped before its end"),
    "died": ("bad", "its process died before its end"),
    "failed": ("bad", "failed"),
}


def heading(title: str, *content: Content) -> Html:
    """A section, or nothing where it has no content."""
    inside = join(content)
    return tag("section", tag("h2", title), inside) if inside else Html("")


# ---------------------------------------------------------------------- state and numbers


def state(run: Run) -> Html:
    """Whether the run is whole, how far it came, and what is wrong."""
    kind, words = STATES.get(run.doing, ("wait", "state unknown"))
    done, of = run.rounds
    error = tag("div", cut(run.error, 4 * MOST_TEXT), class_="notice", role="alert") if run.error else None
    warning = [str(run.divergence)] if run.divergence else []
    problems = [tag("div", cut(problem, MOST_TEXT), class_="notice") for problem in (*warning, *run.problems)]
    return join([tag("p", f"{words}, {done} of {of} rounds", class_=f"state {kind}".strip()), error, *problems])


def tiles(run: Run) -> Html:
    """Before and after, and what it cost."""
    up, down = run.total("bytes_up"), run.total("bytes_down")
    found = [_change(run, "held-out loss", "eval_loss"), *(_score(run, *score) for score in SCORES)]
    found.append(tile("payload, whole run", in_bytes(up + down), f"{in_bytes(up)} up, {in_bytes(down)} down"))
    sent, asked = run.total("messages_up"), run.total("messages_down")
    if sent or asked:
        found.append(tile("a client and round", f"{in_bytes(up / max(1, sent))} up", f"{in_bytes(down / max(1, asked))} down"))
    fedavg = fedavg_bytes(run)
    if fedavg and up + down:
        found.append(tile("FedAvg, same rounds", in_bytes(fedavg), f"{in_ratio(fedavg / (up + down))} as much"))
    found.append(tile("time", in_time(run.seconds), f"{len(run.trained())} rounds"))
    refused = sum(sum(client.reasons.values()) for client in run.clients)
    found.append(tile("updates refused", str(refused) if refused else "none", f"of {sum(c.asked for c in run.clients)} asked"))
    return tag("div", *found, class_="tiles")


SCORES = (("accuracy", "accuracy"), ("ROUGE-L", "rouge_l"), ("exact match", "exact_match"))


def tile(name: str, value: str, more: str = "") -> Html:
    """One number in a box."""
    parts = (("name", name), ("value", value), ("more", more))
    return tag("div", *(tag("div", text, class_=kind) for kind, text in parts if text), class_="tile")


def _change(run: Run, name: str, key: str) -> Html:
    """Before and after; a last round without a finite value is not hidden behind an earlier one."""
    before, after = ends(run, key)
    found = run.values(key)
    best = min(found, key=lambda pair: pair[1]) if found else None
    more = f"lowest {in_loss(best[1])} after round {best[0]}" if best else "never measured"
    more += "; in the last round not measured, or not finite" if after is None and best else ""
    return tile(name, f"{in_loss(before)} \u2192 {in_loss(after)}", more)


def _score(run: Run, name: str, key: str) -> Html | None:
    before, after = ends(run, key)
    return tile(name, f"{in_loss(before)} \u2192 {in_loss(after)}", "0 to 1") if run.values(key) else None


def ends(run: Run, key: str) -> tuple[float | None, float | None]:
    """The values of the base model and of the last finished round; None where there is no finite one."""
    before = next((value for number, value in run.values(key) if number == 0), None)
    return before, measured(run.rows[-1].get(key)) if run.rows else None


def fedavg_bytes(run: Run) -> float | None:
    """What FedAvg would have moved for the same messages; None where the number of parameters is not written down."""
    parameters = measured(run.summary.get("parameters"))
    return 2 * BYTES_PER_WEIGHT * parameters * run.total("messages_down") if parameters else None


# ---------------------------------------------------------------------- tables


def table(head: Sequence[tuple[str, bool]], rows: Sequence[Sequence[Content]], *, left_out: int = 0) -> Html:
    """A table that scrolls sideways inside itself where it is too wide. `head` has names, and whether numbers stand below."""
    titles = tag("tr", *(tag("th", name, scope="col", class_="right" if right else None) for name, right in head))
    body = [tag("tr", *(_cell(cell, right=right) for cell, (_, right) in zip(row, head, strict=True))) for row in rows]
    more = tag("p", f"... and {left_out} more.", class_="quiet") if left_out > 0 else None
    return join([tag("div", tag("table", tag("thead", titles), tag("tbody", *body)), class_="wide", tabindex=0), more])


def _cell(content: Content, *, right: bool) -> Html:
    """A cell; a short number stays with its unit on one line, and a long text is cut."""
    if isinstance(content, str) and not isinstance(content, Html):
        short = right and len(content) <= LONGEST_NUMBER
        content = content.replace(" ", "\u00a0") if short else cut(content, LONGEST_CELL)
    return tag("td", content, class_="right" if right else None)


def clients(run: Run) -> Html:
    """Who gave what."""
    if not run.clients:
        return Html("")
    weighed = any(client.share is not None for client in run.clients)
    head = [("client", False), ("samples", True), ("asked", True), ("used", True)]
    head += [("share of the updates", True), ("payload up", True)] if weighed else []
    refusing = any(client.reasons for client in run.clients)
    head += [("not used, and why", False)] if refusing else []
    most = max((client.share or 0.0 for client in run.clients), default=0.0)
    rows = [_client(client, most, weighed, refusing) for client in run.clients[:MOST_CLIENTS]]
    return heading("Clients", table(head, rows, left_out=len(run.clients) - MOST_CLIENTS))


def _client(client: Client, most: float, weighed: bool, refusing: bool) -> list[Content]:
    cells: list[Content] = [client.id, _count(client.samples), str(client.asked), str(client.used)]
    if weighed:
        share = client.share or 0.0
        cells += [join([level(share / most if most else 0.0), f" {100 * share:.1f} %"]), in_bytes(client.bytes_up or 0)]
    if refusing:
        cells.append("; ".join(f"{cut(why, 300)} ({count})" for why, count in client.reasons.items()))
    return cells


def level(part: float) -> Html:
    """A small bar, `part` (0 to 1) of it full."""
    room = tag("rect", x=0, y=2, width=96, height=6, class_="room")
    return tag("svg", room, tag("rect", x=0, y=0, width=f"{96 * part:.1f}", height=10, class_="full"), class_="level",
               viewBox="0 0 96 10", aria_hidden="true")  # fmt: skip


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def rounds(run: Run) -> Html:
    """One line a round: losses, bytes, seconds, digest."""
    names = list(dict.fromkeys(name for row in run.rows[-MOST_ROUNDS:] for name in phases(row)))[:MOST_PHASES]
    head = [("round", True), ("held-out loss", True), ("train loss", True), ("up", True), ("down", True)]
    head += [(name, True) for name in names] + [("not used", True), ("digest", False)]
    rows = []
    for row in run.rows[-MOST_ROUNDS:]:
        spent = phases(row)
        refused = row.get("refused")
        cells: list[Content] = ["base" if not measured(row.get("round")) else str(int(measured(row.get("round")) or 0))]
        cells += [in_loss(measured(row.get(key))) for key in ("eval_loss", "train_loss")]
        cells += [in_bytes(measured(row.get(key)) or 0) for key in ("bytes_up", "bytes_down")]
        cells += [in_time(spent[name]) if name in spent else "-" for name in names]
        cells += [str(len(refused)) if isinstance(refused, Mapping) and refused else "-"]
        rows.append([*cells, tag("span", str(row.get("digest", ""))[:12], class_="code short")])
    earlier = len(run.rows) - MOST_ROUNDS
    note = tag("p", f"The last {MOST_ROUNDS}; {earlier} earlier ones are in metrics.jsonl.") if earlier > 0 else None
    return heading("Rounds", note, table(head, rows)) if rows else Html("")


def categories(run: Run) -> Html:
    """Loss and accuracy of each category of the held-out samples, before and after."""
    first, last = (of_categories(row) for row in (run.rows[0], run.rows[-1])) if run.rows else ({}, {})
    scored = any(measured(scores.get("accuracy")) is not None for scores in last.values())
    head = [("category", False), ("samples", True), ("loss before", True), ("after", True)]
    head += [("accuracy before", True), ("after", True)] if scored else []
    rows: list[list[Content]] = []
    for name, scores in islice(last.items(), MOST_CATEGORIES):
        keys = ("eval_loss", "accuracy") if scored else ("eval_loss",)
        pairs = [in_loss(measured(of.get(key))) for key in keys for of in (first.get(name, {}), scores)]
        rows.append([cut(name, LONGEST_NAME) or "(none)", _count(int(measured(scores.get("samples")) or 0)), *pairs])
    return (
        heading("Categories of the held-out samples", table(head, rows, left_out=len(last) - len(rows))) if rows else Html("")
    )


def of_categories(row: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """By category: the scores that a row has of it; {} for a row without."""
    found = row.get("categories")
    return {str(name): of for name, of in found.items() if isinstance(of, Mapping)} if isinstance(found, Mapping) else {}


# ---------------------------------------------------------------------- what it was made with


def settings(run: Run) -> Html:
    """Every setting; those that are not fedtune's defaults, of the run's method, stand out."""
    own = defaults_of(*(str(run.used.get(key, "")) for key in ("algorithm", "optimizer")))
    defaults = {name: field.default for name, field in RunConfig.model_fields.items()} | own
    items = [_pair(name, value, given=defaults.get(name) != value) for name, value in islice(run.used.items(), MOST_PAIRS)]
    note = tag("p", "Bold: other than fedtune's default.", class_="quiet")
    return heading("Configuration", note, tag("dl", *items, class_="settings")) if items else Html("")


def versions(run: Run) -> Html:
    """Libraries, and what names the run's model, data and directions."""
    named = [_pair(name, value) for name, value in islice(run.versions.items(), MOST_PAIRS)]
    digests = {**run.digests, "model after the last round": run.digest}
    lines = [[name, tag("span", value, class_="code")] for name, value in digests.items() if value]
    found = table([("digest of", False), ("", False)], lines) if lines else None
    return join([
        heading("Versions", tag("dl", *named, class_="settings") if named else None),
        heading("Digests", found),
    ])  # fmt: skip


def events(run: Run) -> Html:
    """What happened between rounds, as the ledger has it."""
    rows: list[list[Content]] = [
        [str(number), kind, cut(_detail(detail), 600)] for number, kind, detail in run.events[:MOST_EVENTS]
    ]
    head = [("after round", True), ("event", False), ("detail", False)]
    return heading("Events", table(head, rows, left_out=len(run.events) - MOST_EVENTS)) if rows else Html("")


def _detail(detail: Mapping[str, Any]) -> str:
    return json.dumps({key: value for key, value in detail.items() if key != "versions"}, ensure_ascii=False, default=str)


def _pair(name: str, value: object, *, given: bool = False) -> Html:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    shown = tag("dd", cut(text, 400) or '""')
    return tag("div", tag("dt", cut(name, LONGEST_NAME)), shown, class_="given" if given else None)
