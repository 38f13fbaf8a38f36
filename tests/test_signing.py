"""`model.sig`: signed with a local key or certificate, made anew only when something changed, and checked by both tools."""

from __future__ import annotations

import base64
import datetime
import json
import subprocess
import sys

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import NameOID
from huggingface_hub import HfApi
from pushes import WRITE
from variant_folder import LADDER, make_project, make_variant

from inference.errors import InputError
from publisher import signing
from publisher.push_plan import local_files
from publisher.signing import (
    PASSWORD,
    SIGNATURE,
    Trust,
    check_signature,
    make_signature,
    read_signature,
    stale,
    with_key,
    write_signature,
)
from publisher.variants import load_project
from publisher.verification import signed_here

SECRET = "correct horse battery"
ID = "Q2_K_XL"
REPO = f"demo/Qwen3.5-tiny-UD-{ID}-mlx"


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """key.pem, key.pub, locked.pem (the same with a password), other.pub, rsa.pem, leaf.pem signed by root.pem, stranger.pem."""
    folder = tmp_path_factory.mktemp("keys")
    key, other, authority = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
    big = rsa.generate_private_key(65537, 2048)

    def private(name, key, lock):
        (folder / name).write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, lock))

    def public(name, key):
        (folder / name).write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))

    private("key.pem", key, NoEncryption())
    private("locked.pem", key, BestAvailableEncryption(SECRET.encode()))
    private("other.pem", other, NoEncryption())
    private("rsa.pem", big, NoEncryption())
    public("key.pub", key)
    public("other.pub", other)
    root = certificate("root", authority, "root", authority, True)
    (folder / "root.pem").write_bytes(root.public_bytes(Encoding.PEM))
    leaf = certificate("publisher", key, "root", authority, False)
    (folder / "leaf.pem").write_bytes(leaf.public_bytes(Encoding.PEM))
    (folder / "stranger.pem").write_bytes(certificate("root", other, "root", other, True).public_bytes(Encoding.PEM))
    return folder


def certificate(name, key, issuer, issuer_key, authority):
    def named(common):
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])

    now = datetime.datetime.now(datetime.UTC)
    usage = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    made = (
        x509.CertificateBuilder().subject_name(named(name)).issuer_name(named(issuer)).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=9)).add_extension(x509.BasicConstraints(authority, None), True)
        .add_extension(
            x509.KeyUsage(digital_signature=not authority, key_cert_sign=authority, crl_sign=authority, **usage), True
        )
    )  # fmt: skip
    return made.sign(issuer_key, hashes.SHA256())


def contents(project):
    return {f.path: f.sha256 for f in local_files(project, "Q4")[1]}


def sign_folder(project, id, files):
    made = make_signature(project, id, files)
    if made is not None:
        write_signature(project.store.variant(id), made)
    return made is not None


def sign(project, key):
    return sign_folder(with_key(project, key), "Q4", contents(project))


def checked(folder, **trust):
    (check,) = check_signature(*signed_here(folder), Trust(**trust))
    return check.passed, check.detail


# ------------------------------------------------------------------------------------------------ signing


def test_what_is_signed_is_checked_with_the_public_key(project, folder, keys):
    assert sign(project, keys / "key.pem")
    passed, detail = checked(folder, public_key=keys / "key.pub")
    assert passed, detail
    assert detail.startswith("7 files, by key ")
    assert checked(folder, public_key=keys / "other.pub") == (False, "by another key")


def test_every_file_is_covered_but_the_card_and_itself(project, folder, keys):
    (folder / "images").mkdir()
    (folder / "images/kld.png").write_bytes(b"x")
    sign(project, keys / "key.pem")
    signed = read_signature((folder / SIGNATURE).read_bytes())
    assert set(signed.files) == set(contents(project)) - {SIGNATURE, "README.md", "images/kld.png"}
    (folder / "README.md").write_text("another card")
    assert checked(folder, public_key=keys / "key.pub")[0]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json is not the file that was signed"),
        (lambda f: (f / "LICENSE").unlink(), "LICENSE was signed and is not there"),
        (lambda f: (f / "model-00003-of-00003.safetensors").touch(), "model-00003-of-00003.safetensors is not signed"),
    ],
)
def test_another_file_is_told_by_name_with_a_key_and_without(change, told, project, folder, keys):
    sign(project, keys / "key.pem")
    change(folder)
    assert checked(folder, public_key=keys / "key.pub") == (False, told)
    assert checked(folder) == (False, told)


