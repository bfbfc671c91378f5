"""Where the `opticnerve` command starts.

`import opticnerve` registers its classes with transformers' Auto classes, for which torch and transformers are
imported:
seconds that `opticnerve --help` should not take. That this module is among `sys.modules` tells `opticnerve` that the
command line is in charge, which imports what a command needs and when it needs it.
"""

from __future__ import annotations

import os
import sys

# libgomp's threads spin for a long time before they sleep. Beside any other busy process they then wait for each
# other's time slices, and a training step takes ten times as long; with a short spin it is as fast alone, and keeps its
# pace in company.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

# Under `python -m opticnerve_launch` (and so under `accelerate launch -m`) this module goes by the name `__main__`.
sys.modules.setdefault("opticnerve_launch", sys.modules[__name__])


def main() -> None:
    """Run the command line; the process ends with its exit code."""
    from opticnerve.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
