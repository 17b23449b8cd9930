"""`python -m gdfq`."""

from gdfq.cli.app import main

main()
