"""The whole system, small, on a CPU: data, text model, dVAE, both priors, CLIP, pictures of unseen captions, a report.

    python -m dalle_jax.main --config=configs/quickstart.py

Ends with `runs/quickstart/report.html` (and `report.json`, `grid.png`, the sweeps as CSV). Run it again after an
interruption and it goes on. README.md has its measured time and figures.
"""

from ml_collections import ConfigDict

from dalle_jax.configuration import config_files


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.job = "quickstart"
    config.workdir = "runs/quickstart"

    config.prior = config_files.module(__file__, "prior.py").get_config("shapes")
    config.prior.workdir = "runs/quickstart/prior"
    config.prior.tokenizer.workdir = "runs/quickstart/dvae"

    # It starts from the autoregressive prior's trunk and embeddings, and so needs a fraction of the updates.
    config.maskgit = config_files.module(__file__, "maskgit.py").get_config("shapes")
    config.maskgit.steps = 2600
    config.maskgit.workdir = "runs/quickstart/maskgit"
    config.maskgit.start_from = config.prior.workdir

    config.clip = config_files.module(__file__, "clip.py").get_config("shapes")
    config.clip.workdir = "runs/quickstart/clip"

    config.evaluate = config_files.module(__file__, "evaluate.py").get_config()
    config.evaluate.model_workdir = config.prior.workdir
    config.evaluate.metrics.candidates = 16
    config.maskgit_sampling = config.evaluate.sampling.copy_and_resolve_references()
    config.maskgit_sampling.choice_temperature = 1.0
    return config
