"""What a publisher does with huggingface_hub, in one go, with whatever release of it is installed: 0.36, 1.x, 2.x.

    python drive_hf.py ENDPOINT REPO WAY FOLDER        WAY: lfs | xet

Talks to ENDPOINT with HF_TOKEN. FOLDER is the files to upload. Prints one line of JSON: what was done, and what came
of it, for the test to compare. Not a test itself, and free of this project: it must run in an environment without it.
"""

import json
import os
import sys
from pathlib import Path

endpoint, repo, way, folder = sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4])
os.environ["HF_ENDPOINT"] = endpoint
os.environ["HF_HUB_DISABLE_XET"] = "0" if way == "xet" else "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import huggingface_hub as hf  # noqa: E402 - it reads its environment when it is imported
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi  # noqa: E402

api = HfApi(endpoint=endpoint)
done = {"version": hf.__version__}


def fetch(name, **options):
    return Path(hf.hf_hub_download(repo, name, cache_dir=folder.parent / "cache", **options)).read_bytes()


api.create_repo(repo, private=True)
done["again"] = str(api.create_repo(repo, exist_ok=True))
paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
adds = [CommitOperationAdd(path, str(folder / path)) for path in paths]
api.preupload_lfs_files(repo, additions=adds)
first = api.create_commit(repo, adds, commit_message="first", parent_commit=api.model_info(repo).sha)
done["commit"] = first.oid

entries = {entry.path: entry for entry in api.list_repo_tree(repo, recursive=True) if hasattr(entry, "size")}
done["tree"] = {path: [entry.size, entry.lfs.sha256 if entry.lfs else None] for path, entry in entries.items()}
done["xet"] = sorted(path for path, entry in entries.items() if getattr(entry, "xet_hash", None))
info = api.model_info(repo, files_metadata=True)
done["info"] = [info.sha, info.private, len(info.siblings)]

snapshot = Path(hf.snapshot_download(repo, revision=first.oid, cache_dir=folder.parent / "cache"))
done["snapshot"] = [p for p in paths if (snapshot / p).read_bytes() == (folder / p).read_bytes()]
headers = hf.utils.build_hf_headers() | {"Range": "bytes=1000-1999"}
follow = {} if hf.__version__.startswith("0.") else {"follow_redirects": True}
url = hf.hf_hub_url(repo, "model.safetensors", revision=first.oid, endpoint=endpoint)
answer = hf.utils.get_session().get(url, headers=headers, **follow)
done["range"] = [answer.status_code, answer.content == (folder / "model.safetensors").read_bytes()[1000:2000]]

api.create_tag(repo, tag="v1", tag_message="one", revision=first.oid)
api.create_tag(repo, tag="v1", exist_ok=True)
api.create_branch(repo, branch="next/one", revision="v1")
api.upload_file(path_or_fileobj=b"{}\n", path_in_repo="next.json", repo_id=repo, revision="next/one")
refs = api.list_repo_refs(repo)
done["refs"] = [sorted(ref.name for ref in kind) for kind in (refs.branches, refs.tags)]
try:
    api.create_commit(repo, [CommitOperationAdd("x", b"x")], commit_message="late", parent_commit="0" * 40)
except hf.errors.HfHubHTTPError as e:
    done["moved head"] = e.response.status_code

opened = api.create_commit(
    repo, [CommitOperationAdd("config.json", b'{"a": 2}\n')], commit_message="two", create_pr=True
)
done["pr"] = [opened.pr_num, fetch("config.json", revision="refs/pr/1").decode()]
api.merge_pull_request(repo, opened.pr_num, comment="fine")
done["merged"] = [api.get_discussion_details(repo, 1).status, fetch("config.json").decode()]
(folder / "extra.bin").write_bytes((folder / "model.safetensors").read_bytes()[:-7] + b"changed")
api.upload_folder(repo_id=repo, folder_path=folder, commit_message="folder")
done["folder"] = fetch("extra.bin") == (folder / "extra.bin").read_bytes()
api.create_commit(repo, [CommitOperationDelete("extra.bin")], commit_message="less")
done["gone"] = not api.file_exists(repo, "extra.bin")
done["history"] = [commit.title for commit in api.list_repo_commits(repo)]
api.super_squash_history(repo, branch="main", commit_message="squashed")
done["squashed"] = [commit.title for commit in api.list_repo_commits(repo)]

owner = repo.split("/")[0]
made = api.create_collection("Ladder of " + repo, namespace=owner, description="all", private=True)
again = api.create_collection("Ladder of " + repo, namespace=owner, exists_ok=True)
api.add_collection_item(made.slug, repo, "model", note="4 bits")
api.add_collection_item(made.slug, repo, "model", exists_ok=True)
items = api.get_collection(made.slug).items
done["collection"] = [made.slug == again.slug, [(item.item_id, item.note, item.position) for item in items]]
api.update_repo_settings(repo, private=False)
done["public"] = [model.id for model in api.list_models(author=owner, search=repo.split("/")[1])]
sys.stdout.write(json.dumps(done) + "\n")