def test_a_signature_is_only_made_anew_when_content_or_key_changed(project, folder, keys):
    assert sign(project, keys / "key.pem")
    first = (folder / SIGNATURE).read_bytes()
    assert not sign(project, keys / "key.pem")
    (folder / "README.md").write_text("another card")
    assert not sign(project, keys / "key.pem")
    assert (folder / SIGNATURE).read_bytes() == first
    assert sign(project, keys / "other.pem")
    assert checked(folder, public_key=keys / "other.pub")[0]
    make_variant(project, seed=1)
    assert stale(folder, contents(project)) == "manifest.json is not the file that was signed"
    assert sign(project, keys / "other.pem")
    assert stale(folder, contents(project)) == ""


@pytest.mark.parametrize("damage", ["sig", "payload", "nothing of it"])
def test_a_damaged_signature_is_found_and_made_anew(damage, project, folder, keys):
    sign(project, keys / "key.pem")
    bundle = json.loads((folder / SIGNATURE).read_text())
    envelope = bundle["dsseEnvelope"]
    if damage == "sig":
        der = bytearray(base64.b64decode(envelope["signatures"][0]["sig"]))
        der[-1] ^= 1
        envelope["signatures"][0]["sig"] = base64.b64encode(der).decode()
    if damage == "payload":  # what it says stays true, and is no longer what was signed
        envelope["payload"] = base64.b64encode(base64.b64decode(envelope["payload"]) + b" ").decode()
    (folder / SIGNATURE).write_text(json.dumps(bundle) if damage != "nothing of it" else "{}")
    passed, detail = checked(folder, public_key=keys / "key.pub")
    assert passed is False
    assert detail == (
        "is no signature in the Model Signing format (does not read)"
        if damage == "nothing of it"
        else "the signature does not fit what it says"
    )
    assert sign(project, keys / "key.pem")
    assert checked(folder, public_key=keys / "key.pub")[0]


def test_a_certificate_is_trusted_by_what_is_above_it(tmp_path, keys):
    spec = f"sign: {{key: {keys}/key.pem, certificate: {keys}/leaf.pem, chain: [{keys}/root.pem]}}\n"
    project = make_project(tmp_path, LADDER + spec)
    make_variant(project)
    folder = project.store.variant("Q4")
    assert sign(project, None)
    assert not sign(project, None)
    passed, detail = checked(folder, certificates=(keys / "root.pem",))
    assert passed, detail
    passed, detail = checked(folder, certificates=(keys / "stranger.pem",))
    assert passed is False
    assert detail.startswith("its certificate is not trusted (")
    assert check_signature(*signed_here(folder), signing.trust_of(project, None, ()))[0].passed, "sign.chain is trusted"


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("{key: KEYS/none.pem}", "the signing key: cannot be read (No such file or directory)"),
        ("{key: KEYS/key.pub}", "the signing key is no private key in PEM"),
        ("{key: KEYS/rsa.pem}", "the signing key is no EC key on P-256, P-384 or P-521"),
        ("{key: KEYS/locked.pem}", "the signing key is encrypted: set PUBLISH_SIGN_PASSWORD"),
        ("{key: KEYS/other.pem, certificate: KEYS/leaf.pem, chain: [KEYS/root.pem]}", "sign.certificate: is of another key"),
        ("{key: KEYS/key.pem, certificate: KEYS/key.pem, chain: [KEYS/root.pem]}", "sign.certificate: is no certificate in PEM"),
        ("{key: KEYS/key.pem, certificate: KEYS/leaf.pem}", "sign.chain: expected the certificates above"),
    ],
)  # fmt: skip
def test_a_key_that_cannot_be_used_is_one_line_without_its_path(spec, told, tmp_path, keys):
    project = make_project(tmp_path, LADDER + f"sign: {spec.replace('KEYS', str(keys))}\n")
    make_variant(project)
    with pytest.raises(InputError) as e:
        sign(project, None)
    assert str(e.value).startswith(told)
    assert str(keys) not in str(e.value)
    assert not (project.store.variant("Q4") / SIGNATURE).exists()


