# Copyright (c) mmscalablevit contributors. All rights reserved.
"""mmcv's compiled operators as operators that ``torch.export`` keeps whole, and their ONNX form.

The eager form calls mmcv, so that a traced model runs in PyTorch as before.
"""

from collections.abc import Callable

import torch
from mmcv.ops import nms as mmcv_nms
from mmcv.ops import roi_align as mmcv_roi_align
from torch import Tensor


@torch.library.custom_op('scalablevit::nms', mutates_args=())
def nms(boxes: Tensor, scores: Tensor, iou_thr: float, score_thr: float, limit: int) -> Tensor:
    """Indices of the kept boxes of (N, 4), x1, y1, x2, y2, best first, ``limit`` at most.

    Dropped are those whose score, of (N,), is not above ``score_thr``, or that overlap a better one
    by more than ``iou_thr``.
    """
    valid = (scores > score_thr).nonzero().squeeze(1)
    _, keep = mmcv_nms(boxes[valid], scores[valid], iou_thr)
    return valid[keep[:limit]]


@nms.register_fake
def _(boxes: Tensor, scores: Tensor, iou_thr: float, score_thr: float, limit: int) -> Tensor:
    # From 2 on no code takes a number of boxes for a case of its own; ONNX files take 0 and 1, too.
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(min=2), dtype=torch.long)


@torch.library.custom_op('scalablevit::roi_align', mutates_args=())
def roi_align(features: Tensor, rois: Tensor, size: list[int], scale: float, ratio: int) -> Tensor:
    """Features (1, C, H, W), aligned and average pooled in regions to (N, C, *size).

    Regions are (N, 4), x1, y1, x2, y2 in pixels of the image. ``scale`` is 1 / stride of the
    features, ``ratio`` the samples of each bin and axis; 0 takes as many as there are pixels.
    """
    numbered = torch.nn.functional.pad(rois, (1, 0))
    return mmcv_roi_align(features, numbered, size, scale, ratio, 'avg', True)


@roi_align.register_fake
def _(features: Tensor, rois: Tensor, size: list[int], scale: float, ratio: int) -> Tensor:
    return features.new_empty(rois.shape[0], features.shape[1], *size)


def translations() -> dict[Callable, Callable]:
    """The operators in ONNX, as ``custom_translation_table`` of ``torch.onnx.export``."""
    from onnxscript import opset18 as op

    def nms_to_onnx(boxes, scores, iou_thr: float, score_thr: float, limit: int):
        kept = op.NonMaxSuppression(
            op.Unsqueeze(boxes, [0]),
            op.Unsqueeze(scores, [0, 1]),
            op.Constant(value_ints=[limit]),
            op.Constant(value_floats=[iou_thr]),
            op.Constant(value_floats=[score_thr]),
        )
        # Of (batch, class, box) each.
        return op.Gather(kept, op.Constant(value_int=2), axis=1)

    def roi_align_to_onnx(features, rois, size: list[int], scale: float, ratio: int):
        count = op.Shape(rois, start=0, end=1)
        return op.RoiAlign(
            features,
            rois,
            op.Expand(op.Constant(value_ints=[0]), count),
            coordinate_transformation_mode='half_pixel',
            output_height=size[0],
            output_width=size[1],
            sampling_ratio=ratio,
            spatial_scale=scale,
        )

    operators = torch.ops.scalablevit
    return {operators.nms.default: nms_to_onnx, operators.roi_align.default: roi_align_to_onnx}
