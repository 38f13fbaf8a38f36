"""The optional signature of a repo: `model.sig`, in the OpenSSF Model Signing format, by an EC key or a certificate.

It covers every file of the repo by sha256 but those of IGNORED: itself, the card with its images, which change often and
which people may edit on the hub, and what git and the client of the hub keep beside a download. `model_signing verify key`
of the package `model-signing` checks it as well as `publish verify` does.

The package is an optional extra: without it nothing is signed, and what is signed is shown as not checked. Hashes that are
known already are handed to it, so that no weight is read twice, and a repo can be checked by the hashes that the hub tells.
ECDSA signatures are random: one is only made anew where content, key or certificate changed, else a push would never be
up to date.

The key's path and password (PASSWORD) are in no message, and in no file that is pushed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from inference.errors import InputError
from inference.strict import parse_json

from .schema import Check, SignSpec
from .store import write_bytes
from .variants import Project
from .verify import SIGNATURE

# ruff: noqa: PLC0415 - the package and what it stands on are an optional extra

IGNORED = (SIGNATURE, "README.md", "images", ".cache", ".git", ".gitattributes", ".gitignore", ".github")
PASSWORD = "PUBLISH_SIGN_PASSWORD"  # noqa: S105 - of a variable
INSTALL = "pip install 'mlx-publish[signing]'"
MAX_BYTES = 10 << 20  # of a signature; one of a ladder with a thousand shards has 200 kB
MAX_KEY_BYTES = 1 << 20
CURVES = {"secp256r1": 256, "secp384r1": 384, "secp521r1": 512}  # with the bits of SHA-2 that go with each
STATEMENT, PREDICATE = "https://in-toto.io/Statement/v1", "https://model_signing/signature/v1.0"
BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"


@dataclass(frozen=True)
class Trust:
    """What a signature is checked with: a public key, or certificates that are trusted. Neither: it cannot be checked."""

    public_key: Path | None = None
    certificates: tuple[Path, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.public_key or self.certificates)


@dataclass(frozen=True)
class Signed:
    """A signature as it reads, which proves nothing yet. files: sha256 by path; by: what tells who signed."""

    files: Mapping[str, str]
    ignored: frozenset[str]
    by: str


# ------------------------------------------------------------------------------------------------ reading


def read_signature(data: bytes) -> Signed:
    """Raises InputError for what is no signature of files by sha256."""
    try:
        if len(data) > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES} bytes")
        bundle = parse_json(data)
        if bundle["mediaType"] != BUNDLE:
            raise ValueError(f"media type {str(bundle['mediaType'])[:60]!r}")
        statement = parse_json(base64.b64decode(bundle["dsseEnvelope"]["payload"], validate=True))
        if (statement["_type"], statement["predicateType"]) != (STATEMENT, PREDICATE):
            raise ValueError(f"predicate {str(statement['predicateType'])[:60]!r}")
        serialization = statement["predicate"]["serialization"]
        if serialization["method"] != "files" or serialization["hash_type"] != "sha256":
            raise ValueError("expected whole files by sha256")
        rows = statement["predicate"]["resources"]
        files = {_text(row["name"]): _text(row["digest"]) for row in rows if row["algorithm"] == "sha256"}
        if len(files) != len(rows):
            raise ValueError("a file twice, or not by sha256")
        ignored = frozenset(map(_text, serialization.get("ignore_paths") or ()))
        return Signed(files, ignored, _signer(bundle["verificationMaterial"]))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        reason = str(e) if type(e) is ValueError else "does not read"
        raise InputError(f"{SIGNATURE}: is no signature in the Model Signing format ({reason[:120]})") from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a name or hash that is no text")
    return value


def _signer(material: Any) -> str:
    if "publicKey" in material:
        return _text(material["publicKey"].get("hint") or "")
    chain = material["x509CertificateChain"]["certificates"]
    return hashlib.sha256(base64.b64decode(chain[0]["rawBytes"], validate=True)).hexdigest()


def is_ignored(path: str, ignored: frozenset[str] | Sequence[str] = IGNORED) -> bool:
    """Whether a path is one of these, or lies in a folder that is one. Default: what no signature of ours covers."""
    return any(path == name or path.startswith(f"{name}/") for name in ignored)


def covers(signed: Signed, files: Mapping[str, str]) -> str:
    """The first way in which a signature is not of these files (sha256 by path), or "". What nobody may leave out counts
    even if the signature says that it is ignored."""
    for path, sha256 in _relevant(signed, files).items():
        if path not in signed.files:
            return f"{path} is not signed"
        if signed.files[path] != sha256:
            return f"{path} is not the file that was signed"
    gone = sorted(path for path in signed.files if path not in files)
    return f"{gone[0]} was signed and is not there" if gone else ""


def _relevant(signed: Signed, files: Mapping[str, str]) -> dict[str, str]:
    """What must be signed, and what of the rest is."""
    return {path: files[path] for path in sorted(files) if path in signed.files or not is_ignored(path)}


# ------------------------------------------------------------------------------------------------ signing


def with_key(project: Project, key: Path | None) -> Project:
    """The project with the key of an option in place of the one in variants.yaml."""
    if key is None:
        return project
    spec = (project.ladder.sign or SignSpec()).model_copy(update={"key": str(key.absolute())})
    return replace(project, ladder=project.ladder.model_copy(update={"sign": spec}))


def make_signature(project: Project, id: str, files: Mapping[str, str]) -> bytes | None:
    """A new model.sig of a variant, which nobody has written yet; None if the one that is there is up to date, or if neither
    variants.yaml nor an option names a key.

    files: sha256 by path, of all that is pushed. Raises InputError for a key that cannot be used.
    """
    spec = project.ladder.sign
    if spec is None or spec.key is None:
        return None
    _require()
    folder = project.store.variant(id)
    path = folder / SIGNATURE
    signer, private, by = _make_signer(project, spec)
    data = _read(path) if path.is_file() else b""
    wanted = {p: sha for p, sha in files.items() if not is_ignored(p)}
    if _is_of(data, wanted, by) and _intact(data, private):
        return None
    with tempfile.TemporaryDirectory() as temp:
        made = Path(temp) / SIGNATURE
        signer.set_hashing_config(_hashing(wanted)).sign(folder, made)
        return made.read_bytes()


def write_signature(folder: Path, data: bytes) -> None:
    """Put a signature that `make_signature` made into the folder of its variant."""
    write_bytes(folder / SIGNATURE, data)


def stale(folder: Path, files: Mapping[str, str]) -> str:
    """Why a signature that lies in the folder is not of these files; "" if it is, or if there is none."""
    path = folder / SIGNATURE
    if not path.is_file():
        return ""
    try:
        return covers(read_signature(_read(path)), files)
    except InputError as e:
        return str(e)


def _is_of(data: bytes, wanted: Mapping[str, str], by: str) -> bool:
    try:
        old = read_signature(data)
    except InputError:
        return False
    return (dict(old.files), old.ignored, old.by) == (wanted, frozenset(IGNORED), by)


def _intact(data: bytes, private: Any) -> bool:
    """Whether a signature that reads as it should was made by this key."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        envelope = json.loads(data)["dsseEnvelope"]
        payload, kind = base64.b64decode(envelope["payload"]), _text(envelope["payloadType"]).encode()
        signature = base64.b64decode(envelope["signatures"][0]["sig"])
        digest = getattr(hashes, f"SHA{CURVES[private.curve.name]}")()
        # DSSE's encoding of what is signed: https://github.com/secure-systems-lab/dsse/blob/v1.0.0/protocol.md
        pae = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
        private.public_key().verify(signature, pae, ec.ECDSA(digest))
    except (InvalidSignature, ValueError, KeyError, LookupError, TypeError):
        return False
    return True


