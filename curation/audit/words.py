"""Strings from outside, made fit to be shown: cut, and without characters that hide or turn what is read."""

import re
from typing import Any

from curation import secrets

TEXT_CHARACTERS = 200
INVISIBLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")


def visible(words: Any, characters: int = TEXT_CHARACTERS) -> str:
    """A string, cut, without what its URLs keep secret, with control characters and marks of direction written out.

    Escaping is the page's business.
    """
    found = secrets.hide(str(words))
    cut = found if len(found) <= characters else found[: characters - 1] + "…"
    return INVISIBLE.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", cut)
