"""The promises of a part as tests: for opticnerve's own parts, and for those of other packages.

    from opticnerve.testing import check_connector

    def test_my_connector():
        check_connector(MyConnector)

A check builds small modules with random weights and needs neither network nor GPU (where a GPU is present, it is used,
too). It raises one `ContractError` that lists every broken promise: what happened, and what the contract says.
"""

from opticnerve.testing.connectors import check_connector
from opticnerve.testing.contract import ContractError
from opticnerve.testing.encoders import check_encoder
from opticnerve.testing.formats import check_format
from opticnerve.testing.fusions import check_fusion

__all__ = ["ContractError", "check_connector", "check_encoder", "check_format", "check_fusion"]
