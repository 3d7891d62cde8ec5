"""Labels and masks of images, and of whole data sets."""
