"""Names of backbones: timm's own tags, and the `hf-hub:` and `local-dir:` names that timm takes too."""

from __future__ import annotations

import os

_SOURCES = ("hf-hub", "local-dir")


def split_tag(tag: str) -> tuple[str, str]:
    """The source of a tag (`hf-hub`, `local-dir`, or empty for timm's own tags) and the rest of it."""
    source, _, rest = tag.partition(":")
    return (source, rest) if source in _SOURCES else ("", tag)


def short_tag(tag: str) -> str:
    """A tag without the path to a local folder: a run's name and hash stay the same when the folder moves."""
    source, rest = split_tag(tag)
    return f"local-dir:{os.path.basename(os.path.abspath(rest))}" if source == "local-dir" else tag
