"""`python -m flows.cli` is `fovea`."""

from flows.cli.main import main

main()
