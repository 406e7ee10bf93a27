# Copyright (c) mmscalablevit contributors. All rights reserved.
"""mmdet's detectors from image to boxes, in operators that ONNX has.

The parts are the detector's own; only the selection of boxes, which mmdet writes with branches on
their number, and DINO's bookkeeping of the sizes of its maps are written again.
"""

from unittest import mock

import numpy as np
import torch
from mmdet.models.dense_heads import RetinaHead, RPNHead
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from onnx_operators import nms, roi_align, translations
from onnx_wrappers import Wrapper, pad_to_divisor
from torch import Tensor, nn
from torch.nn import functional as F

from mmscalablevit.errors import UserError

# Pixels, and probability.
BOX_TOLERANCE, SCORE_TOLERANCE = 0.1, 1e-3


class OneImage(Wrapper):
    """A detector of one image of any size, and its comparison with mmdet's own code."""

    output_names = ['dets', 'labels']
    one_image = True
    translations = staticmethod(translations)

    def pad(self, images: Tensor) -> Tensor:
        """Pad as the detector's preprocessor."""
        preprocessor = self.model.data_preprocessor
        return pad_to_divisor(images, preprocessor.pad_size_divisor, preprocessor.pad_value)

    def reference(self, images: Tensor) -> InstanceData:
        """What mmdet itself finds in the same image; masks are of the image's size."""
        shape, padded = tuple(images.shape[2:]), self.pad(images)
        sizes = dict(img_shape=shape, ori_shape=shape, batch_input_shape=tuple(padded.shape[2:]))
        sample = DetDataSample(metainfo=dict(sizes, scale_factor=(1, 1)))
        return self.model.predict(padded, [sample])[0].pred_instances

    def judge(self, wanted: InstanceData, got: list[Tensor]) -> str:
        """Say how many boxes are mmdet's; raises where more than 1% are not."""
        dets, labels = got[0][0], got[1][0]
        near = (wanted.bboxes[:, None] - dets[:, :4]).abs().amax(2) <= BOX_TOLERANCE
        near &= (wanted.scores[:, None] - dets[:, 4]).abs() <= SCORE_TOLERANCE
        near &= wanted.labels[:, None] == labels
        same = int(near.any(1).sum())
        text = f'{same} of {len(wanted)} boxes of mmdet are among {len(dets)} of the file'
        if min(same, int(near.any(0).sum())) < 0.99 * max(near.shape):
            raise UserError(text)
        return text


