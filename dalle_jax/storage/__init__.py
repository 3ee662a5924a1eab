"""Local files and object storage."""
