"""Does recursion help to classify images alone, at equal training FLOPs? The control of `siglip.py`: the paper says that it does not.

    python benchmarks/vision_control.py

trains the image tower of `siglip.py` as a classifier, without any text, on the same images with the same batches, plain and
recursive, and compares accuracies on held-out images. The options are those of `siglip.py`; it writes into `outputs/vision_control`.
"""

import pathlib

import siglip
import tyro


DEFAULT = siglip.Options(
    arms=("plain", "A^2 B", "(A B)^2", "stochastic"), output=pathlib.Path("outputs/vision_control")
)


def main() -> None:
    """The command."""
    siglip.compare(tyro.cli(siglip.Options, default=DEFAULT, description=__doc__), "classes")


if __name__ == "__main__":
    main()