def _read(path: Path) -> bytes:
    with open(path, "rb") as f:
        return f.read(MAX_BYTES + 1)


def _make_signer(project: Project, spec: SignSpec) -> tuple[Any, Any, str]:
    """A signing configuration, its private key, and what tells its signer in the signature."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
    from model_signing import signing

    assert spec.key is not None
    key = project.local(spec.key)
    private, secret = _private_key(key)
    if spec.certificate is None:
        public = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        config = signing.Config().use_elliptic_key_signer(private_key=key, password=secret)
        return config, private, hashlib.sha256(public).hexdigest()
    if secret is not None:
        raise InputError("the signing key is encrypted, which the package does not take together with a certificate")
    certificate, chain = project.local(spec.certificate), [project.local(name) for name in spec.chain]
    der = _certificate(certificate, "sign.certificate")
    if not chain:
        raise InputError("sign.chain: expected the certificates above sign.certificate, or that one itself again")
    for path in chain:
        _certificate(path, "sign.chain")
    try:
        config = signing.Config().use_certificate_signer(
            private_key=key, signing_certificate=certificate, certificate_chain=chain
        )
    except ValueError:
        raise InputError("sign.certificate: is of another key") from None
    return config, private, hashlib.sha256(der).hexdigest()


def _private_key(path: Path) -> tuple[Any, Any]:
    """The key, and the password that it took, as the package wants it."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    password = os.environ.get(PASSWORD)
    data = _key_bytes(path, "the signing key")
    # the package says text, and hands it on to what takes bytes
    secret = password.encode() if password and b"ENCRYPTED" in data else None
    try:
        private = load_pem_private_key(data, secret)
    except TypeError:
        raise InputError(f"the signing key is encrypted: set {PASSWORD}") from None
    except (ValueError, UnsupportedAlgorithm):
        wrong = f"{PASSWORD} does not open the signing key" if secret else "the signing key is no private key in PEM"
        raise InputError(wrong) from None
    if not isinstance(private, ec.EllipticCurvePrivateKey) or private.curve.name not in CURVES:
        raise InputError("the signing key is no EC key on P-256, P-384 or P-521")
    return private, secret


