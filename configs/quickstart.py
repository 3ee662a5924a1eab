"""The whole system, small: text model, dVAE, both priors, CLIP, images for unseen captions, and a report.

    python -m dalle_jax.main --config=configs/quickstart.py

On two CPU cores it takes about 7 minutes (4.5 on an idle machine). It writes `runs/quickstart/report.html`,
`report.json`, `grid.png` and the sweeps as CSV. Run it again to resume after an interruption. README.md has the metrics
of a measured run.
"""

from ml_collections import ConfigDict

from configs import clip, evaluate, maskgit, prior
from dalle_jax.configuration.sections import section
from dalle_jax.priors.sampling import SamplingOptions

KEYS = {
    "workdir": "directory of all trainings and of the report",
    "prior.tokenizer.steps": "updates of the image tokenizer",
    "prior.steps": "updates of the autoregressive prior",
    "maskgit.steps": "updates of the MaskGIT prior",
    "clip.steps": "updates of CLIP",
    "prior.seed": "seed of the autoregressive prior",
    "evaluate.count": "number of captions to evaluate on",
    "evaluate.metrics.candidates": "largest N of the best of N by CLIP; 0: no such sweep",
    "evaluate.sampling.temperature": "temperature of the autoregressive prior",
    "maskgit_sampling.temperature": "temperature of the MaskGIT prior",
    "maskgit_sampling.choice_temperature": "randomness in MaskGIT's order of unmasking",
}


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.job = "quickstart"
    config.workdir = "runs/quickstart"

    config.prior = prior.get_config("shapes")
    config.prior.workdir = "runs/quickstart/prior"
    config.prior.tokenizer.workdir = "runs/quickstart/dvae"

    # It starts from the autoregressive prior's trunk and embeddings, so it needs fewer updates.
    config.maskgit = maskgit.get_config("shapes")
    config.maskgit.steps = 2600
    config.maskgit.workdir = "runs/quickstart/maskgit"
    config.maskgit.start_from = config.prior.workdir

    config.clip = clip.get_config("shapes")
    config.clip.workdir = "runs/quickstart/clip"

    config.evaluate = evaluate.get_config()
    config.evaluate.model_workdir = config.prior.workdir
    config.evaluate.metrics.candidates = 16
    config.maskgit_sampling = section(SamplingOptions, choice_temperature=1.0)
    return config
