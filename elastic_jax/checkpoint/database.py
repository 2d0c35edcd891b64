"""Reading one array of an Orbax item, chunk by chunk, without reading what lies between them."""

from __future__ import annotations

from typing import Any

import tensorstore as ts
from etils import epath

# Decoded index nodes that are kept in memory; chunks of arrays are not kept.
INDEX_CACHE = 1 << 27
INDEX_NODE = 1 << 16
# Chunks that lie side by side in a file are read together, up to so many bytes; nothing between them is.
COALESCING = {'experimental_read_coalescing_threshold_bytes': 1, 'experimental_read_coalescing_merged_bytes': 1 << 20}


class Database:
    """The arrays of an Orbax item. Orbax keeps all of them in one OCDBT database, each as zarr under its dotted path.

    Raises: ValueError or OSError of tensorstore, when the database cannot be read.
    """

    def __init__(self, directory: epath.Path):
        where = str(directory)
        url = (where if '://' in where else f'file://{where}').rstrip('/') + '/'
        index = 'cache_pool#index'
        self.context = ts.Context({'cache_pool': {'total_bytes_limit': 0}, index: {'total_bytes_limit': INDEX_CACHE}})
        # Orbax writes index nodes of up to 100 MB, and finding a chunk takes time in proportion to its node: reading many
        # chunks would take quadratic time. So the index, about 0.5 % of the data, is copied into small nodes in memory.
        base = {'driver': 'kvstack', 'layers': [{'base': url}, {'prefix': 'index/', 'base': 'memory://nodes/'}]}
        stored = {'driver': 'ocdbt', 'base': base, 'cache_pool': index, **COALESCING}
        prefixes = ('btree_node_data_prefix', 'version_tree_node_data_prefix', 'value_data_prefix')
        self.copied = {
            **stored,
            'manifest': 'memory://manifest/',
            **dict.fromkeys(prefixes, 'index/'),
            'assume_config': True,
            'config': {'max_inline_value_bytes': 1024, 'max_decoded_node_bytes': INDEX_NODE, 'manifest_kind': 'single'},
        }
        open_store = lambda spec: ts.KvStore.open(spec, context=self.context).result()
        open_store(stored).experimental_copy_range_to(open_store(self.copied)).result()

    def open(self, path: str) -> Any:
        """A future of the tensorstore of one array; damaged or missing chunks are errors, not zeros."""
        spec = {
            'driver': 'zarr',
            'kvstore': {**self.copied, 'path': f'{path}/'},
            'fill_missing_data_reads': False,
            'recheck_cached_data': False,
            'recheck_cached_metadata': False,
        }
        return ts.open(spec, open=True, context=self.context)
