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
# In a group of its own, so that what it leaves behind when it is killed (workers of nginx on the port, processes that hold
# the GPU) is ended before its next start.
group=$(command -v setsid || true)
child=
end_rest() {
    [ -n "$group" ] || return 0
    kill -s TERM -- "-$child" 2>/dev/null || return 0
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        sleep 0.5
        kill -s 0 -- "-$child" 2>/dev/null || return 0
    done
    kill -s KILL -- "-$child" 2>/dev/null || true
}
stop() {
    trap '' TERM INT
    if [ -n "$child" ]; then
        kill -s TERM "$child" 2>/dev/null || true
        wait "$child" || true
        end_rest
    fi
    if [ -n "${FEDTUNE_WORKERS:-}" ]; then  # a node's worker is in no group of this script
        fedtune worker --stop >/dev/null 2>&1 || true
    fi
    exit 0
}
trap stop TERM INT
while :; do
    ${group:+"$group"} "$@" &
    child=$!
    code=0
    wait "$child" || code=$?
    end_rest
    echo "$(date '+%Y-%m-%d %H:%M:%S') $(basename "$1") ended with exit code $code; next start in $RESTART_SECONDS s" >&2
    child=
    sleep "$RESTART_SECONDS" &
    wait $! || true
done
""",
)