def test_the_password_comes_from_the_environment_and_is_in_no_message(project, folder, keys, monkeypatch):
    monkeypatch.setenv(PASSWORD, "wrong")
    with pytest.raises(InputError) as e:
        sign(project, keys / "locked.pem")
    assert str(e.value) == f"{PASSWORD} does not open the signing key"
    monkeypatch.setenv(PASSWORD, SECRET)
    assert sign(project, keys / "locked.pem")
    assert checked(folder, public_key=keys / "key.pub")[0]
    assert SECRET not in (folder / SIGNATURE).read_text()


def test_without_the_package_it_says_so(project, folder, keys, monkeypatch):
    sign(project, keys / "key.pem")
    monkeypatch.setattr(signing, "installed", lambda: False)
    passed, detail = checked(folder, public_key=keys / "key.pub")
    assert (passed, detail) == (None, "signature present, not checked: pip install 'mlx-publish[signing]'")
    with pytest.raises(
        InputError, match=r"signing needs the package model-signing: pip install 'mlx-publish\[signing\]'"
    ):
        sign(project, keys / "key.pem")


def test_the_formats_own_tool_agrees(project, folder, keys):
    sign(project, keys / "key.pem")
    command = [
        sys.executable, "-m", "model_signing", "verify", "key", str(folder), "--signature", str(folder / SIGNATURE),
        "--public_key", str(keys / "key.pub"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


NO_TEXT = b'{"mediaType": "x", "dsseEnvelope": {"payload": "!"}}'


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"[" * 100_000, NO_TEXT, b"x" * 11_000_000])
def test_what_is_no_signature_is_one_line(data):
    with pytest.raises(InputError) as e:
        read_signature(data)
    assert str(e.value).startswith("model.sig: is no signature in the Model Signing format (")


# ------------------------------------------------------------------------------------------------ push and verify


def test_a_push_signs_once_and_is_up_to_date_the_next_time(ladder, publish, hub, keys):
    env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITE, PASSWORD: SECRET}
    push = ("push", ID, "--yes", "--sign-key", str(keys / "locked.pem"))
    said = publish(*push, cwd=ladder, env=env).ok()
    assert SECRET not in said.out + said.err
    assert str(keys) not in said.out + said.err
    api = HfApi(hub.url, WRITE)
    assert SIGNATURE in api.list_repo_files(REPO)
    first = api.model_info(REPO).sha
    assert "up to date" in publish(*push, cwd=ladder, env=env).ok().out
    assert api.model_info(REPO).sha == first

    trusted = ("--public-key", str(keys / "key.pub"))
    publish("verify", ID, *trusted, cwd=ladder, env=env).ok()
    publish("verify", ID, "--remote", *trusted, cwd=ladder, env=env).ok()
    other = ("--public-key", str(keys / "other.pub"))
    assert "signature: by another key" in publish("verify", ID, *other, cwd=ladder, env=env).refused(1)
    assert "signature: by another key" in publish("verify", ID, "--remote", *other, cwd=ladder, env=env).refused(1)
    ran = publish("verify", ID, "--remote", "--json", cwd=ladder, env=env).ok()
    (check,) = [c for c in json.loads(ran.out)[ID] if c["name"] == "signature"]
    assert check["passed"] is None

    # somebody puts a file beside ours on the hub: it is told, for it was not signed
    api.upload_file(path_or_fileobj=b"print()\n", path_in_repo="model.py", repo_id=REPO)
    told = publish("verify", ID, "--remote", *trusted, cwd=ladder, env=env).refused(1)
    assert "signature: model.py is not signed" in told
    everything = b"".join(
        p.read_bytes() for p in (ladder / "build").rglob("*") if p.is_file() and p.suffix in (".json", ".yaml", ".sig")
    )
    assert str(keys).encode() not in everything
    assert SECRET.encode() not in everything


