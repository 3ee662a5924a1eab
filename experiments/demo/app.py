"""Serves the page on a host: a Space of Hugging Face, or the container of the Dockerfile in this folder.

    RUNS="hf://OWNER/NAME runs/quickstart/prior" python experiments/demo/app.py

RUNS names the runs, as in `python -m dalle_jax.demo`. CLIP names the CLIP that ranks candidates, if it is not in a run.
PORT is the port, 7860 by default. The page listens on all addresses, because a host stands in front of it. Visitors
see the names of the runs, and no paths of the host.
"""

import os
import sys

from dalle_jax.demo.__main__ import load
from dalle_jax.demo.server import serve
from dalle_jax.errors import UserError

if __name__ == "__main__":
    runs = os.environ.get("RUNS", "").split()
    if not runs:
        sys.exit("RUNS is empty: set it to the workdirs or exports that the page shows, separated by blanks.")
    try:
        port = int(os.environ.get("PORT", "7860"))
        serve(load(runs, clip=os.environ.get("CLIP"), hosted=True), host="0.0.0.0", port=port)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
