"""Serves a page in the browser that draws and edits images with trained priors.

    python -m dalle_jax.demo runs/quickstart/maskgit runs/quickstart/prior
    python -m dalle_jax.demo --help

RUN is the workdir of a prior, an exported folder, or an export on a hub ("hf://owner/name"). Several runs draw next to
each other at one seed. The page listens on this machine only. It needs `pip install -e '.[demo]'`.

| exit status | meaning                                               |
|-------------|-------------------------------------------------------|
| 0           | stopped by Ctrl-C                                     |
| 1           | a run cannot be read                                  |
| 2           | a wrong flag or value, a port in use, gradio missing  |
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

from dalle_jax.checkpoints.folders import check_step
from dalle_jax.configuration.values import natural
from dalle_jax.demo.server import require_gradio, serve
from dalle_jax.demo.studio import Studio
from dalle_jax.errors import UserError
from dalle_jax.storage import hub
from dalle_jax.text_to_image.text_to_image import TextToImage
from dalle_jax.text_to_image.upsampling import check_draws_captions

_MOST_WAITING = 1000
_THIS_MACHINE = ("127.0.0.1", "localhost", "::1")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dalle_jax.demo", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="Workdir or export of a prior.")
    add("--step", help='Step of the checkpoints, or "best"; the latest by default.')
    add("--clip", metavar="DIR", help="CLIP that ranks candidates; the one in the workdir by default, if any.")
    add("--rows_at_once", type=int, default=64, help="Images per batch; fewer need less memory.")
    add("--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 lets other machines in.")
    add("--port", type=int, help="Port; the first free one from 7860 on by default.")
    add("--queue", type=int, default=16, help="The most drawings that wait; another one gets an error.")
    add("--share", action="store_true", help="Open a public address for 72 hours, through gradio's servers.")
    return parser


def names_of(runs: Sequence[str], hosted: bool = False) -> list[str]:
    """Returns a short and unique name for each run.

    Args:
      runs: paths or addresses.
      hosted: use the last part of each path alone. Otherwise as many of the last parts as tell them apart.
    """
    paths = [pathlib.PurePosixPath(run.rstrip("/") or run) for run in runs]
    longest = 1 if hosted else max(len(path.parts) for path in paths)
    for count in range(1, longest + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({number})" for number, name in enumerate(names, 1)]


def load(
    runs: Sequence[str],
    step: str | None = None,
    clip: str | None = None,
    rows_at_once: int = 64,
    hosted: bool = False,
) -> Studio:
    """Loads the models of a page.

    Args:
      runs: workdirs or exports of priors.
      step, clip, rows_at_once: as in `TextToImage.load`, for each of them.
      hosted: whether strangers visit the page, who must not see paths of this machine.

    Raises:
      UserError: as in `TextToImage.load`.
    """
    step = check_step(step, "--step")
    models, places = {}, {}
    for name, run in zip(names_of(runs, hosted), runs):
        if hosted or hub.is_hub(run):
            places[name] = run if hub.is_hub(run) else name
        models[name] = TextToImage.load(run, step, rows_at_once, clip)
        check_draws_captions(models[name])
        print(models[name], flush=True)
    return Studio(models, places)


def main(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
      argv: its arguments, without the name of the program.

    Returns:
      The exit status.
    """
    given = _parser().parse_args(argv)
    try:
        require_gradio()
        waiting = natural("--queue", given.queue, 1, _MOST_WAITING)
        hosted = given.share or given.host not in _THIS_MACHINE
        studio = load(given.runs, given.step, given.clip, given.rows_at_once, hosted)
        serve(studio, given.host, given.port, given.share, waiting)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
