"""Imported by the server that `on_ranks` forks ranks from: imports the modules named in ``LT_TESTING_PRELOAD``."""

import contextlib
import gc
import importlib
import os

for _name in os.environ["LT_TESTING_PRELOAD"].split(","):
    # A broken module must not end the server: the rank that needs the module shows the error.
    with contextlib.suppress(Exception):
        importlib.import_module(_name)

gc.freeze()  # ranks share the memory of all this for as long as nobody writes to it, as a look for garbage would
