"""Allocations: from all spectra and one budget to the rank of every site.

To add one, write its file, a frozen dataclass that inherits from `Allocation`, and give it a YAML
in `conf/allocation`; those here are exported for Python.
"""

from iosvd.allocation.base import Allocation
from iosvd.allocation.component_importance import ComponentImportance
from iosvd.allocation.hull import Hull
from iosvd.allocation.layer_importance import LayerImportance
from iosvd.allocation.learned import Learned
from iosvd.allocation.lems import Lems
from iosvd.allocation.loss_aware import LossAware
from iosvd.allocation.objective import CalibrationObjective
from iosvd.allocation.sensitivity_search import SensitivitySearch
from iosvd.allocation.spectral import Spectral
from iosvd.allocation.type_grouped import TypeGrouped
from iosvd.allocation.uniform import Uniform
from iosvd.allocation.zero_sum import ZeroSum

__all__ = [
    "Allocation",
    "CalibrationObjective",
    "ComponentImportance",
    "Hull",
    "LayerImportance",
    "Learned",
    "Lems",
    "LossAware",
    "SensitivitySearch",
    "Spectral",
    "TypeGrouped",
    "Uniform",
    "ZeroSum",
]
