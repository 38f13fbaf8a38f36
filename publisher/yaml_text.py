"""Values as YAML text.

The cards and the provenance of a ladder are made several times in one command, mostly of equal values, and PyYAML takes
milliseconds for each: the texts are kept.
"""

from __future__ import annotations

from typing import Any

import yaml

KEPT, KEPT_CHARACTERS = 256, 64 << 10  # texts, and the most that one may have

_texts: dict[str, str] = {}


class _Dumper(yaml.SafeDumper):
    """Writes everything out: an alias is not taken when the file is read."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def yaml_text(value: Any, width: int, flow: bool | None = False) -> str:
    """The text of a value of mappings, lists and scalars, keys in their order. Raises yaml.YAMLError for any other.

    width: of a line, in characters, where it can be broken. flow: as PyYAML's `default_flow_style`.
    """
    key = repr((value, width, flow))
    text = _texts.get(key)
    if text is None:
        text = yaml.dump(
            value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=width, default_flow_style=flow
        )
        if len(text) <= KEPT_CHARACTERS:
            if len(_texts) >= KEPT:
                _texts.pop(next(iter(_texts)), None)
            _texts[key] = text
    return text
