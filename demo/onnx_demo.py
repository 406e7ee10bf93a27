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
    example = 'example: python demo/onnx_demo.py photo.jpg mask-rcnn.onnx --out objects.jpg'
    parser = argparse.ArgumentParser(description=__doc__, epilog=example)
    parser.add_argument('image', help='the image, in a format of OpenCV')
    parser.add_argument('model', help='a whole detector of tools/deployment/export_onnx.py')
    parser.add_argument('--out', required=True, help='picture to write')
    parser.add_argument('--score-thr', type=float, default=0.3, help='of objects, default 0.3')
    return parser.parse_args()


def main() -> None:
    """Detect, draw, write."""
    args = parse_args()
    if (image := cv2.imread(args.image)) is None:
        raise SystemExit(f'error: {args.image} is missing or no image')
    if not Path(args.model).is_file():
        raise SystemExit(f'error: model {args.model} is missing')
    session = onnxruntime.InferenceSession(args.model, providers=['CPUExecutionProvider'])
    if session.get_outputs()[0].name != 'dets':
        raise SystemExit(f'error: model {args.model} is no whole detector')
    names = json.loads(session.get_modelmeta().custom_metadata_map.get('classes', 'null'))
    dets, labels, *masks = detect(session, image)
    for i in np.flatnonzero(dets[:, 4] > args.score_thr):
        color = np.random.default_rng(labels[i]).integers(40, 256, 3).tolist()
        left, top, right, bottom = dets[i, :4].round().astype(int).tolist()
        if masks:
            inside = paste(masks[0][i], dets[i], image.shape)
            image[inside] = 0.5 * image[inside] + 0.5 * np.array(color)
        cv2.rectangle(image, (left, top), (right, bottom), color, 2)
        text = f'{names[labels[i]] if names else labels[i]} {dets[i, 4]:.2f}'
        cv2.putText(image, text, (left, max(top - 4, 12)), cv2.FONT_HERSHEY_SIMPLEX, 0.5, color, 1)
    cv2.imwrite(args.out, image)


def detect(session: onnxruntime.InferenceSession, image: np.ndarray) -> list[np.ndarray]:
    """Boxes with scores (N, 5) in pixels of a BGR image, labels, and masks if the model has any."""
    meta, sides = session.get_modelmeta().custom_metadata_map, session.get_inputs()[0].shape[2:]
    sizes, fixed = np.array(image.shape[:2]), isinstance(sides[0], int)
    limits = sides if fixed else sorted(json.loads(meta.get('scale', 'null')) or sizes)
    factor = min(limits / (sizes if fixed else np.sort(sizes)))
    height, width = (sizes * factor + 0.5).astype(int).tolist()
    scaled = cv2.resize(image, (width, height))[..., :: -1 if meta['channels'] == 'RGB' else 1]
    pixels = (scaled - json.loads(meta['mean'])) / json.loads(meta['std'])
    if fixed:
        pixels = np.pad(pixels, ((0, sides[0] - height), (0, sides[1] - width), (0, 0)))
    images = pixels.transpose(2, 0, 1)[None].astype(np.float32)
    found = [output[0] for output in session.run(None, {'images': images})]
    found[0][:, :4] /= np.tile([width, height] / sizes[::-1], 2)
    return found


def paste(mask: np.ndarray, box: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Where an object is in an image, from the probabilities (28, 28) over its box."""
    x, y = (np.arange(size, dtype=np.float32) + 0.5 for size in (shape[1], shape[0]))
    x = (x - box[0]) / (box[2] - box[0]) * mask.shape[1] - 0.5
    y = (y - box[1]) / (box[3] - box[1]) * mask.shape[0] - 0.5
    return cv2.remap(mask, *np.meshgrid(x, y), cv2.INTER_LINEAR) >= 0.5


if __name__ == '__main__':
    main()
