"""The contract that opticnerve's own parts are held to."""

from functools import partial

from example_parts.connector import WindowPoolConnector
from example_parts.encoder import ConvStemEncoder

from opticnerve.testing import check_connector, check_encoder


def test_encoder() -> None:
    check_encoder(partial(ConvStemEncoder, width=16, depth=3, image_size=32))


def test_connector() -> None:
    check_connector(WindowPoolConnector)