def test_a_signature_of_something_else_never_leaves(ladder, publish, hub, keys):
    env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITE}
    project = load_project(ladder / "variants.yaml")
    files = {f.path: f.sha256 for f in local_files(project, ID)[1]}
    sign_folder(with_key(project, keys / "key.pem"), ID, files)
    manifest = json.loads((ladder / f"build/{ID}/manifest.json").read_text())
    (project.store.results(manifest["weights_hash"]) / "bench.json").unlink()
    publish("card", ID, cwd=ladder).ok()
    told = publish("push", ID, "--yes", cwd=ladder, env=env).refused(3)
    assert told == (
        f"{ID}: provenance/results/bench.json was signed and is not there; "
        "sign it again with --sign-key, or delete model.sig"
    )
    assert not hub.stats.requests["commit"]


def test_a_missing_signature_is_a_fault_only_where_a_key_is_given(built, publish, keys):
    publish("verify", ID, cwd=built).ok()
    told = publish("verify", ID, "--public-key", str(keys / "key.pub"), cwd=built).refused(1)
    assert told == f"{ID}: signature: there is none"


def change_bench(ladder, publish):
    """Another bench.json, as a forced build makes one, in the folder's provenance and card."""
    manifest = json.loads((ladder / f"build/{ID}/manifest.json").read_text())
    (load_project(ladder / "variants.yaml").store.results(manifest["weights_hash"]) / "bench.json").unlink()
    publish("card", ID, cwd=ladder).ok()


def test_a_push_without_a_key_keeps_a_signature_that_stays_true_and_is_refused_else(ladder, publish, hub, keys):
    env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITE}
    push, api = ("push", ID, "--yes"), HfApi(hub.url, WRITE)
    publish(*push, "--prune", "--sign-key", str(keys / "key.pem"), cwd=ladder, env=env).ok()
    publish("build", ID, "--skip", "smoke", "--skip", "bench", cwd=ladder, env=env).ok()  # the weights come back
    here = ladder / f"build/{ID}" / SIGNATURE
    assert not here.exists()
    first = api.model_info(REPO).sha
    said = publish(*push, cwd=ladder, env=env).ok().out
    assert f"{ID}: signature on the hub, kept: {SIGNATURE}" in said
    assert api.model_info(REPO).sha == first
    receipt = json.loads(load_project(ladder / "variants.yaml").store.receipt(ID).read_text())
    assert SIGNATURE in [f["path"] for f in receipt["files"]], "what the hub holds of ours stays on record"
    ran = publish("status", "--remote", "--json", cwd=ladder, env=env).ok()
    assert '"in sync"' in ran.out

    # the card is not signed: it goes, and the signature stays
    card = ladder / f"build/{ID}/README.md"
    begin = "<!-- notes:begin -->\n"
    assert begin in card.read_text()
    card.write_text(card.read_text().replace(begin, f"{begin}A note.\n", 1))
    publish(*push, cwd=ladder, env=env).ok()
    assert api.model_info(REPO).sha != first
    publish("verify", ID, "--remote", "--public-key", str(keys / "key.pub"), cwd=ladder, env=env).ok()

    change_bench(ladder, publish)
    before = api.model_info(REPO).sha
    for command in (push, ("push", ID, "--dry-run")):
        assert publish(*command, cwd=ladder, env=env).refused(3) == (
            f"{ID}: {REPO} is signed, and this push would make the signature invalid (provenance/results/bench.json was signed "
            f"and is not there); give --sign-key, or delete {SIGNATURE} on the hub (--overwrite does so)"
        )
    assert api.model_info(REPO).sha == before
    publish(*push, "--overwrite", cwd=ladder, env=env).ok()
    assert SIGNATURE not in api.list_repo_files(REPO)


