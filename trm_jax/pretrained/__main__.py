"""Lists the known CLIP models, says what files of weights are, and converts them.

python -m trm_jax.pretrained [FILE ...] [--out=F.safetensors] [--format=openclip|trm_jax]
"""

import sys

from trm_jax.pretrained.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
