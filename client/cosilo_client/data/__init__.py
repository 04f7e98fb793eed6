"""The site's images: where they come from, decoded once, and the part that is held out.

numpy and Pillow only: the daemon reads this room for its preflight, and it must not load torch. What leaves it is
arrays and counts.
"""

from cosilo_client.data.config import DataConfig
from cosilo_client.data.decoding import LocalImages, load_images
from cosilo_client.data.heldout import Split, split_heldout
from cosilo_client.data.sources import ImageSource, Picture, Unreadable, census, data_stamp, open_source

__all__ = [
    "DataConfig",
    "ImageSource",
    "LocalImages",
    "Picture",
    "Split",
    "Unreadable",
    "census",
    "data_stamp",
    "load_images",
    "open_source",
    "split_heldout",
]
