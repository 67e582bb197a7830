"""A typed document as it stands in its JSON file."""

from __future__ import annotations

import json
from typing import Any

from repro.store.schema import to_json


def written(document: Any) -> Any:
    """Return what a reader of the document's JSON file gets: mappings with text keys, lists, numbers and texts."""
    return json.loads(json.dumps(to_json(document)))
