# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Draw the objects that an exported detector finds: numpy, OpenCV and onnxruntime are enough."""

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
import onnxruntime


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description='Run a file of tools/deployment/export_onnx.py on an image, and draw.',
        epilog='example: python demo/onnx_demo.py photo.jpg mask-rcnn.onnx --out objects.jpg',
    )
    parser.add_argument('image', help='the image, in a format of OpenCV')
    parser.add_argument('model', help='a whole detector, .onnx')
    parser.add_argument('--out', required=True, help='picture to write')
    parser.add_argument(
        '--score-thr', type=float, default=0.3, help='of drawn objects, default 0.3'
    )
    return parser.parse_args()


def main() -> None:
    """Detect, draw, write."""
    args = parse_args()
    image = cv2.imread(args.image)
    if image is None:
        raise SystemExit(f'error: {args.image} is missing or no image')
    if not Path(args.model).is_file():
        raise SystemExit(f'error: model {args.model} is missing')
    session = onnxruntime.InferenceSession(args.model, providers=['CPUExecutionProvider'])
    if session.get_outputs()[0].name != 'dets':
        raise SystemExit(f'error: model {args.model} is no whole detector')
    found = detect(session, image)
    names = json.loads(session.get_modelmeta().custom_metadata_map.get('classes', 'null'))
    found = [part[found[0][:, 4] > args.score_thr] for part in found]
    cv2.imwrite(args.out, draw(image, names, *found))


def detect(session: onnxruntime.InferenceSession, image: np.ndarray) -> list[np.ndarray]:
    """Boxes with scores (N, 5) in pixels of a BGR image, labels, and masks if the model has any."""
    meta = session.get_modelmeta().custom_metadata_map
    sides = session.get_inputs()[0].shape[2:]
    fixed = isinstance(sides[0], int)
    height, width = image.shape[:2]
    short, long = sorted(json.loads(meta.get('scale', 'null')) or (height, width))
    factor = min(long / max(height, width), short / min(height, width))
    if fixed:
        factor = min(sides[0] / height, sides[1] / width)
    scaled = cv2.resize(image, (int(width * factor + 0.5), int(height * factor + 0.5)))
    scaled = scaled[..., ::-1] if meta['channels'] == 'RGB' else scaled
    pixels = (scaled - json.loads(meta['mean'])) / json.loads(meta['std'])
    if fixed:
        spare = [(0, side - used) for side, used in zip(sides, pixels.shape[:2], strict=True)]
        pixels = np.pad(pixels, (*spare, (0, 0)))
    images = pixels.transpose(2, 0, 1)[None].astype(np.float32)
    found = [output[0] for output in session.run(None, {'images': images})]
    found[0][:, :4] /= np.tile([scaled.shape[1] / width, scaled.shape[0] / height], 2)
    return found


def paste(mask: np.ndarray, box: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Where an object is in an image, from the probabilities (28, 28) over its box."""
    x, y = (np.arange(size, dtype=np.float32) + 0.5 for size in (shape[1], shape[0]))
    x = (x - box[0]) / (box[2] - box[0]) * mask.shape[1] - 0.5
    y = (y - box[1]) / (box[3] - box[1]) * mask.shape[0] - 0.5
    return cv2.remap(mask, *np.meshgrid(x, y), cv2.INTER_LINEAR) >= 0.5


def draw(
    image: np.ndarray,
    names: list[str] | None,
    dets: np.ndarray,
    labels: np.ndarray,
    masks: np.ndarray | None = None,
) -> np.ndarray:
    """The image under the masks, boxes, names and scores of the objects."""
    colors = np.random.default_rng(0).integers(40, 256, (1 + max(labels, default=0), 3)).tolist()
    image = image.copy()
    for i, (*box, score) in enumerate(dets.tolist()):
        color = colors[labels[i]]
        if masks is not None:
            inside = paste(masks[i], box, image.shape)
            image[inside] = 0.5 * image[inside] + 0.5 * np.array(color)
        left, top, right, bottom = map(round, box)
        cv2.rectangle(image, (left, top), (right, bottom), color, 2)
        text = f'{names[labels[i]] if names else labels[i]} {score:.2f}'
        cv2.putText(image, text, (left, max(top - 4, 12)), cv2.FONT_HERSHEY_SIMPLEX, 0.5, color, 1)
    return image


if __name__ == '__main__':
    main()
