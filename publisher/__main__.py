"""`python -m publisher`: the command line, where no script was installed."""

from .entry import main

main()
