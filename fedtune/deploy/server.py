"""The files of the server's folder, except keys: the SuperLink on loopback, the proxy before it, the operator's commands."""

from __future__ import annotations

from collections.abc import Mapping

from fedtune.deploy import scripts, services, settings
from fedtune.deploy.plan import Plan
from fedtune.deploy.scripts import script

LARGEST_BODY = "64m"
"""Flower cuts arrays into pieces of 5 MiB but sends other payloads whole; nginx alone would refuse all above 1 MiB."""

CONNECTIONS = 16384
"""Of each of the proxy's two processes, to nodes and to the SuperLink; a connection without a request takes about 30 kB."""

HEADER_SECONDS, STILL_SECONDS, KEPT_SECONDS = 5, 30, 40
"""How long a peer may take for TLS and for a header (a few hundred bytes), may stand still in a body, and is kept between
requests: SuperNodes send a heartbeat every 30 s at the latest."""

REQUESTS = 100
"""Of one address at a time. A SuperNode has one or two, so some fifty nodes may share an address."""

PROTECTION = ("client_header_timeout", "client_body_timeout", "limit_conn", "reset_timedout_connection")
"""What `fedtune deploy check` looks for in an nginx.conf that an earlier fedtune wrote."""

_SUPERLINK = script(
    "The SuperLink: TLS, only nodes whose key is registered, on loopback, where Flower's unprotected control API belongs.",
    """\
mkdir -p "$here/state" "$here/log"
cd "$here/work"
exec flower-superlink --host 127.0.0.1 --port "$SUPERLINK_PORT" \\
    --ssl-ca-certfile "$here/ca.pem" --ssl-certfile "$here/superlink.pem" --ssl-keyfile "$here/superlink.key" \\
    --enable-supernode-auth --disable-runtime-dependency-installation \\
    --database "$here/state/superlink.db" --log-file "$here/log/superlink.log"
""",
)

_PROXY = script(
    "The reverse proxy: the only program that the network reaches. After a change of server.pem: ./proxy.sh -s reload",
    """\
mkdir -p "$here/run"
cd "$here/work"
exec nginx -p "$here/" -c nginx.conf -e stderr -g 'daemon off;' "$@"
""",
)

_START = script(
    "SuperLink and proxy in the foreground, each started again when it ends; Ctrl-C or TERM stops both.",
    """\
echo $$ >"$here/start.pid"
"$here/supervise.sh" "$here/superlink.sh" &
superlink=$!
"$here/supervise.sh" "$here/proxy.sh" &
proxy=$!
trap 'trap "" TERM INT; kill -TERM "$superlink" "$proxy" 2>/dev/null; wait; exit 0' TERM INT
wait
""",
)

_FLWR = script(
    "flwr.sh ARGUMENTS: Flower's command with this deployment's SuperLink as its default connection.",
    """\
cat >"$FLWR_HOME/config.toml" <<END
[superlink]
default = "deployment"

[superlink.deployment]
address = "127.0.0.1:$SUPERLINK_PORT"
root-certificates = "$here/ca.pem"
END
exec flwr "$@"
""",
)

_REGISTER = script(
    "Register every key in nodes/ that is not registered yet; the SuperLink's id of each node is kept beside its key.",
    """\
tries=60  # a SuperLink that was started just now needs a few seconds
until "$here/flwr.sh" supernode list deployment --format json >/dev/null 2>&1; do
    tries=$((tries - 1))
    [ "$tries" -gt 0 ] || break
    sleep 1
done
for key in "$here"/nodes/*.pub; do
    name=$(basename "$key" .pub)
    [ -e "$here/nodes/$name.id" ] && continue
    answer=$("$here/flwr.sh" supernode register "$key" deployment --name "$name" --format json)
    id=$(printf '%s' "$answer" | sed -n 's/.*"node-id": *"\\{0,1\\}\\([0-9][0-9]*\\).*/\\1/p')
    if [ -z "$id" ]; then
        printf '%s\\n%s\\n' "$name was not registered:" "$answer" >&2
        exit 1
    fi
    echo "$id" >"$here/nodes/$name.id"
    echo "registered $name as node $id"
done
""",
)

_REMOVE = script(
    "remove.sh NAME: unregister a node for good; its key will be refused from now on.",
    """\
name=${1:?give the name of a node}
id=$(cat "$here/nodes/$name.id")
"$here/flwr.sh" supernode unregister "$id" deployment
rm "$here/nodes/$name.id" "$here/nodes/$name.pub"
echo "removed $name"
""",
)

_RUN = script(
    "run.sh PRESET.toml [APP]: run a preset of the app in folder APP (default: .), follow it, fail if it fails. "
    "Ctrl-C only stops following.",
    """\
preset=${1:?give a preset}
field() { sed -n "s/.*\\"$1\\": *\\"\\{0,1\\}\\([^\\",]*\\).*/\\1/p" | head -n 1; }
answer=$("$here/flwr.sh" run "${2:-.}" deployment --run-config "$preset" --format json) || true
run=$(printf '%s' "$answer" | field run-id)
if [ -z "$run" ]; then
    printf '%s\\n' "$answer" >&2
    exit 1
fi
echo "run $run; to stop it: $here/flwr.sh stop $run deployment"
"$here/flwr.sh" log "$run" deployment --stream || true
status=$("$here/flwr.sh" list --run-id "$run" deployment --format json | field status)
echo "run $run: $status"
[ "$status" = finished:completed ]
""",
)


