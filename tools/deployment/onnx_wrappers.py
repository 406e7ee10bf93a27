# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Models as modules whose inputs and outputs are plain tensors, for ``export_onnx.py``."""

from torch import Tensor, nn
from torch.nn import functional as F


class Wrapper(nn.Module):
    """A model whose inputs and outputs are plain tensors."""

    output_names: list[str]
    one_image = False
    # Of the traced image.
    example_sides = (97, 131)
    translations = None

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def pad_to_divisor(images: Tensor, divisor: int, value: float) -> Tensor:
    """Pad images on the right and bottom to multiples of a number, as preprocessors do."""
    height, width = images.shape[2:]
    return F.pad(images, (0, -width % divisor, 0, -height % divisor), value=float(value))


class Backbone(Wrapper):
    """The feature maps alone: images (B, 3, H, W) to ``stage0`` to ``stage3``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.backbone)
        self.output_names = [f'stage{i}' for i in self.model.out_indices]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the maps."""
        return tuple(self.model(images))


class Segmentor(Wrapper):
    """A segmentor on whole images (B, 3, H, W): logits (B, classes, H, W), labels (B, H, W)."""

    output_names = ['logits', 'labels']

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute logits and labels at the size of the images."""
        logits = self.model.encode_decode(images, [dict(img_shape=images.shape[2:])])
        if logits.shape[1] == 1:
            threshold = self.model.decode_head.threshold
            return logits, (logits.sigmoid() > threshold)[:, 0].long()
        return logits, logits.argmax(1)


class DetectorMaps(Wrapper):
    """A single-stage detector up to its head's maps, before decoding and NMS."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        levels = range(len(model.bbox_head.prior_generator.strides))
        self.output_names = [f'{kind}{i}' for kind in ('scores', 'boxes') for i in levels]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute ``scores`` of every level, then ``boxes`` of every level."""
        scores, boxes = self.model(images, mode='tensor')
        return (*scores, *boxes)


class Classifier(Wrapper):
    """A classifier: images (B, 3, H, W) to logits (B, classes)."""

    output_names = ['logits']

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Compute the logits."""
        return (self.model(images, mode='tensor'),)


class Normalized(Wrapper):
    """A wrapped model that takes pixels of 0 to 255, and normalizes them itself."""

    def __init__(self, wrapped: nn.Module, preprocessor: nn.Module) -> None:
        super().__init__(wrapped)
        for name in ('output_names', 'one_image', 'example_sides', 'translations', 'judge'):
            if hasattr(wrapped, name):
                setattr(self, name, getattr(wrapped, name))
        for name in ('mean', 'std'):
            self.register_buffer(name, getattr(preprocessor, name).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Normalize and compute."""
        return self.model((images - self.mean) / self.std)

    def reference(self, images: Tensor) -> object:
        """What the wrapped model is compared with."""
        eager = getattr(self.model, 'reference', self.model)
        return eager((images - self.mean) / self.std)
