"""Says as JSON what a companion is given: its name, its words, and whether it finds rich."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec


def main() -> None:
    """One line on standard output."""
    try:
        found = find_spec("rich") is not None
    except ValueError:  # kept from being found
        found = False
    sys.stdout.write(json.dumps({"name": __name__, "words": sys.argv[1:], "rich": found}))


if __name__ == "__main__":
    main()
