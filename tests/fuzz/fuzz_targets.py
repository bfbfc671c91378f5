"""All targets, by name."""

from __future__ import annotations

import fuzz_data
import fuzz_media
import fuzz_readers
import fuzz_recipes
import fuzz_records
import fuzz_weights

TARGETS = {
    target.name: target
    for module in (fuzz_recipes, fuzz_data, fuzz_records, fuzz_readers, fuzz_media, fuzz_weights)
    for target in module.TARGETS
}  # fmt: skip
