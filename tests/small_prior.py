"""A very small configs/prior.py, for tests in child processes: `--config=tests/small_prior.py:FOLDER`."""

from ml_collections import ConfigDict

from configs import prior


def get_config(folder: str) -> ConfigDict:
    """Returns the configuration: 16 pixels, 4×4 tokens, four devices. Everything is written into `folder`."""
    config = prior.get_config("shapes")
    common = {
        "data": {
            "image_size": 16, "data_dir": f"{folder}/data",
            "builder_kwargs": {"image_size": 16, "num_train": 64, "num_validation": 12, "num_heldout": 16},
        },
        "mesh": {"data": 2, "fsdp": 2},
        "batch_size": 8, "steps": 3, "eval_batches": 2,
        "cadence": {"log": 1, "eval": 3, "preview": 3, "checkpoint": 3},
    }  # fmt: skip
    config.update({"workdir": f"{folder}/prior", "text": {"vocab_size": 64, "length": 20}, **common})
    config.model.trunk.update({"width": 16, "depth": 2, "heads": 2})
    config.tokenizer.update({"workdir": f"{folder}/dvae", **common})
    config.tokenizer.model.update({"vocab_size": 16, "hidden": 96, "blocks_per_group": 1, "codebook_dim": 96})
    return config
