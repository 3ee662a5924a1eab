"""Sources of images and captions behind one random-access interface."""
