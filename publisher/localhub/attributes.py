"""Which files go to LFS, and which are ignored: `.gitattributes` and `.gitignore` as git reads them.

Only the part of git's rules that repositories on the Hub use: one pattern a line, the last match wins, a pattern
without a slash matches the file name anywhere, `**` spans folders.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from publisher.localhub.store import Tree

LFS = "filter=lfs diff=lfs merge=lfs -text"
REGULAR_BYTES = 10 << 20  # the Hub's limit for a file in git itself
LINE_CHARS = 1000  # longer lines are no patterns

# The patterns the Hub writes into a new model repository.
DEFAULT_PATTERNS = (
    "*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy *.npz "
    "*.onnx *.ot *.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/**/* *.tar.* *.tar "
    "*.tflite *.tgz *.wasm *.xz *.zip *.zst *tfevents* *.gguf"
)
DEFAULT_GITATTRIBUTES = "".join(f"{pattern} {LFS}\n" for pattern in DEFAULT_PATTERNS.split())


def upload_mode(path: str, size: int, sample: bytes, gitattributes: str) -> str:
    """`lfs` or `regular`, as `preupload` answers: by pattern, by size, or because the first bytes are no text."""
    if size == 0:
        return "regular"
    if is_lfs(path, gitattributes) or size > REGULAR_BYTES or b"\0" in sample:
        return "lfs"
    return "regular"


def is_lfs(path: str, gitattributes: str) -> bool:
    found = False
    for line in gitattributes.splitlines():
        pattern, *attributes = line.split()[:50] or [""]
        if not pattern or pattern.startswith("#") or len(line) > LINE_CHARS:
            continue
        if _matches(pattern, path):
            for attribute in attributes:
                if attribute.lstrip("-!").split("=")[0] == "filter":
                    found = attribute == "filter=lfs"
    return found


def is_ignored(path: str, gitignore: str) -> bool:
    """A file is ignored if it or a folder above it is."""
    parts = path.split("/")
    return any(
        _ignored("/".join(parts[:n]), is_folder=n < len(parts), gitignore=gitignore) for n in range(1, len(parts) + 1)
    )


def cover(tree: Tree, gitattributes: str) -> str:
    """`.gitattributes` with a line for each LFS file no pattern covers: the Hub adds these itself on a push."""
    missing = [path for path, file in tree.items() if file.sha256 and not is_lfs(path, gitattributes)]
    if not missing:
        return gitattributes
    start = gitattributes if not gitattributes or gitattributes.endswith("\n") else gitattributes + "\n"
    # A blank would end the pattern, so git's own `lfs track` writes it as a class.
    return start + "".join(f"{path.replace(' ', '[[:space:]]')} {LFS}\n" for path in sorted(missing))


def _ignored(path: str, is_folder: bool, gitignore: str) -> bool:
    found = False
    for line in gitignore.splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#") or len(pattern) > LINE_CHARS:
            continue
        negated, pattern = pattern.startswith("!"), pattern.removeprefix("!")
        folder_only, pattern = pattern.endswith("/"), pattern.removesuffix("/")
        if (is_folder or not folder_only) and pattern and _matches(pattern, path):
            found = not negated
    return found


def _matches(pattern: str, path: str) -> bool:
    pattern = pattern.replace("[[:space:]]", "[ ]")
    if "/" not in pattern:
        return fnmatchcase(path.rsplit("/", 1)[-1], pattern)
    return _match_parts(pattern.lstrip("/").split("/"), path.split("/"))


def _match_parts(pattern: list[str], path: list[str]) -> bool:
    """Folder by folder; `reached[i]`: the pattern so far can end before path part i (no backtracking)."""
    reached = {0}
    for part in pattern:
        if part == "**":
            reached = {end for start in reached for end in range(start, len(path) + 1)}
        else:
            reached = {i + 1 for i in reached if i < len(path) and fnmatchcase(path[i], part)}
    return len(path) in reached
