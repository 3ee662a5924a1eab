"""Exports the model of a run as a folder of safetensors and JSON with a model card.

    python -m dalle_jax.export --workdir=runs/prior-shapes --output=exports/shapes --license=apache-2.0
    python -m dalle_jax.export --workdir=runs/prior-shapes --output=exports/shapes --push=OWNER/NAME
    python -m dalle_jax.export --help

`TextToImage.load`, `ClipScorer.load`, `config.tokenizer_from` and `config.start_from` read the folder. `--push` uploads
it to a hub, by default huggingface.co, and needs `pip install -e '.[hub]'` and a login there.

| exit status | meaning                                             |
|-------------|-----------------------------------------------------|
| 0           | done                                                |
| 1           | the run cannot be read, or the folder not written   |
| 2           | a wrong flag or value, or a folder that is not free |
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dalle_jax.checkpoints.folders import check_step
from dalle_jax.errors import ConfigError, UserError
from dalle_jax.export.write import DTYPES, Options, export
from dalle_jax.storage import hub
from dalle_jax.storage.files import is_remote


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dalle_jax.export", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--workdir", required=True, metavar="RUN", help="Workdir of a training, or the folder of an importer.")
    add("--output", required=True, metavar="DIR", help="Folder to write: new, or an earlier export.")
    add(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="Of the kernels of layers. float32 rounds nothing.",
    )
    add("--compact", action="store_true", help="Of a prior, with --dtype=bfloat16: round all its weights.")
    add("--step", help='Step of the checkpoint, or "best"; the latest by default.')
    add("--clip", metavar="DIR", help="CLIP to include with a prior; the one in its workdir by default, if any.")
    add("--license", help="Identifier for the model card, such as apache-2.0 or cc-by-4.0.")
    add("--report", metavar="DIR", help="Workdir of an evaluation, whose metrics the model card shows.")
    add("--caption", help="Example caption of the model card.")
    add("--adapters", action="store_true", help="Export the adapters (LoRA) of a run alone, without their base.")
    add("--base", metavar="NAME", help="Name of the base of --adapters, such as hf://OWNER/NAME.")
    add("--push", metavar="OWNER/NAME", help="Upload the folder to this repository of a hub. It is created if needed.")
    add("--private", action="store_true", help="Create the repository as a private one.")
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
      argv: its arguments, without the name of the program.

    Returns:
      The exit status.
    """
    given = _parser().parse_args(argv)
    try:
        if given.push:
            hub.check_repo(given.push, "--push")
            if is_remote(given.output):
                raise ConfigError(f"--output={given.output} cannot be pushed: give a local folder.")
        options = Options(
            given.dtype, check_step(given.step, "--step"), given.clip, given.license, given.report, given.caption,
            given.push, given.adapters, given.base, given.compact,
        )  # fmt: skip
        found = export(given.workdir, given.output, options)
        print(f"{given.output}: {found}")
        if given.push:
            print(f"Pushed: {hub.push(given.output, given.push, given.private)}")
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
