"""The network between a node and the server, and what the server's ports answer."""

from __future__ import annotations

import errno
import http.client
import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

from fedtune.deploy.check.files import RENEW, SOON
from fedtune.deploy.check.findings import Finding, good, warn, wrong

SECONDS = 5.0  # to wait for an answer
AHEAD, BEHIND = 5.0, 300.0  # seconds; Flower refuses signatures from further in the future or the past
UNSIGNED = 401  # what the SuperLink says to an empty call that is not signed
GONE = (502, 503, 504)  # what the proxy says without a SuperLink
CLOSED = (403, 404, 405)
FLEET = "/v1/fleet/pull-messages"
FORBIDDEN = (
    ("POST", "/v1/control/list-runs"),
    ("POST", "/v1/control/list-nodes"),
    ("GET", "/health"),
    ("GET", "/openapi.json"),
)
"""All of these a SuperLink answers, and none of them changes anything; through the proxy nobody may reach it."""

_EXPIRED, _NOT_YET, _WRONG_NAME, _WRONG_ADDRESS = 10, 9, 62, 64  # OpenSSL's X509_V_ERR numbers


@dataclass(frozen=True)
class Place:
    """Where to connect, and the name that the certificate there has to be for."""

    host: str
    port: int
    name: str
    authority: Path

    @property
    def spelled(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class _Connection(http.client.HTTPSConnection):
    """HTTPS to a place whose certificate may be for another name than the one that is connected to."""

    def __init__(self, place: Place) -> None:
        super().__init__(place.host, place.port, timeout=SECONDS)
        self._place = place

    def connect(self) -> None:
        context = ssl.create_default_context(cafile=str(self._place.authority))
        plain = socket.create_connection((self._place.host, self._place.port), SECONDS)
        try:
            self.sock = context.wrap_socket(plain, server_hostname=self._place.name)
        except BaseException:
            plain.close()
            raise


def parse_address(text: str) -> tuple[str, int]:
    """'host:port' or '[address]:port'. Raises ValueError for anything else."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"'{text}' is not host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)


def server_from_here(place: Place) -> Iterator[Finding]:
    """Reachable, its certificate, its clock, the SuperLink behind it, and what must not answer."""
    try:
        with socket.create_connection((place.host, place.port), SECONDS):
            pass
    except OSError as error:
        yield wrong("server", f"{place.spelled} cannot be reached ({error.strerror or error}).", _unreachable(error))
        return
    handshake = list(certificate_at(place))
    yield from handshake
    if any(finding.fix and finding.state == "problem" for finding in handshake):
        return
    try:
        yield from clock(place)
        yield fleet(place)
        yield from exposed(place)
    except (OSError, http.client.HTTPException) as error:
        yield wrong("server", f"{place.spelled} does not speak HTTP as expected ({error}).", "Is it our proxy's port?")


def _unreachable(error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return "Correct SERVER in node.env, or the name's DNS entry."
    if isinstance(error, ConnectionRefusedError):
        return "Start the proxy on the server (./start.sh); nothing listens on that port."
    return "Open the port in the server's firewall, and outgoing connections to it in this network's."


def certificate_at(place: Place) -> Iterator[Finding]:
    """The certificate that is shown there, as a SuperNode sees it."""
    try:
        context = ssl.create_default_context(cafile=str(place.authority))
    except (OSError, ssl.SSLError):
        return  # `files.authority` has said so
    try:
        with (
            socket.create_connection((place.host, place.port), SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=place.name) as secure,
        ):
            shown = secure.getpeercert() or {}
    except ssl.SSLCertVerificationError as error:
        yield wrong(
            "certificate",
            f"{place.spelled} shows a certificate that is refused: {error.verify_message}.",
            _refused(error, place),
        )
        return
    except (ssl.SSLError, OSError) as error:
        yield wrong(
            "certificate",
            f"{place.spelled} does not speak TLS ({error}).",
            "Another program listens there: stop it, or change the port.",
        )
        return
    end = datetime.fromtimestamp(ssl.cert_time_to_seconds(str(shown["notAfter"])), UTC)
    text = f"{place.spelled} shows a certificate for '{place.name}' of our CA, valid until {end:%Y-%m-%d}."
    yield warn("certificate", text, RENEW) if end - datetime.now(UTC) < SOON else good("certificate", text)


def _refused(error: ssl.SSLCertVerificationError, place: Place) -> str:
    if error.verify_code == _EXPIRED:
        return RENEW
    if error.verify_code == _NOT_YET:
        return "Set the clocks of both machines (NTP)."
    if error.verify_code in (_WRONG_NAME, _WRONG_ADDRESS):
        return (
            f"Connect by a name that the certificate is for, or add '{place.name}' to \"hosts\" in deployment.json and renew."
        )
    return "It is from another CA: copy ca.pem from the server's folder; if it is the same, somebody is in between."


def clock(place: Place) -> Iterator[Finding]:
    """This clock against the Date that the server sends; signatures are refused if they come from too far away."""
    before = time.time()
    _, date = _ask(place, "GET", "/")
    middle = (before + time.time()) / 2
    if not date:
        yield warn("clock", "The server sends no date.", "Compare the clocks of both machines by hand.")
        return
    ahead = middle - parsedate_to_datetime(date).timestamp() - 0.5  # the header's seconds are cut off
    text = f"This clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the server's."
    fix = f"Set the clocks with NTP (`timedatectl set-ntp true`): Flower allows {AHEAD:.0f} s ahead, {BEHIND:.0f} s behind."
    if ahead > AHEAD or ahead < -BEHIND:
        yield wrong("clock", text, fix)
    elif ahead > AHEAD / 2 or ahead < -BEHIND / 2:
        yield warn("clock", text, fix)
    else:
        yield good("clock", text)


def fleet(place: Place) -> Finding:
    """Whether the SuperLink answers behind the proxy and wants a signature."""
    status, _ = _ask(place, "POST", FLEET)
    if status == UNSIGNED:
        return good("fleet API", f"The SuperLink answers at {place.spelled} and refuses a call without signature.")
    if status in GONE:
        return wrong(
            "fleet API",
            f"The proxy at {place.spelled} has no SuperLink behind it ({status}).",
            "Start it: ./start.sh on the server.",
        )
    return wrong(
        "fleet API",
        f"{place.spelled} answers {status} to a call of the fleet API.",
        "Let the proxy run with the nginx.conf of this deployment.",
    )


def exposed(place: Place) -> Iterator[Finding]:
    """Flower's control API and what comes with it must not answer where the network is."""
    found = [
        f"{method} {path} ({status})"
        for method, path in FORBIDDEN
        if (status := _ask(place, method, path)[0]) not in (*CLOSED, *GONE)
    ]
    if found:
        yield wrong(
            "control API",
            f"{place.spelled} answers {', '.join(found)}: whoever reaches that port can run code on all nodes.",
            "Stop it now. Only the proxy may listen there, with the nginx.conf of this deployment; the SuperLink on 127.0.0.1.",
        )
    else:
        yield good("control API", f"It does not answer at {place.spelled}.")


def _ask(place: Place, method: str, path: str) -> tuple[int, str]:
    """Status and Date of the answer to an empty request."""
    connection = _Connection(place)
    try:
        connection.request(
            method, path, body=b"" if method == "POST" else None, headers={"Content-Type": "application/protobuf"}
        )
        answer = connection.getresponse()
        answer.read()
        return answer.status, answer.getheader("Date", "")
    finally:
        connection.close()


def port_free(host: str, port: int) -> OSError | None:
    """None if a program could listen there, else why not."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(1)
    except OSError as error:
        return error
    return None


def own_port(check: str, name: str, port: int) -> tuple[Finding, bool]:
    """Whether our program `name` can listen on `port`, or does so; the second value says that it does."""
    error = port_free("127.0.0.1", port)
    if error is None:
        return good(check, f"Port {port} is free; {name} does not run yet."), False
    if error.errno == errno.EACCES:
        return wrong(
            check, f"Only root may listen on port {port}.", "Use a port from 1024 on, or the systemd unit, which may."
        ), False
    if _speaks_tls(port):
        return good(check, f"{name} listens on port {port}."), True
    return wrong(
        check, f"Port {port} is taken by another program.", "Stop it (`ss -ltnp` names it), or change the port."
    ), False


def _speaks_tls(port: int) -> bool:
    """Whether something on loopback speaks TLS; whose certificate it shows is for others to judge."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with socket.create_connection(("127.0.0.1", port), SECONDS) as plain, context.wrap_socket(plain):
            return True
    except (OSError, ssl.SSLError):
        return False


def beyond_loopback(hosts: Sequence[str], port: int) -> Iterator[Finding]:
    """The SuperLink's port, tried at the addresses of this machine that are not loopback."""
    for address in _addresses(hosts):
        try:
            with socket.create_connection((address, port), SECONDS / 2):
                pass
        except OSError:
            continue
        yield wrong(
            "control API",
            f"The SuperLink's port {port} answers at {address}.",
            "Let the SuperLink listen on 127.0.0.1 only: superlink.sh.",
        )
        return
    yield good("control API", f"The SuperLink's port {port} answers on loopback only.")


def _addresses(hosts: Sequence[str]) -> list[str]:
    found: dict[str, None] = {}
    for host in (*hosts, socket.gethostname()):
        try:
            found |= {str(entry[4][0]): None for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
        except OSError:
            continue
    return [address for address in found if not address.startswith("127.") and address != "::1"]
