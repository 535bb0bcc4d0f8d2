"""tenfold folds the weight matrices of transformer language models into small tensors.

The public names are twins of the commands. Importing the package teaches transformers to load folded checkpoints:
after ``import tenfold`` plain ``AutoModelForCausalLM.from_pretrained(folder)`` works.
"""

from tenfold.api import bench as bench
from tenfold.api import compress as compress
from tenfold.api import evaluate as evaluate
from tenfold.api import generate as generate
from tenfold.api import heal as heal
from tenfold.api import inspect as inspect
from tenfold.api import load as load
from tenfold.api import plan as plan
from tenfold.api import pretrain as pretrain
from tenfold.api import save as save
from tenfold.models.hub import from_pretrained as from_pretrained
from tenfold.models.replace import densify as densify
from tenfold.models.replace import replace as replace
