"""Pull requests: opened once, whatever answers are lost, and looked up by their number afterwards."""

from __future__ import annotations

from typing import Any

from huggingface_hub.errors import HfHubHTTPError

from .hub_errors import Calls


def open_pull(call: Calls, api: Any, author: str, repo: str, title: str, text: str) -> int:
    """A new pull request without commits, or the author's of that title if the answer to an earlier call was lost."""

    def ask() -> int:
        for d in api.get_repo_discussions(
            repo, author=author, discussion_type="pull_request", discussion_status="open"
        ):
            if d.title == title:
                return d.num
        return api.create_pull_request(repo, title, description=text).num

    return call(f"opening a pull request on {repo}", ask)


def status(call: Calls, api: Any, repo: str, number: int) -> str:
    """draft, open, closed, merged, or "" if there is no such pull request."""

    def ask() -> str:
        try:
            return api.get_discussion_details(repo, number).status
        except HfHubHTTPError as e:
            if e.response.status_code == 404:
                return ""
            raise

    return call(f"reading pull request {number} of {repo}", ask)


def publish(call: Calls, api: Any, repo: str, number: int) -> None:
    """Make a draft an open pull request. Raises AuthError where only the repo's owner may."""
    if status(call, api, repo, number) == "draft":
        call(f"opening pull request {number} of {repo}", api.change_discussion_status, repo, number, "open")
