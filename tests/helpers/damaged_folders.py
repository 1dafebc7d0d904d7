"""Damage to the folder of a saved pipeline: edited JSON, and a pickle that must not be opened."""

import json


class UnpicklingBomb:
    """An object whose pickle ends the process when it is opened."""

    def __reduce__(self):
        return exec, ("raise SystemExit('the pickle was opened')",)


def edit_json(path, **changes):
    """Replace keys of the object in a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
