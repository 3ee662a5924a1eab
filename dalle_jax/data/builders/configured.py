"""The base of this package's TFDS builders."""

from __future__ import annotations

from typing import Any, ClassVar

import tensorflow_datasets as tfds


class ConfiguredBuilder(tfds.core.DatasetBuilder, skip_registration=True):
    """A builder whose keyword arguments are the fields of its configuration class, `CONFIG`.

    TFDS otherwise expects a list of all configurations in advance. It also defaults to a format that needs TensorFlow.
    """

    CONFIG: ClassVar[type[tfds.core.BuilderConfig]]

    def __init__(
        self,
        *,
        config: tfds.core.BuilderConfig | None = None,
        file_format: str = "array_record",
        data_dir=None,
        version=None,
        **options: Any,
    ):
        """Configures the data set; writes nothing yet.

        Args:
          config: an instance of `CONFIG`, used instead of `options`.
          file_format: TFDS's name of the file format; ArrayRecord has random access.
          data_dir: TFDS's directory of prepared data sets.
          version: the version to read; None for `VERSION`.
          **options: the arguments of `CONFIG`.
        """
        config = config or self.CONFIG(**options)
        super().__init__(config=config, file_format=file_format, data_dir=data_dir, version=version)

    def _create_builder_config(self, builder_config, version):
        return builder_config  # TFDS would warn of a configuration that is not in its list each time one is opened
