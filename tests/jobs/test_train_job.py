"""Tests of the train job on eight devices: what happens before a prior's tokenizer is trained."""

import pytest

from dalle_jax.errors import ConfigError, MeshError
from dalle_jax.jobs import train as train_job


@pytest.mark.parametrize(
    "error, wrong",
    [
        (MeshError, {"batch_size": 12}),
        (MeshError, {"mesh.data": 3}),
        (ConfigError, {"model.order": "random", "model.attention": "sparse"}),
        (ConfigError, {"data_tokens": "once"}),  # with an augmentation
    ],
)
def test_rejects_values_that_do_not_fit_each_other(load, trained, error, wrong):
    config = load("prior.py:folder")
    config.update_from_flattened_dict(wrong)
    with pytest.raises(error):
        train_job.run(config, config.workdir)
    assert not trained
