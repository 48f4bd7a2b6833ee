"""Where the command begins: what an index answers is answered at once, all else waits for torch."""

from __future__ import annotations

import sys


def main() -> None:
    """Run a command and exit."""
    from unsharp.commands.index import quick

    code = quick(sys.argv[1:])
    if code is not None:
        sys.exit(code)
    from unsharp import cli

    cli.main()
