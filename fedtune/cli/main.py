"""The `fedtune` program: its commands, and what each way of failing prints and returns.

Exit codes: 0 done, 1 an error that is explained in one sentence, or nothing that was asked for came about, 2 a command that
was typed wrongly, 130 Ctrl-C. docs/run-folder.md has them by command.
`--debug` anywhere on the line adds the traceback.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import click
import typer

import fedtune
from fedtune import shortage
from fedtune.cli.apply import apply
from fedtune.cli.compare import compare
from fedtune.cli.data import data_app
from fedtune.cli.delta import delta_app
from fedtune.cli.demo import demo
from fedtune.cli.deploy import deploy_app
from fedtune.cli.estimate import estimate
from fedtune.cli.export import export
from fedtune.cli.ledger import ledger_app
from fedtune.cli.loss import loss
from fedtune.cli.operate import drop, evaluate, pause, status, stop, unpause
from fedtune.cli.presets import presets
from fedtune.cli.report import report
from fedtune.cli.screen import Screen, let_go, plain, prepare
from fedtune.cli.settings import settings
from fedtune.cli.simulate import simulate
from fedtune.cli.sweep import sweep
from fedtune.cli.worker import worker
from fedtune.errors import EngineError, FedtuneError, Interrupted

FAILED, MISTYPED, INTERRUPTED = 1, 2, 130

app = typer.Typer(
    name="fedtune",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(
    epilog="""Start here:

[bold]fedtune demo[/bold]   three federated runs on a small model, in a minute or two

[bold]fedtune simulate demo_ferret --set rounds=5[/bold]   one preset, one setting changed

[bold]fedtune estimate my.toml[/bold]   memory, bytes and time before anything starts"""
)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error (anywhere on the line).")] = False,
) -> None:
    """Fine-tune all weights of a language model across clients that keep their data, for kilobytes a round."""


app.command("simulate")(simulate)
app.command("compare")(compare)
app.command("sweep")(sweep)
app.command("demo")(demo)
app.command("presets")(presets)
app.add_typer(data_app, name="data")
app.command("estimate")(estimate)
app.command("loss")(loss)
app.command("export")(export)
app.command("apply")(apply)
app.add_typer(delta_app, name="delta")
app.add_typer(ledger_app, name="ledger")
app.command("report")(report)
for operation in (status, pause, unpause, stop, drop, evaluate):
    app.command(operation.__name__)(operation)
app.command("settings")(settings)
app.command("worker")(worker)
app.add_typer(deploy_app, name="deploy")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program with `arguments` (default: those of the process) and exit with its code."""
    prepare()
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    if given == ["--version"]:
        Screen().say(f"fedtune {fedtune.__version__}")
        sys.exit(0)
    sys.exit(_run(given, debug))


def _run(arguments: list[str], debug: bool) -> int:
    """Run one command and return the exit code; whatever is raised becomes a sentence on stderr."""
    try:
        code = typer.main.get_command(app).main(arguments, prog_name="fedtune", standalone_mode=False)
        sys.stdout.flush()
        if code == INTERRUPTED:  # what typer makes of a KeyboardInterrupt
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError:  # the help is printed by now
        return MISTYPED
    except BrokenPipeError:  # the reader has gone; so has its interest
        let_go()
        return FAILED
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            Screen(stderr=True).page("\n".join([traceback.format_exc().rstrip("\n"), *_tail(error)]))
        return _fail(*_explain(error))


def _explain(error: BaseException) -> tuple[str, int]:
    """What is printed for `error`, and the exit code."""
    match error:
        case click.UsageError():
            path = error.ctx.command_path if error.ctx else "fedtune"
            return f"{_sentence(error.format_message())} `{path} --help` explains the command.", MISTYPED
        case EngineError() if error.facts.get("tail"):
            return f"{_sentence(str(error))} --debug shows its last lines.", FAILED
        case Interrupted():
            return str(error), INTERRUPTED
        case KeyboardInterrupt() | click.Abort():
            return "Stopped at once; the round in hand is lost, those before are in the run folder.", INTERRUPTED
        case FedtuneError() | click.ClickException():
            return (_NO_MEMORY if shortage.memory(error) else "{}").format(error), FAILED
        case _:
            words = " ".join(str(error).split())  # a library's error may be a page
            what = _sentence(f"{type(error).__name__}: {words}".rstrip(": "))
            return (_NO_MEMORY if shortage.memory(error) else _UNEXPECTED).format(what), FAILED


_UNEXPECTED = "Unexpected {} Run it again with --debug for the traceback."
_NO_MEMORY = (
    "Memory is short: {} Raise the limit (ulimit -v, the container's), or take fewer workers, a smaller batch_size, "
    "dtype = bfloat16 or a smaller model."
)


def _tail(error: BaseException) -> list[str]:
    """The last lines of a process that failed, if `error` carries them."""
    tail = error.facts.get("tail") if isinstance(error, FedtuneError) else None
    return [str(line) for line in tail] if isinstance(tail, list | tuple) else [str(tail)] if tail else []


def _fail(message: str, code: int) -> int:
    label = ("", "") if code == INTERRUPTED else ("Error: ", "bold red")
    Screen(stderr=True).print(plain(label, message), soft_wrap=True)
    let_go()
    return code


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else text + "."
