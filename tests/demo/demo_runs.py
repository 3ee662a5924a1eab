"""Runs for the page: a MaskGIT and an autoregressive prior with random weights, written once in a session."""

import untrained_run


def write(folder):
    """Writes both runs, with a few captions of their data; returns their paths, MaskGIT's first."""
    paths = [
        untrained_run.prior(folder / "maskgit", "maskgit.py:shapes"),
        untrained_run.prior(folder / "prior", "prior.py:shapes"),
    ]
    (folder / "maskgit" / "data.json").write_text('{"captions": {"first": ["a red circle above a blue square"]}}')
    return paths
