"""Not the package: that is the folder ``unique_attn`` beside this file.

From the folder above a checkout, ``import unique_attn`` finds the checkout, which has the same name. Without this file
it would be a namespace package, that is an empty one ("module 'unique_attn' has no attribute 'enable'"), and would hide
an editable install. With it, Python gets the installed package or, if there is none, the one of this checkout.
"""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

if __name__ == "unique_attn":  # pytest imports this file, too, by the checkout's name
    checkout = Path(__file__).resolve().parent
    elsewhere = [entry for entry in sys.path if Path(entry).resolve() != checkout.parent]
    spec = PathFinder.find_spec(__name__, [*elsewhere, str(checkout)])
    assert spec is not None
    assert spec.loader is not None
    sys.modules[__name__] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[__name__])