def test_a_signature_that_no_push_from_here_left_is_guarded_as_well(ladder, publish, hub, keys):
    env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITE}
    push, api = ("push", ID, "--yes"), HfApi(hub.url, WRITE)
    publish(*push, cwd=ladder, env=env).ok()
    api.upload_file(path_or_fileobj=b"of another tool", path_in_repo=SIGNATURE, repo_id=REPO)
    assert "up to date" in publish(*push, cwd=ladder, env=env).ok().out
    change_bench(ladder, publish)
    told = publish(*push, cwd=ladder, env=env).refused(3)
    assert "would make the signature invalid (provenance/" in told
    publish(*push, "--sign-key", str(keys / "key.pem"), "--overwrite", cwd=ladder, env=env).ok()
    publish("verify", ID, "--remote", "--public-key", str(keys / "key.pub"), cwd=ladder, env=env).ok()


def test_a_dry_run_and_a_push_that_nobody_confirmed_leave_no_signature(ladder, publish, hub, keys):
    env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITE}
    here, key = ladder / f"build/{ID}" / SIGNATURE, ("--sign-key", str(keys / "key.pem"))
    said = publish("push", ID, "--dry-run", *key, cwd=ladder, env=env).ok().out
    assert f"{ID}: would sign" in said
    assert not here.exists()
    publish("push", ID, *key, cwd=ladder, env=env).refused(2)  # not a terminal, and no --yes
    assert not here.exists()
    publish("push", ID, "--yes", *key, cwd=ladder, env=env).ok()
    mine = here.read_bytes()
    assert "would sign" not in publish("push", ID, "--dry-run", *key, cwd=ladder, env=env).ok().out
    # another key: a signature of the same size, most of the time, must not be taken for the one that is here
    other = ("--sign-key", str(keys / "other.pem"))
    said = publish("push", ID, "--dry-run", *other, "--json", cwd=ladder, env=env).ok().out
    assert json.loads(said)["plans"][0]["update"] == [SIGNATURE]
    assert here.read_bytes() == mine


def test_not_signed_yet_is_no_fault_before_the_push_that_signs(ladder, publish, hub, keys):
    env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITE}
    yaml = ladder / "variants.yaml"
    text = yaml.read_text()
    for spec, told in (
        (f"{{key: {keys}/key.pem, public_key: {keys}/key.pub}}", "not signed yet: push signs"),
        (f"{{public_key: {keys}/key.pub}}", "not signed yet: push signs with --sign-key"),
    ):
        yaml.write_text(f"{text}sign: {spec}\n")
        ran = publish("verify", ID, "--json", cwd=ladder).ok()
        (check,) = [c for c in json.loads(ran.out)[ID] if c["name"] == "signature"]
        assert (check["passed"], check["detail"]) == (None, told)
    publish("push", ID, "--yes", "--sign-key", str(keys / "key.pem"), cwd=ladder, env=env).ok()
    publish("verify", ID, cwd=ladder, env=env).ok()
    (ladder / f"build/{ID}" / SIGNATURE).unlink()
    assert publish("verify", ID, cwd=ladder, env=env).refused(1) == f"{ID}: signature: there is none"
    HfApi(hub.url, WRITE).delete_file(SIGNATURE, REPO)
    assert "signature: there is none" in publish("verify", ID, "--remote", cwd=ladder, env=env).refused(1)


def test_a_build_replaces_weights_and_drops_their_signature(ladder, publish, keys):
    project = load_project(ladder / "variants.yaml")
    sign_folder(with_key(project, keys / "key.pem"), ID, {f.path: f.sha256 for f in local_files(project, ID)[1]})
    publish("build", ID, "--force", "--skip", "smoke", "--skip", "bench", cwd=ladder).ok()
    assert not (ladder / f"build/{ID}" / SIGNATURE).exists()
