"""A typed document as its file has it."""

from __future__ import annotations

import json
from typing import Any

from repro.store.schema import to_json


def written(document: Any) -> Any:
    """What a reader of the file gets: mappings with text as keys, lists, numbers and texts."""
    return json.loads(json.dumps(to_json(document)))
