"""Files on a disk or on object storage."""
