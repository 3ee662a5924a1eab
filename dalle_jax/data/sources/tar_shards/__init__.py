"""Image–caption tar shards, as img2dataset and WebDataset write them, read in place with random access.

    DIR/00000.tar, DIR/00001.tar, …     each with 000000000.jpg, 000000000.txt, 000000000.json, 000000001.jpg, …

`listing` finds the shards and `reading` reads one in order. `scanning` divides the samples into splits and notes where
each image is, in several processes. `index` stores that, and `shards_source` reads examples through it.

Images are members with one of the usual endings. The caption is the content of the .txt (.caption, .cap), or "caption"
in the .json; see reading.py. Shards may be compressed (.tar.gz, .tgz). Those have no random access, so their images are
copied next to the index.

Splits: if DIR holds the shards, a twentieth of the samples is "validation" and the rest is "train". A hash of a
sample's key decides, so that no sample changes sides when others are added. If sub-folders hold the shards
(DIR/train/00000.tar), each sub-folder is the split of its name.
"""
