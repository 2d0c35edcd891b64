"""How fast batches come: tokens per second of the byte-level pipeline, against a plain copy of as many tokens.

  python experiments/bench/data.py [--seconds 4]

Target: at least 5 million tokens per second, so that data never holds up a step.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from elastic_jax.data.pipeline import default_data_config, load_stores, make_iterator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seconds', type=float, default=4.0)
    arguments = parser.parse_args()
    config = default_data_config()
    begun = time.perf_counter()
    (store,) = load_stores(config, 'train').values()
    print(f'read and tokenised {len(store.tokens) / 1e6:.1f} M tokens in {time.perf_counter() - begun:.1f} s')
    print(f'{"batch":>14s}{"M tokens/s":>14s}{"of a copy":>12s}')
    for batch_size, context in ((8, 256), (8, 1024), (16, 8192)):
        batches = make_iterator(config, split='train', batch_size=batch_size, context=context, seed=0)
        next(batches)
        count, begun = 0, time.perf_counter()
        while time.perf_counter() - begun < arguments.seconds:
            last = next(batches)
            count += last['tokens'].size
        speed = count / (time.perf_counter() - begun)
        begun, copies = time.perf_counter(), 0
        while time.perf_counter() - begun < 0.5:
            _ = {key: np.array(value) for key, value in last.items()}
            copies += last['tokens'].size
        copy_speed = copies / (time.perf_counter() - begun)
        print(f'{batch_size:>6d} x {context:<5d}{speed / 1e6:14.1f}{speed / copy_speed:12.3f}')


if __name__ == '__main__':
    main()
