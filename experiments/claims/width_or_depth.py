"""Claim 3: narrower keeps more of the parent than shallower, at the same number of parameters.

Star Elastic (arXiv 2605.07182) reports 98.1 % of the parent's accuracy for width against 95.2 % for depth, 15 % smaller. One
budget each, distilled alone at equal tokens:
  - `depth` drops the two blocks that the ranking of layers finds least important,
  - `width` keeps every block, with one proportion of every axis, at the number of parameters that `depth` came to.

  python experiments/claims/width_or_depth.py --seeds 0,1,2
"""

from lab import Setting, alone, main, read_result
from ml_collections import ConfigDict


def depth(setting: Setting, config: ConfigDict) -> None:
    alone('small')(setting, config)
    config.widths.small = f'layers={setting.arch.layers - 2}'
    config.calibrate.layer_batches = 2


def width(setting: Setting, config: ConfigDict) -> None:
    alone('small')(setting, config)
    shallow = read_result(setting, 'depth', config.seed)['budgets']['small']['parameters']
    config.widths.small = setting.uniform(shallow / setting.parameters)


ARMS = {'depth': depth, 'width': width}

if __name__ == '__main__':
    main(ARMS, __doc__)
