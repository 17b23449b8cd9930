"""`python -m gdfq`."""

from gdfq.cli import main

main()
