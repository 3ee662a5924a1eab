"""The phases of the measurements on a GPU. Each has a function `run(recorder)`."""