def _certificate(path: Path, what: str) -> bytes:
    """A certificate in DER; of a file with several, the first."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    try:
        return x509.load_pem_x509_certificates(_key_bytes(path, what))[0].public_bytes(Encoding.DER)
    except ValueError:
        raise InputError(f"{what}: is no certificate in PEM") from None


def _key_bytes(path: Path, what: str) -> bytes:
    """A PEM file. Its path is nobody's business."""
    try:
        with open(path, "rb") as f:
            data = f.read(MAX_KEY_BYTES + 1)
    except OSError as e:
        raise InputError(f"{what}: cannot be read ({e.strerror})") from None
    if len(data) > MAX_KEY_BYTES:
        raise InputError(f"{what}: larger than {MAX_KEY_BYTES} bytes")
    return data


# ------------------------------------------------------------------------------------------------ checking


def trust_of(project: Project | None, public_key: Path | None, certificates: Sequence[Path]) -> Trust:
    """What options say, else variants.yaml."""
    if public_key or certificates or project is None or project.ladder.sign is None:
        return Trust(public_key, tuple(certificates))
    spec = project.ladder.sign
    if spec.public_key:
        return Trust(project.local(spec.public_key))
    return Trust(None, tuple(project.local(name) for name in spec.chain))


def check_signature(data: bytes | None, files: Mapping[str, str], trust: Trust) -> list[Check]:
    """Whether model.sig is of these files and by somebody trusted. data None: there is none, which is a fault only where
    one was expected: a key was given. files: sha256 by path, of the whole repo."""
    if data is None:
        return [_no("there is none")] if trust else []
    try:
        signed = read_signature(data)
    except InputError as e:
        return [_no(str(e).removeprefix(f"{SIGNATURE}: "))]
    fault = covers(signed, files)
    if fault:
        return [_no(fault)]
    if not trust:
        return [_unknown("present and of these files, not checked by whom: give --public-key or --certificate")]
    if not installed():
        return [_unknown(f"signature present, not checked: {INSTALL}")]
    fault = _verify(data, _relevant(signed, files), trust)
    by = f"{len(signed.files)} files, by {'key' if trust.public_key else 'certificate'} {signed.by[:12]}"
    return [_no(fault) if fault else Check(name="signature", passed=True, detail=by)]


def _no(detail: str) -> Check:
    return Check(name="signature", passed=False, detail=detail)


def _unknown(detail: str) -> Check:
    return Check(name="signature", passed=None, detail=detail)


def _verify(data: bytes, files: Mapping[str, str], trust: Trust) -> str:
    """files: those that are signed. What the package says against a signature; "" if nothing."""
    from cryptography.exceptions import InvalidSignature
    from model_signing import verifying
    from OpenSSL import crypto

    try:
        if trust.public_key:
            _key_bytes(trust.public_key, "--public-key")
            config = verifying.Config().use_elliptic_key_verifier(public_key=trust.public_key)
        else:
            for path in trust.certificates:
                _key_bytes(path, "--certificate")
            config = verifying.Config().use_certificate_verifier(certificate_chain=trust.certificates)
    except ValueError:
        what = "--public-key: is no public EC key" if trust.public_key else "--certificate: is no certificate"
        raise InputError(f"{what} in PEM") from None
    with tempfile.TemporaryDirectory() as temp:
        path = Path(temp) / SIGNATURE
        path.write_bytes(data)
        try:
            config.set_hashing_config(_hashing(files)).verify(Path(temp), path)
        except InvalidSignature:
            return "the signature does not fit what it says"
        except (crypto.Error, crypto.X509StoreContextError) as e:
            return f"its certificate is not trusted ({_line(e)})"
        except (ValueError, KeyError, TypeError, AttributeError, LookupError) as e:
            return "by another key" if "Key mismatch" in str(e) else f"not valid ({_line(e)})"
    return ""


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


# ------------------------------------------------------------------------------------------------ the package


def installed() -> bool:
    """Whether the extra `signing` is here."""
    try:
        import model_signing  # noqa: F401
    except ImportError:
        return False
    return True


def _require() -> None:
    if not installed():
        raise InputError(f"signing needs the package model-signing: {INSTALL}")


def _hashing(files: Mapping[str, str]) -> Any:
    """The package's hashing, with hashes that are known: it would read all weights once more."""
    from model_signing import hashing, manifest
    from model_signing._hashing.hashing import Digest

    class Known(hashing.Config):
        def hash(self, model_path: Any, *, files_to_hash: Any = None) -> manifest.Manifest:
            kind = manifest.SerializationType.from_args(
                {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": list(IGNORED)}
            )
            items = [kind.new_item(path, Digest("sha256", bytes.fromhex(sha))) for path, sha in files.items()]
            return manifest.Manifest(Path(model_path).name, items, kind)

    return Known()
