"""Import timm next to any torchvision: `from repcon.models.timm_import import timm`."""

from repcon.models.torchvision_operators import complete_on_import

complete_on_import()

import timm  # noqa: E402
import timm.data.imagenet_info  # noqa: E402
import timm.models._builder  # noqa: E402
import timm.optim  # noqa: E402
import timm.scheduler  # noqa: E402
import timm.utils  # noqa: E402

__all__ = ["timm"]
