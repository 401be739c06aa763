"""Figures that matplotlib draws, saved as PNG files of ours. Nothing else here needs matplotlib.

    figure = new_figure(path, figsize=(9, 4.7))             # before anything that takes long, since it may fail
    figure.subplots().plot(...)
    save_figure(figure, path)
"""

import io

from PIL import Image

from plumbing.files import BadInput
from plumbing.images import read_about, save_png


def new_figure(path, **options):
    """An empty matplotlib figure that can be saved at `path`. Raises BadInput where there is somebody's file, or no
    matplotlib."""
    read_about(path)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BadInput("this needs matplotlib: pip install matplotlib") from None
    return Figure(**options)


def save_figure(figure, path):
    """Write a figure in place of an older one, and print where."""
    drawn = io.BytesIO()
    figure.savefig(drawn)
    save_png(path, Image.open(drawn), {})
    print(path)
