"""Files of one machine: keys that nobody else reads, certificates that fit together, the model, the node's data."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedtune.data.files import read_rows
from fedtune.deploy.certificates import covers, names_of
from fedtune.deploy.check.findings import Finding, good, warn, wrong
from fedtune.deploy.weights import weights_fingerprint
from fedtune.errors import DataError, ModelError

SOON = timedelta(days=30)
RENEW = "Run `fedtune deploy init DIR --renew` where the CA is, copy server.pem and server.key here, `./proxy.sh -s reload`."
_AGAIN = "Copy the folder again from where `fedtune deploy init` wrote it."


def keys(folder: Path, names: Sequence[str]) -> Iterator[Finding]:
    """Private keys: there, readable, and by their owner only. The CA's key must not be on a machine of the deployment."""
    for name in names:
        path = folder / name
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
            path.read_bytes()
        except OSError as error:
            yield wrong("keys", f"'{path}' cannot be read: {error.strerror}.", _AGAIN)
            continue
        if mode & 0o077:
            yield wrong("keys", f"'{path}' can be read by others (mode {mode:o}).", f"Run `chmod 600 '{path}'`.")
        else:
            yield good("keys", f"{name} is readable by its owner only.")
    for path in sorted(folder.rglob("ca.key")):
        yield wrong(
            "keys", f"'{path}', the key of the CA, is on this machine.", "Move it to where nobody works: it signs servers."
        )


def node_key(path: Path) -> Iterator[Finding]:
    """The SuperNode's key is of a kind that Flower takes; that it is readable is said by `keys`."""
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), None)
    except OSError:
        return
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        yield wrong("node key", f"'{path}' is not an OpenSSH private key without passphrase ({error}).", _AGAIN)
        return
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        kind = type(key).__name__.strip("_").removesuffix("PrivateKey")
        yield wrong(
            "node key", f"'{path}' is an {kind} key, which Flower refuses (exit code 302).", "Use ECDSA on P-384: " + _AGAIN
        )


def authority(path: Path) -> Iterator[Finding]:
    """The CA's certificate."""
    try:
        certificates = x509.load_pem_x509_certificates(path.read_bytes())
    except OSError as error:
        yield wrong("CA", f"'{path}' cannot be read: {error.strerror}.", _AGAIN)
        return
    except ValueError as error:
        yield wrong("CA", f"'{path}' is not a certificate in PEM ({error}).", _AGAIN)
        return
    yield from (
        _dates("CA", path.name, certificate, "Make a new deployment, or a new CA: docs/deployment.md.")
        for certificate in certificates
    )


def server_certificate(folder: Path, hosts: Sequence[str]) -> Iterator[Finding]:
    """server.pem: from this CA, for these hosts, in time, and of this key."""
    try:
        certificate = x509.load_pem_x509_certificate((folder / "server.pem").read_bytes())
        issuers = x509.load_pem_x509_certificates((folder / "ca.pem").read_bytes())
        key = serialization.load_pem_private_key((folder / "server.key").read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        yield wrong("certificate", f"server.pem, server.key or ca.pem cannot be used ({error}).", _AGAIN)
        return
    yield _dates("certificate", "server.pem", certificate, RENEW)
    if not any(_signed_by(certificate, issuer) for issuer in issuers):
        yield wrong("certificate", "server.pem is not signed by the CA in ca.pem.", RENEW)
    if key.public_key() != certificate.public_key():
        yield wrong("certificate", "server.pem and server.key do not belong together.", "Copy both from the same `--renew`.")
    names = names_of(certificate)
    for host in hosts:
        if not covers(names, host):
            yield wrong("certificate", f"server.pem is for {', '.join(names)}, not for '{host}' of HOSTS.", _OTHER_NAME)


_OTHER_NAME = 'Put the name into "hosts" of deployment.json where the CA is, then renew: `fedtune deploy init DIR --renew`.'


def _signed_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _dates(check: str, name: str, certificate: x509.Certificate, fix: str) -> Finding:
    now, end = datetime.now(UTC), certificate.not_valid_after_utc
    if now > end:
        return wrong(check, f"{name} expired on {end:%Y-%m-%d}.", fix)
    if now < certificate.not_valid_before_utc:
        return wrong(
            check,
            f"{name} is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC on only.",
            "Set this machine's clock.",
        )
    if end - now < SOON:
        return warn(check, f"{name} expires on {end:%Y-%m-%d}.", fix)
    return good(check, f"{name} is valid until {end:%Y-%m-%d}.")


def model(settings: Mapping[str, str], required: bool) -> Finding:
    """The model folder, and its weights against the fingerprint that the server recorded."""
    path, expected = settings.get("MODEL", ""), settings.get("MODEL_FINGERPRINT", "")
    if not path:
        state = wrong if required else warn
        return state("model", "MODEL is empty.", "Set MODEL in the .env file to the absolute path of the model's folder.")
    if not Path(path).is_absolute():
        return wrong(
            "model", f"MODEL = '{path}' is not absolute, and programs start in another folder.", "Give the whole path."
        )
    try:
        found = weights_fingerprint(Path(path))
    except ModelError as error:
        return wrong("model", str(error), "Copy the server's model folder, or correct MODEL in the .env file.")
    if expected and found != expected:
        return wrong(
            "model",
            f"The weights in '{path}' have fingerprint {found}, the server's have {expected}.",
            "Copy the server's model folder; if the server's model is new, put its fingerprint into MODEL_FINGERPRINT.",
        )
    compared = "the server's" if expected else "not compared: MODEL_FINGERPRINT is empty"
    return good("model", f"'{path}', weights {found} ({compared}).")


def data(path: str) -> Finding:
    """The node's data file: there, readable, with rows."""
    fix = "Set DATA in node.env to the absolute path of a .jsonl, .json or .parquet file that this user can read."
    if not path:
        return wrong("data", "DATA is empty.", fix)
    if not Path(path).is_absolute():
        return wrong("data", f"DATA = '{path}' is not absolute, and programs start in another folder.", fix)
    try:
        rows = read_rows(path)
    except DataError as error:
        return wrong("data", str(error), fix)
    if not rows:
        return wrong("data", f"'{path}' has no rows.", fix)
    return good("data", f"'{path}', {len(rows)} rows with columns {', '.join(map(str, rows[0]))}.")
