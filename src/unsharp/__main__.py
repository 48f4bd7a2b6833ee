"""`python -m unsharp`."""

from unsharp.start import main

main()
