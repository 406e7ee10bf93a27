# Copyright (c) mmscalablevit contributors. All rights reserved.
"""mmseg's Mask2Former for images of any size, its deformable attention by grid sampling.

The parts are its own; only the pixel decoder's bookkeeping of sizes, which mmdet keeps in tensors,
is written again.
"""

from unittest import mock

import torch
from mmdet.models.layers import MSDeformAttnPixelDecoder
from onnx_detectors import Sizes, sequence
from onnx_wrappers import Segmentor, pad_to_divisor
from torch import Tensor
from torch.nn import functional as F


class WholeMask2Former(Segmentor):
    """Mask2Former on an image (1, 3, H, W): logits (1, classes, H, W), labels (1, H, W)."""

    # nn.MultiheadAttention would fix the batch at the traced one anyway.
    one_image = True

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute logits and labels of the images, padded as in a test and cropped again."""
        padded, head = self.pad(images), self.model.decode_head
        maps = self.model.extract_feat(padded)
        with mock.patch.object(MSDeformAttnPixelDecoder, 'forward', decode_pixels):
            scores, masks = (of_layers[-1] for of_layers in head(maps, None))
        # As Mask2FormerHead.predict, whose data samples cannot hold open sizes.
        masks = F.interpolate(masks, padded.shape[2:], mode='bilinear', align_corners=False)
        scores = scores.softmax(-1)[..., :-1]
        logits = torch.einsum('bqc,bqhw->bchw', scores, masks.sigmoid())
        return self.crop(logits, images)

    def reference(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and labels by mmseg's and mmdet's own code."""
        padded = self.pad(images)
        logits = self.model.encode_decode(padded, [dict(img_shape=tuple(padded.shape[2:]))])
        return self.crop(logits, images)

    def pad(self, images: Tensor) -> Tensor:
        """Pad as the preprocessor in a test."""
        preprocessor = self.model.data_preprocessor
        divisor = (preprocessor.test_cfg or {}).get('size_divisor', 1)
        return pad_to_divisor(images, divisor, preprocessor.pad_val)

    def crop(self, logits: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits at the size of the images, and labels."""
        logits = logits[..., : images.shape[2], : images.shape[3]]
        return logits, logits.argmax(1)


def decode_pixels(
    self: MSDeformAttnPixelDecoder, feats: tuple[Tensor, ...]
) -> tuple[Tensor, list[Tensor]]:
    """``MSDeformAttnPixelDecoder.forward`` for any sizes of the maps (B, C, H, W)."""
    maps = feats[::-1][: self.num_encoder_levels]
    inputs = [conv(x) for conv, x in zip(self.input_convs, maps, strict=True)]
    places = [
        self.postional_encoding(None, x) + encoding.view(1, -1, 1, 1)
        for x, encoding in zip(inputs, self.level_encoding.weight, strict=True)
    ]
    sizes = Sizes(tuple(x.shape[2:]) for x in maps)
    points = torch.cat([centers(*size, maps[0]) for size in sizes])
    memory = self.encoder(
        query=sequence(inputs),
        query_pos=sequence(places),
        key_padding_mask=None,
        spatial_shapes=sizes,
        reference_points=points[None, :, None].expand(len(maps[0]), -1, len(maps), -1),
        level_start_index=None,
        valid_ratios=None,
    )
    parts = memory.split([height * width for height, width in sizes], 1)
    outs = [part.mT.unflatten(2, size) for part, size in zip(parts, sizes, strict=True)]
    rest = feats[: -len(maps)][::-1]
    for x, lateral, conv in zip(rest, self.lateral_convs, self.output_convs, strict=True):
        coarse = F.interpolate(outs[-1], x.shape[2:], mode='bilinear', align_corners=False)
        outs.append(conv(lateral(x) + coarse))
    return self.mask_feature(outs[-1]), outs[: self.num_outs]


def centers(height: int, width: int, like: Tensor) -> Tensor:
    """The centers (H * W, 2) of a map's pixels, x and y as parts of its width and height."""
    y, x = ((torch.arange(side).to(like) + 0.5) / side for side in (height, width))
    return torch.stack(torch.meshgrid(x, y, indexing='xy'), -1).flatten(0, 1)
