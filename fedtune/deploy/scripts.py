"""The shell scripts that both sides have: one environment for Flower's programs, and a supervisor."""

from __future__ import annotations

RESTART_SECONDS = 15
"""Between the end of a program and its next start. The SuperLink takes up to 60 s to notice that a node was killed and
refuses its key until then; trying more often only fills the log."""


def environment(settings: str) -> str:
    """environment.sh, sourced by the other scripts, which set `here`: the settings file and what Flower has to be told."""
    return f"""\
# Sourced by the other scripts: the settings of {settings}, and Flower kept to this folder and off the package index.
umask 077
. "$here/{settings}"
export FLWR_HOME="$here/flwr"
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
export RAY_USAGE_STATS_ENABLED=0 PYTHONUNBUFFERED=1
export PATH="${{BIN:+$BIN:}}$PATH:/usr/local/sbin:/usr/sbin"
mkdir -p "$FLWR_HOME" "$here/work"
"""


def script(purpose: str, body: str) -> str:
    """A script that runs `body` with `here`, its folder, and environment.sh."""
    return f"""\
#!/bin/sh
# {purpose}
set -eu
here=$(cd "$(dirname "$0")" && pwd)
. "$here/environment.sh"
{body}"""


SUPERVISE = script(
    "supervise.sh PROGRAM...: run it, and start it again RESTART_SECONDS after it ended, until this script is told to stop.",
    """\
child=
stop() {
    trap '' TERM INT
    if [ -n "$child" ]; then
        kill -TERM "$child" 2>/dev/null || true
        wait "$child" || true
    fi
    exit 0
}
trap stop TERM INT
while :; do
    "$@" &
    child=$!
    code=0
    wait "$child" || code=$?
    echo "$(date '+%Y-%m-%d %H:%M:%S') $(basename "$1") ended with exit code $code; next start in $RESTART_SECONDS s" >&2
    sleep "$RESTART_SECONDS" &
    child=$!
    wait "$child" || true
done
""",
)
