# Copyright (c) mmscalablevit contributors. All rights reserved.
"""ScalableViT backbones for mmdet, mmseg and mmpretrain.

Importing it registers ``ScalableViT`` and the engine parts in mmengine's root registries: in the
config of any OpenMMLab toolbox,
``custom_imports = dict(imports=['mmscalablevit'], allow_failed_imports=False)`` is enough.
"""

from .compat import check_dependencies
from .version import __version__

check_dependencies()

from ._moved import keep_old_names  # noqa: E402
from .engine import LayerDecayOptimWrapperConstructor  # noqa: E402
from .models import ScalableViT  # noqa: E402

keep_old_names()

__all__ = ['LayerDecayOptimWrapperConstructor', 'ScalableViT', '__version__']
