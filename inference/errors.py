"""Every error this project raises on purpose, in the lowest package so that all can raise them.

A message is one line: what is wrong, where (file and key), what was found, what is expected or the next step. The exit
code of each kind is assigned once, in `publisher/cli.py`.
"""

import re

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
LONGEST = 2000  # characters of a message; what a file says of itself may be of any length


def printable(text: str) -> str:
    """Control characters, marks of direction and halves of characters spelled out; lines stay."""
    return CONTROL.sub(lambda m: m[0].encode("unicode_escape").decode(), text)


class PublishError(Exception):
    """Root of the errors that a person can act on. Anything else that escapes is a bug.

    Messages quote what strangers wrote: characters that would steer a terminal are spelled out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class InputError(PublishError):
    """A file or an option is wrong: YAML, safetensors, config.json, GGUF, a template, a flag. Always one line."""

    def __init__(self, message: str) -> None:
        line = printable(message).replace("\n", "\\n")
        super().__init__(line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…")


class CheckpointError(InputError):
    """A checkpoint (safetensors, index, config.json, tokenizer) cannot be read or contradicts itself."""


class CheckFailed(PublishError):
    """A check ran and the answer is no: smoke, verify, `card --check`."""


class GateRefused(PublishError):
    """A release is not allowed to leave: something in the folder is missing, unproven or inconsistent."""


class RemoteChanged(PublishError):
    """The remote holds something that our plan did not know of."""


class AuthError(PublishError):
    """The hub refused the token, its role, or the account's quota."""


class ResourceError(PublishError):
    """The machine lacks memory or disk for what was asked; the message holds both figures."""


class HubUnavailable(PublishError):
    """The hub cannot be reached, answers nonsense or asks to wait longer than we do; nothing is wrong on our side."""
