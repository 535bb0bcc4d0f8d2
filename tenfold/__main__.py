"""Run the command line: ``python -m tenfold``."""

from tenfold_cli import main

main()
