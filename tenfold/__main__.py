"""``python -m tenfold``: the command line."""

from tenfold_cli import main

main()
