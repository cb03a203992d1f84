"""1,797 scanned digits of 8 x 8 pixels, shipped with the package: a real data set that trains in seconds.

They are the test part of the UCI "Optical Recognition of Handwritten Digits" set (E. Alpaydin, C. Kaynak, 1998;
doi 10.24432/C50P49, CC BY 4.0), in the order in which scikit-learn's `load_digits` has them.
"""

from importlib import resources

import numpy as np

from fdg_jax.data.source import ArraySource


def digits() -> ArraySource:
    """The digits, pixels 0..16 normalised to -1..1; every fifth image, from the first, is held out for testing."""
    with resources.files("fdg_jax.data").joinpath("digits.npz").open("rb") as file, np.load(file) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    images = images[..., None].astype(np.uint8)
    held_out = np.arange(len(images)) % 5 == 0
    return ArraySource(
        name="digits",
        num_classes=10,
        train_images=images[~held_out],
        train_labels=labels[~held_out].astype(np.int32),
        test_images=images[held_out],
        test_labels=labels[held_out].astype(np.int32),
        mean=(8.0,),
        std=(8.0,),
    )
