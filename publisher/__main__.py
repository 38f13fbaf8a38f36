"""`python -m publisher`: the command line, where no script was installed."""

from .cli import main

main(prog_name="publish")
