"""A connection to a hub that gives one answer to everything, without a network."""

from __future__ import annotations

import httpx2
from huggingface_hub import set_client_factory

from publisher.hub import Hub
from publisher.hub_bounds import bound

ENDPOINT = "http://127.0.0.1:9"


def answering_hub(status: int, body: bytes, headers: dict[str, str] | None = None) -> Hub:
    """headers: beside those that make it JSON. All calls of the process go there from now on, until another factory is set."""
    sent = {"content-type": "application/json", "location": f"{ENDPOINT}/elsewhere", **(headers or {})}

    def answer(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(status, headers=sent, stream=httpx2.ByteStream(body))

    hub = Hub(ENDPOINT, "hf_fuzz", patience_s=0, pause_s=0)
    hooks = {"response": [bound, hub._call.watch]}
    set_client_factory(
        lambda: httpx2.Client(transport=httpx2.MockTransport(answer), follow_redirects=True, event_hooks=hooks)
    )
    return hub
