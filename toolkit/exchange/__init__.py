"""Import of activation caches and graded completions made elsewhere, export of selections of a store.

Nothing pickled is ever loaded.
"""

from rlgen_stats.toolkit.exchange.caches import Cache, open_cache
from rlgen_stats.toolkit.exchange.exporting import Exported, export_activations
from rlgen_stats.toolkit.exchange.graded_tables import read_graded
from rlgen_stats.toolkit.exchange.importing import Imported, import_activations
from rlgen_stats.toolkit.exchange.label_table import read_labels

__all__ = [
    "Cache",
    "Exported",
    "Imported",
    "export_activations",
    "import_activations",
    "open_cache",
    "read_graded",
    "read_labels",
]
