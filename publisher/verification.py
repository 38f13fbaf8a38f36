"""`publish verify`: which checks a variant or a folder gets, and in what order. Each check itself lives elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from inference.errors import GateRefused, InputError

from .prune import pruned
from .report import Report
from .schema import Check, Manifest, Receipt
from .signing import Trust, check_signature, is_ignored, trust_of
from .store import MANIFEST_BYTES, read_model, read_result
from .survey import read_manifest
from .variants import Project
from .verify import SIGNATURE, sha256_of, stray_files, verify_folder

if TYPE_CHECKING:
    from .hub import Hub


@dataclass(frozen=True)
class Asked:
    """What to check beside the folder. inputs: where `rebuild` finds local files. public_key, certificates: of signers."""

    remote: bool = False
    download: bool = False
    rebuild: bool = False
    inputs: Path | None = None
    public_key: Path | None = None
    certificates: tuple[Path, ...] = ()

    def trust(self, project: Project | None) -> Trust:
        return trust_of(project, self.public_key, self.certificates)


def verify(
    project: Callable[[], Project], names: Sequence[str], asked: Asked, hub: Callable[[], Hub], report: Report
) -> dict[str, list[Check]]:
    """Checks by name. names: variants of the ladder, or folders; none: all that is built.

    A folder is one that holds a manifest.json; it needs no variants.yaml. Raises GateRefused for what is not built.
    """
    folders = [name for name in names if (Path(name).expanduser() / "manifest.json").is_file() and not _is_id(name)]
    if folders and (asked.remote or asked.download):
        raise InputError(f"{folders[0]}: a folder is on no hub; name a variant")
    out = {name: _of_folder(Path(name).expanduser(), asked, hub, report) for name in folders}
    ids = [name for name in names if name not in folders]
    for name in ids:
        if "/" in name and not Path(name).expanduser().is_dir():
            raise InputError(f"{name}: no such folder")
    if ids or not names:
        out |= {id: _of_variant(project(), id, asked, hub, report) for id in _chosen(project(), ids)}
    return out


def _is_id(name: str) -> bool:
    """A bare name is a variant's, whatever lies beside; ./name is a folder."""
    return "/" not in name and name not in (".", "..")


def _chosen(project: Project, ids: Sequence[str]) -> list[str]:
    chosen = project.select(ids)
    if not ids:
        chosen = [id for id in chosen if read_manifest(project, id)]
    if not chosen:
        raise GateRefused("nothing is built; run: publish build --all")
    return chosen


def _of_folder(folder: Path, asked: Asked, hub: Callable[[], Hub], report: Report) -> list[Check]:
    if (folder / "manifest.json").stat().st_size > MANIFEST_BYTES:
        raise InputError(f"{folder.name}/manifest.json: larger than {MANIFEST_BYTES} bytes")
    manifest = read_model(folder / "manifest.json", Manifest)
    assert manifest is not None
    found = [
        strays_allowed(folder, manifest, c) if c.name == "no other files" else c
        for c in verify_folder(folder, manifest)
    ]
    checks = [*found, *check_signature(*signed_here(folder), asked.trust(None))]
    if asked.rebuild:
        from .rebuild import rebuild  # noqa: PLC0415 - all that a build needs

        checks += rebuild(folder, manifest, None, hub, report, asked.inputs)
    return checks


def _of_variant(project: Project, id: str, asked: Asked, hub: Callable[[], Hub], report: Report) -> list[Check]:
    manifest = read_manifest(project, id)
    if manifest is None:
        raise GateRefused(f"{id}: not built; run: publish build {id}")
    folder, trust = project.store.variant(id), asked.trust(project)
    checks: list[Check] = []
    if asked.remote:
        from .push import verify_remote  # noqa: PLC0415 - the hub's client
        from .verify_download import remote_signature  # noqa: PLC0415

        checks += [*verify_remote(hub(), project, id), *remote_signature(hub(), project, id, trust)]
    if asked.download:
        from .verify_download import verify_download  # noqa: PLC0415

        checks += verify_download(hub(), project, id, trust, report)
    if asked.rebuild or not (asked.remote or asked.download):
        gone = pruned(project, manifest)
        checks += verify_folder(folder, manifest, gone)
        data, hashes = signed_here(folder, gone.files if gone else {})
        waits = data is None and trust and not asked.trust(None) and not _pushed_signed(project, id)
        checks += [_not_signed_yet(project)] if waits else check_signature(data, hashes, trust)
    if asked.rebuild:
        from .rebuild import rebuild  # noqa: PLC0415

        checks += rebuild(folder, manifest, project, hub, report, asked.inputs)
    return checks


def _pushed_signed(project: Project, id: str) -> bool:
    receipt = read_result(project.store.receipt(id), Receipt)
    return receipt is not None and any(f.path == SIGNATURE for f in receipt.files)


def _not_signed_yet(project: Project) -> Check:
    with_what = "" if project.ladder.sign and project.ladder.sign.key else " with --sign-key"
    return Check(name="signature", passed=None, detail=f"not signed yet: push signs{with_what}")


def strays_allowed(folder: Path, manifest: Manifest, check: Check) -> Check:
    """`no other files` for what was downloaded: files that people or the hub put beside ours are no fault, as long as no
    loader reads them as weights."""
    strays = [path for path in stray_files(folder, manifest) if not is_ignored(path)]
    if any(path.endswith(".safetensors") for path in strays):
        return check
    return Check(name=check.name, passed=True, detail=f"not ours: {', '.join(strays[:3])}" if strays else "none")


def signed_here(folder: Path, known: Mapping[str, str] | None = None) -> tuple[bytes | None, dict[str, str]]:
    """The signature in a folder, and sha256 by path of every file of it. known: of files that are not there."""
    paths = {
        p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file() and not p.is_symlink()
    }
    signature = paths.get(SIGNATURE)
    if signature is None:
        return None, {}
    return signature.read_bytes(), {**(known or {}), **{path: sha256_of(p) for path, p in paths.items()}}