def scripts_of_server() -> Mapping[str, str]:
    """Name -> text of the executable files."""
    return {
        "supervise.sh": scripts.SUPERVISE,
        "superlink.sh": _SUPERLINK,
        "proxy.sh": _PROXY,
        "start.sh": _START,
        "flwr.sh": _FLWR,
        "register.sh": _REGISTER,
        "remove.sh": _REMOVE,
        "run.sh": _RUN,
    }


def texts_of_server(plan: Plan) -> Mapping[str, str]:
    """Name -> text of the other files."""
    return {
        settings.SERVER_ENV: server_env(plan),
        "environment.sh": scripts.environment(settings.SERVER_ENV),
        "nginx.conf": nginx_conf(plan),
        "docker-compose.yml": services.compose(plan),
        "systemd/fedtune-superlink.service": services.superlink_unit(),
        "systemd/fedtune-proxy.service": services.proxy_unit(),
    }


def server_env(plan: Plan) -> str:
    """server.env."""
    return settings.as_text(
        "The server of a fedtune deployment.",
        [
            ("HOSTS", " ".join(plan.hosts), "Names and addresses that nodes know this machine by; server.pem is for these."),
            ("PUBLIC_PORT", str(plan.public_port), "Where the proxy listens; nginx.conf says the same."),
            ("SUPERLINK_PORT", str(plan.superlink_port), "Where the SuperLink listens on loopback; nginx.conf says the same."),
            ("MODEL", plan.model, "Folder of the base model. Presets name it too; `fedtune deploy check` looks at it here."),
            ("MODEL_FINGERPRINT", plan.weights, "Of its weights; nodes compare theirs with it."),
            ("BIN", "", "Folder of fedtune's and Flower's programs (a virtual environment's bin); empty: those on the PATH."),
            ("RESTART_SECONDS", str(scripts.RESTART_SECONDS), "Between the end of a program and its next start."),
        ],
    )


def nginx_conf(plan: Plan) -> str:
    """The proxy's configuration: TLS ends here, and begins again on the way to the SuperLink.

    What is passed on is a path that nginx puts together itself from one word of the request, so no spelling of a path
    (encoded, doubled or dotted) reaches anything but /v1/fleet/WORD.
    """
    anywhere = "[::]" if any(":" in host for host in plan.hosts) else "0.0.0.0"
    both = " ipv6only=off" if anywhere == "[::]" else ""
    return f"""\
# The proxy before the SuperLink: POST /v1/fleet/WORD is passed on, everything else is answered with 404 or 403.
# Flower's control API starts code on every node and asks for no password: it must stay on the other side.
worker_processes 2;
pid run/nginx.pid;
error_log stderr warn;

worker_rlimit_nofile {2 * CONNECTIONS};

events {{
    worker_connections {CONNECTIONS};
}}

http {{
    access_log off;
    server_tokens off;
    client_body_temp_path run/body;
    proxy_temp_path run/proxy;
    fastcgi_temp_path run/fastcgi;
    uwsgi_temp_path run/uwsgi;
    scgi_temp_path run/scgi;

    # Who says nothing, or little, is let go: the TLS handshake and the header of a request have {HEADER_SECONDS} s each, bodies
    # and answers may stand still for {STILL_SECONDS} s, and an address has at most {REQUESTS} requests at a time.
    client_header_timeout {HEADER_SECONDS}s;
    client_body_timeout {STILL_SECONDS}s;
    send_timeout {STILL_SECONDS}s;
    lingering_timeout 5s;
    reset_timedout_connection on;
    large_client_header_buffers 4 8k;
    limit_conn_zone $binary_remote_addr zone=addresses:10m;
    limit_conn addresses {REQUESTS};
    limit_conn_status 429;
    limit_conn_log_level info;

    upstream superlink {{
        server 127.0.0.1:{plan.superlink_port};
        keepalive 32;
    }}

    server {{
        listen {anywhere}:{plan.public_port} ssl{both};
        ssl_certificate server.pem;
        ssl_certificate_key server.key;
        ssl_protocols TLSv1.2 TLSv1.3;
        keepalive_timeout {KEPT_SECONDS}s;
        client_max_body_size {LARGEST_BODY};

        location / {{
            keepalive_timeout 0;
            return 404;
        }}

        location ~ "^/v1/fleet/(?<word>[a-z]+(-[a-z]+)*)$" {{
            limit_except POST {{
                deny all;
            }}
            proxy_pass https://superlink/v1/fleet/$word;
            proxy_ssl_verify on;
            proxy_ssl_trusted_certificate ca.pem;
            proxy_ssl_name localhost;
            proxy_ssl_session_reuse on;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host localhost;
            proxy_request_buffering off;
            proxy_buffering off;
            proxy_connect_timeout 5s;
            proxy_read_timeout 300s;
        }}
    }}
}}
"""
