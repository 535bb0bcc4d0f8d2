"""Import the toys of the tests of models, and the texts and curves of the tests of compression."""

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parents[1] / name) for name in ("models", "compress")]