class WholeDetector(OneImage):
    """RetinaNet, Mask R-CNN or Cascade Mask R-CNN, in eval mode, on one image of any size.

    Raises:
        UserError: A part of the detector has no form in ONNX here.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.roi_head = getattr(model, 'roi_head', None)
        self.dense_head = model.bbox_head if self.roi_head is None else model.rpn_head
        self.with_mask = self.roi_head is not None and self.roi_head.with_mask
        self.output_names = ['dets', 'labels', *(['masks'] if self.with_mask else [])]
        check(self)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Detect objects in an image (1, 3, H, W), normalized, not padded.

        Returns:
            ``dets`` (1, N, 5), x1, y1, x2, y2 in pixels of the image and score, best first;
            ``labels`` (1, N), from 0; with a mask head ``masks`` (1, N, 28, 28), the probability
            that the object is there, over the area of its box.
        """
        features = self.model.extract_feat(self.pad(images))
        boxes, scores, labels = self.propose(features, images.shape[2:])
        if self.roi_head is not None:
            boxes, scores, labels = self.classify(features, boxes, images.shape[2:])
        masks = [self.segment(features, boxes, labels)[None]] if self.with_mask else []
        return join(boxes, scores), labels[None], *masks

    def propose(self, features: tuple[Tensor, ...], shape: torch.Size) -> tuple[Tensor, ...]:
        """The boxes, scores and labels of a dense head after NMS."""
        head, cfg = self.dense_head, self.dense_head.test_cfg
        maps = list(zip(*head(features), strict=True))
        sizes = [score_map.shape[2:] for score_map, _ in maps]
        levels = head.prior_generator.grid_priors(sizes, device=features[0].device)
        found = []
        for level, ((score_map, delta_map), priors) in enumerate(zip(maps, levels, strict=True)):
            scores = score_map[0].permute(1, 2, 0).reshape(-1, head.cls_out_channels)
            scores = scores.sigmoid().flatten()
            number = scores.shape[0]
            if cfg.nms_pre > 0:
                number = torch.sym_min(cfg.nms_pre, number)
            scores, index = scores.topk(number)
            prior = index // head.cls_out_channels
            labels = index % head.cls_out_channels
            # NMS of proposals knows no classes, but levels.
            labels = labels if self.roi_head is None else labels + level
            deltas = delta_map[0].permute(1, 2, 0).reshape(-1, 4)[prior]
            found.append((head.bbox_coder.decode(priors[prior], deltas), scores, labels))
        boxes, scores, labels = (torch.cat(part) for part in zip(*found, strict=True))
        boxes = clip(boxes, shape, head.bbox_coder)
        sides = boxes[:, 2:] - boxes[:, :2]
        if cfg.get('min_bbox_size', -1) >= 0:
            scores = torch.where(sides.amin(1) > cfg.min_bbox_size, scores, -1.0)
        return select(boxes, scores, labels, cfg.get('score_thr', 0.0), cfg)

    def classify(
        self, features: tuple[Tensor, ...], boxes: Tensor, shape: torch.Size
    ) -> tuple[Tensor, ...]:
        """Boxes, scores and labels of an RoI head, or of the stages of a cascade of them."""
        heads = each(self.roi_head.bbox_head)
        stages = list(zip(each(self.roi_head.bbox_roi_extractor), heads, strict=True))
        logits = []
        for number, (extractor, head) in enumerate(stages, 1):
            logit, deltas = head(extract(extractor, features, boxes))
            logits.append(logit)
            if number < len(stages):
                best = logit[:, :-1].argmax(1)
                boxes = head.regress_by_class(boxes, best, deltas, dict(img_shape=None))
                boxes = clip(boxes, shape, head.bbox_coder)
        scores = (sum(logits) / len(logits)).softmax(1)[:, :-1]
        classes = scores.shape[1]
        # (N, 4) or, of boxes for each class, (N, classes * 4).
        boxes = clip(head.bbox_coder.decode(boxes, deltas), shape, head.bbox_coder)
        boxes = boxes.view(-1, boxes.shape[1] // 4, 4).expand(-1, classes, 4).reshape(-1, 4)
        labels = torch.arange(classes).expand_as(scores).flatten()
        cfg = self.roi_head.test_cfg
        return select(boxes, scores.flatten(), labels, cfg.score_thr, cfg)

    def segment(self, features: tuple[Tensor, ...], boxes: Tensor, labels: Tensor) -> Tensor:
        """Masks (N, 28, 28), of a cascade the mean of its stages."""
        heads = each(self.roi_head.mask_head)
        stages = zip(each(self.roi_head.mask_roi_extractor), heads, strict=True)
        masks = [head(extract(pool, features, boxes)).sigmoid() for pool, head in stages]
        mask = torch.stack(masks).mean(0)
        if mask.shape[1] == 1:
            return mask[:, 0]
        index = labels[:, None, None, None].expand(-1, 1, *mask.shape[2:])
        return mask.gather(1, index)[:, 0]


class WholeDino(OneImage):
    """DINO, in eval mode, on one image of any size, its deformable attention by grid sampling.

    Raises:
        UserError: Its preprocessor pads, for which it would need masks.
    """

    # Of more points than there are queries.
    example_sides = (353, 389)

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        if model.data_preprocessor.pad_size_divisor > 1:
            raise UserError('DINO can be exported with pad_size_divisor=1 alone')

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Detect objects: ``dets`` and ``labels`` of an image (1, 3, H, W), as WholeDetector."""
        model = self.model
        maps = model.extract_feat(images)
        places = [
            model.positional_encoding(None, input=x) + embedding.view(1, -1, 1, 1)
            for x, embedding in zip(maps, model.level_embed, strict=True)
        ]
        shared = dict(
            spatial_shapes=Sizes(tuple(x.shape[2:]) for x in maps),
            level_start_index=None,
            valid_ratios=images.new_ones(1, len(maps), 2),
        )
        # By mmdet's forms of these, all images had the size of the traced one.
        with (
            mock.patch.object(torch, 'linspace', steps_of_one),
            mock.patch.object(Tensor, 'new_tensor', lambda self, data: torch.tensor(data).to(self)),
        ):
            encoded = model.forward_encoder(
                feat=sequence(maps), feat_mask=None, feat_pos=sequence(places), **shared
            )
            queries, _ = model.pre_decoder(**encoded)
        decoded = model.forward_decoder(memory_mask=None, **queries, **shared)
        head, metainfo = model.bbox_head, dict(img_shape=images.shape[2:])
        found = head.predict_by_feat(*head(**decoded), batch_img_metas=[metainfo])[0]
        return join(found.bboxes, found.scores), found.labels[None]


class Sizes(list):
    """Heights and widths of maps, with the two ways in which mmcv indexes a tensor of them."""

    def __getitem__(self, index: int | tuple) -> object:
        """A tensor of heights or widths, of ``[:, i]`` an array that can be compared in a trace."""
        if not isinstance(index, tuple):
            return super().__getitem__(index)
        sizes = [size[index[1]] for size in self]
        return torch.tensor(sizes) if index[0] is Ellipsis else np.array(sizes, dtype=object)


def steps_of_one(start: float, end: float, steps: int, **kwargs: object) -> Tensor:
    """``torch.linspace`` of points at a distance of one, which are all that mmdet takes."""
    return start + torch.arange(steps, **kwargs)


def sequence(maps: list[Tensor]) -> Tensor:
    """Maps (1, C, H, W) of all levels as (1, sum of H * W, C)."""
    return torch.cat([x.flatten(2) for x in maps], 2).transpose(1, 2)


def check(detector: WholeDetector) -> None:
    """Raise where a part of a detector is computed otherwise than here."""
    dense, roi = detector.dense_head, detector.roi_head
    if not isinstance(dense, RetinaHead | RPNHead) or not dense.use_sigmoid_cls:
        raise unsupported(dense, 'only RetinaHead and RPNHead with sigmoid')
    if roi is not None:
        if type(roi) not in (StandardRoIHead, CascadeRoIHead) or roi.with_shared_head:
            raise unsupported(roi, 'only StandardRoIHead and CascadeRoIHead')
        if any(head.custom_activation for head in each(roi.bbox_head)):
            raise unsupported(roi.bbox_head, 'only heads with softmax')
        for extractor in each(roi.bbox_roi_extractor):
            if type(extractor) is not SingleRoIExtractor or not extractor.roi_layers[0].aligned:
                raise unsupported(extractor, 'only SingleRoIExtractor, aligned')
    tests = {'': dense.test_cfg} if roi is None else {'.rpn': dense.test_cfg, '.rcnn': roi.test_cfg}
    for part, cfg in tests.items():
        if set(cfg.nms) != {'type', 'iou_threshold'} or cfg.nms.type != 'nms':
            key = f'model.test_cfg{part}.nms'
            raise UserError(
                f'{dict(cfg.nms)} cannot be exported: ONNX knows NMS of the type nms, with '
                f'iou_threshold and nothing else; set it with --cfg-options {key}._delete_=True '
                f'{key}.type=nms {key}.iou_threshold=0.5'
            )


def unsupported(part: nn.Module, allowed: str) -> UserError:
    """An error about a part of a detector."""
    return UserError(f'{type(part).__name__} cannot be exported: {allowed} can')


def each(parts: nn.Module) -> list[nn.Module]:
    """The stages of a cascade, or the one part."""
    return list(parts) if isinstance(parts, nn.ModuleList) else [parts]


def join(boxes: Tensor, scores: Tensor) -> Tensor:
    """Boxes with their scores, for a batch of one."""
    return torch.cat([boxes, scores[:, None]], 1)[None]


def clip(boxes: Tensor, shape: torch.Size, coder: object) -> Tensor:
    """Clip boxes (N, ... * 4) to an image."""
    if not coder.clip_border:
        return boxes
    x, y = boxes.view(-1, 2).unbind(1)
    return torch.stack([x.clamp(0, shape[1]), y.clamp(0, shape[0])], 1).view(boxes.shape)


def select(
    boxes: Tensor, scores: Tensor, labels: Tensor, score_thr: float, cfg: ConfigDict
) -> tuple[Tensor, Tensor, Tensor]:
    """NMS among boxes of the same label, which are moved apart for it as in mmcv."""
    largest = torch.where(scores > score_thr, boxes.amax(1), 0.0).max()
    moved = boxes + (labels * (largest + 1))[:, None]
    keep = nms(moved, scores, cfg.nms.iou_threshold, score_thr, cfg.max_per_img)
    return boxes[keep], scores[keep], labels[keep]


def extract(extractor: nn.Module, features: tuple[Tensor, ...], boxes: Tensor) -> Tensor:
    """Pool each box from the level of its size: (N, 4) to (N, C, height, width)."""
    number = extractor.num_inputs
    levels = extractor.map_roi_levels(F.pad(boxes, (1, 0)), number)
    order, pooled = [], []
    for level, layer in enumerate(extractor.roi_layers):
        index = (levels == level).nonzero().squeeze(1)
        order.append(index)
        size, ratio = list(layer.output_size), layer.sampling_ratio
        pooled.append(roi_align(features[level], boxes[index], size, layer.spatial_scale, ratio))
    order = torch.cat(order)
    place = torch.arange(boxes.shape[0]).scatter(0, order, torch.arange(order.shape[0]))
    return torch.cat(pooled)[place]
