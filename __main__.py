"""`python -m kvx`: the same as the `kvx` command."""

from kvx.cli import main

main()
