"""`python -m ucxx_transport`, the same as the command `ucxx-transport`; the command line needs the extra `[cli]`."""

import json
import sys
from collections.abc import Sequence
from typing import NoReturn

from ucxx_transport.machine import prepare_output


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit; without the extra, say what to install."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    prepare_output(json_alone="--json" in words)
    try:
        from ucxx_transport.cli import program
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        message = "the command line needs typer, which is not installed: pip install 'ucxx_transport[cli]'"
        if "--json" not in words:
            sys.exit(f"error: {message}")
        facts = {"module": error.name, "extra": "cli"}
        said = {"kind": "ModuleNotFoundError", "message": message, "facts": facts}
        sys.stdout.write(json.dumps({"error": said}) + "\n")
        sys.exit(1)
    program.main(words)


if __name__ == "__main__":
    main()
