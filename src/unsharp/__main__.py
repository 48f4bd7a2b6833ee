"""`python -m unsharp`."""

from unsharp.cli import main

main()
