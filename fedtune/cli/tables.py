"""The end of a run on the screen: before and after, what it cost beside FedAvg, and where it is."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from fedtune.cli.numbers import in_bytes, in_loss, in_ratio, in_time
from fedtune.cli.rows import real, whole
from fedtune.cli.screen import quoted
from fedtune.foreign import for_screen

Summary = Mapping[str, object]
SCORES = (("held-out loss", "loss"), ("accuracy", "accuracy"), ("ROUGE-L", "rouge_l"), ("exact match", "exact_match"))
MOST_CATEGORIES = 30  # lines
LONGEST_CATEGORY = 32  # characters


def result_table(summary: Summary) -> Table:
    """One run (summary.json): quality before and after, bytes, digest and folder."""
    table = Table(box=None, pad_edge=False, header_style="dim", show_edge=False)
    for name in ("", "before", "after"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for title, key in SCORES:
        before, after = real(summary, f"initial_{key}"), real(summary, f"final_{key}")
        if before is not None or after is not None or key == "loss":
            table.add_row(title, in_loss(before), in_loss(after))
    _add_categories(table, summary)
    facts = Table.grid(padding=(0, 2))
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for title, text in _facts(summary):
        facts.add_row(title, text)
    both = Table.grid()
    both.add_row("")
    both.add_row(table)
    both.add_row("")
    both.add_row(facts)
    return both


def _add_categories(table: Table, summary: Summary) -> None:
    """Loss and accuracy of each category, a line each."""
    found = summary.get("categories")
    named = [(name, of) for name, of in found.items() if isinstance(of, Mapping)] if isinstance(found, Mapping) else []
    for name, of in named[:MOST_CATEGORIES]:
        for title, key in SCORES[:2]:
            before, after = real(of, f"initial_{key}"), real(of, f"final_{key}")
            if key == "loss" or before is not None or after is not None:
                label = f"  {for_screen(str(name), LONGEST_CATEGORY) or '(none)'}"
                table.add_row(quoted(label if key == "loss" else f"    {title}"), in_loss(before), in_loss(after), style="dim")
    if len(named) > MOST_CATEGORIES:
        table.add_row(f"  ... {len(named) - MOST_CATEGORIES} more categories in summary.json", "", "", style="dim")


def _facts(summary: Summary) -> list[tuple[str, str]]:
    total, fedavg = payload(summary), whole(summary, "fedavg_bytes")
    used, refused = whole(summary, "updates_used"), whole(summary, "updates_refused")
    facts = [
        ("payload, client and round", _per_client(summary)),
        ("payload, whole run", in_bytes(total)),
        ("FedAvg, the same rounds", in_bytes(fedavg) + (f" ({in_ratio(fedavg / total)} as much)" if total else "")),
        ("updates used, refused", f"{used}, {refused or 'none'}"),
        ("time", in_time(real(summary, "seconds") or 0.0)),
        ("digest of the model", str(summary.get("digest", "-"))),
        ("run folder", str(summary.get("out", "-"))),
    ]
    return facts


def comparison_table(summaries: Mapping[str, Summary]) -> Table:
    """Several runs side by side, a column each."""
    table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
    table.add_column("", no_wrap=True)
    for name in summaries:
        table.add_column(name, justify="right")
    runs = list(summaries.values())
    table.add_row("parameters", *(f"{whole(run, 'parameters'):,}" for run in runs))
    for title, key in SCORES:
        if any(real(run, f"final_{key}") is not None for run in runs):
            changes = [(real(run, f"initial_{key}"), real(run, f"final_{key}")) for run in runs]
            table.add_row(f"{title}, before", *(in_loss(before) for before, _ in changes))
            table.add_row(f"{title}, after", *(in_loss(after) for _, after in changes), style="bold")
    table.add_row("time", *(in_time(real(run, "seconds") or 0.0) for run in runs))
    table.add_row("up, client and round", *(in_bytes(real(run, "payload_bytes_up_per_client_round") or 0.0) for run in runs))
    table.add_row(
        "down, client and round", *(in_bytes(real(run, "payload_bytes_down_per_client_round") or 0.0) for run in runs)
    )
    table.add_row("payload, whole run", *(in_bytes(payload(run)) for run in runs), style="bold")
    table.add_row("FedAvg, the same rounds", *(in_bytes(whole(run, "fedavg_bytes")) for run in runs))
    table.add_row("FedAvg / payload", *(in_ratio(whole(run, "fedavg_bytes") / max(1, payload(run))) for run in runs))
    return table


def payload(summary: Summary) -> int:
    """Payload bytes of a run, both directions."""
    return whole(summary, "payload_bytes_up") + whole(summary, "payload_bytes_down")


def _per_client(summary: Summary) -> str:
    up, down = (real(summary, f"payload_bytes_{way}_per_client_round") or 0.0 for way in ("up", "down"))
    return f"{in_bytes(up)} up, {in_bytes(down)} down"
