"""HISA inside Hugging Face models: `hisa.patch(model)`.

    models.py    which indexers are known, and what differs between them: one table row per model
    settings.py  the options of a patch, checked once
    masks.py     attention masks -> one range of keys per query, once per model forward
    indexer.py   the patched forward: project, select with a `HierarchicalIndexer`, complete
    evidence.py  which keys of a cache are those that an earlier call left there
    kept.py      pooled and quantised keys of these, kept beside the cache
    audit.py     runs flat for a share of the rows too, and keeps how well the two agree
    slots.py     where a forward is put on a module, and how it is taken off again
    patching.py  patch() and the handle it returns
    status.py    what a handle reports
    capturing.py capture(): records what indexers score

Nothing here imports transformers: indexers are recognised on the model that is given.
"""

from .capturing import Captured, capture, load_capture
from .patching import PatchHandle, patch
from .settings import Settings
from .status import LayerStatus, Status

__all__ = [
    "Captured",
    "LayerStatus",
    "PatchHandle",
    "Settings",
    "Status",
    "capture",
    "load_capture",
    "patch",
]
