"""Fine-tuning of a trained or imported prior on your own images.

    python -m dalle_jax.main --config=configs/finetune.py --config.data.path=DIR --config.start_from=RUN
    python -m dalle_jax.main --config=configs/finetune.py:lora --config.data.path=DIR --config.start_from=RUN
    python -m dalle_jax.export --workdir=runs/finetune-lora --output=adapters --adapters

RUN is the workdir of a prior, autoregressive or MaskGIT, the folder of an import or of an export, or an export on a hub
(hf://owner/name). Image size, model, image tokenizer and text model come from there. `model` keys that you set stay.

`all` trains all parameters at a fifth of the step size that RUN was trained with. `lora` trains adapters of the trunk
alone, at that whole step size, and the base stays as it is. An import has no step size; 4.5e-4 stands for it.

`--config.text.path=new` trains a text model on your captions, for another language for instance. The embeddings of
pieces that the old vocabulary also has are taken over. `lora` needs the old text model.

The number of updates follows the number of images (`from_data`). Measured: docs/training.md.
"""

from ml_collections import ConfigDict

from configs import prior
from dalle_jax.configuration import sections
from dalle_jax.configuration.config_files import choose
from dalle_jax.configuration.sections import schedule, section
from dalle_jax.configuration.size_rules import SizeRules
from dalle_jax.optim.optimizers import AverageOptions
from dalle_jax.priors.autoregressive import AutoregressiveOptions
from dalle_jax.priors.lora import LoRAOptions

VARIANTS = {
    "all": dict(doc="all parameters; the machine of start_from, its time per update", rank=0, share=0.2),
    "lora": dict(doc="adapters of the trunk; the machine of start_from, a bit faster than all", rank=8, share=1.0),
}

KEYS = sections.TRAINING_KEYS | {
    "start_from": "workdir or export of the prior to start from, or hf://owner/name",
    "text.path": "new: train a text model on your captions; None: the one of start_from",
    "lora.rank": "rank of the adapters; 0: train all parameters",
    "schedules.learning_rate.peak": "largest step size; None: a share of the one of start_from",
    "model.trunk.dropout": "delays learning a small set by heart",
}


def get_config(variant: str | None = None) -> ConfigDict:
    variant, row = choose(VARIANTS, variant, __file__)

    config = prior.get_config("small")
    config.variant = variant
    config.workdir = f"runs/finetune-{variant}"
    steps = sections.set_steps(config, None)
    config.from_data = section(
        SizeRules, passes=15.0, min_steps=300, max_steps=20_000, max_vocab_size=4096, max_text_length=128
    )
    config.follow_start = row["share"]  # sizes and models of start_from; this share of its step size
    config.model = section(AutoregressiveOptions)
    config.lora = section(LoRAOptions, rank=row["rank"])
    # The peak is that of start_from times its share, see `jobs/preparation.py`.
    config.schedules.learning_rate = schedule(
        "warmup_cosine", peak=4.5e-4 * row["share"], end=1e-6, warmup_steps=steps // 20, steps=steps
    )
    config.ema = section(AverageOptions, decay=0.99, every=1)
    sections.training_loop(config, 8, every=5000)
    sections.override(config, sections.keep_best)
    return config
