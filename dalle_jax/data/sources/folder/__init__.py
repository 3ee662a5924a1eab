"""A folder of images with captions.

`listing` finds the files, `csv_rows` and `tables` read a captions table, `captions` joins both to examples, `splits`
divides them into training and validation, and `folder_source` reads them.
"""

from dalle_jax.data.sources.folder.folder_source import FolderSource

__all__ = ["FolderSource"]
