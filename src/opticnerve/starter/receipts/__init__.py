"""Made-up receipts in English and Japanese: printed, faded, crumpled and photographed, with questions, exact answers,
transcriptions, and the boxes of what answers them. What is tested on has shops, layouts and fonts never trained on.
"""

from opticnerve.starter.receipts.write import prepare

__all__ = ["prepare"]
