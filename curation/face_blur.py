"""Faces made unrecognizable. The only step that changes an image's bytes, and only those of images with faces."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from curation.config import FaceBlur
from infra.errors import UserError
from pretrain.data.decode import AS_DECLARED, ImageRejected, decode, open_image
from pretrain.data.sample_depth import DepthSettings

Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels"""
_QUALITY = 95  # of JPEG and WebP
_WRITTEN = {"JPEG": "JPEG", "MPO": "JPEG", "PNG": "PNG", "WEBP": "WEBP"}
_LONGEST = 640  # pixels of the side that YuNet sees; it knows faces of up to half of them


class FaceBlurrer:
    """Finds faces and blurs them.

    Raises:
        UserError: the detector's model cannot be read.
    """

    def __init__(self, config: FaceBlur, depth: DepthSettings = AS_DECLARED) -> None:
        self._depth = depth
        self._detect = _load_lbp(config) if config.model is None else _load_yunet(config, config.model)
        self._margin = config.margin

    def blur(self, extension: str, data: bytes) -> tuple[str, bytes] | None:
        """An encoded image again with its faces blurred, and its extension: in its own format, others become PNG. None
        if it has none or is no image."""
        try:
            opened = open_image(data)
            image, kind = decode(opened, depth=self._depth), opened.header.format
        except ImageRejected:
            return None
        boxes = self._detect(np.asarray(image))
        if not boxes:
            return None
        buffer = io.BytesIO()
        found = blur_boxes(image, [self._widen(box, image.size) for box in boxes])
        found.save(buffer, _WRITTEN.get(kind or "", "PNG"), quality=_QUALITY)
        return (extension if kind in _WRITTEN else "png"), buffer.getvalue()

    def _widen(self, box: Box, size: tuple[int, int]) -> Box:
        left, top, right, bottom = box
        x, y = round((right - left) * self._margin), round((bottom - top) * self._margin)
        return max(left - x, 0), max(top - y, 0), min(right + x, size[0]), min(bottom + y, size[1])


def blur_boxes(image: Image.Image, boxes: list[Box]) -> Image.Image:
    """An image with some boxes blurred beyond recognition, their borders soft."""
    found = image.copy()
    for box in boxes:
        side = max(box[2] - box[0], box[3] - box[1])
        mask = Image.new("L", image.size)
        ImageDraw.Draw(mask).ellipse(box, fill=255)
        smooth = found.filter(ImageFilter.GaussianBlur(max(side / 6, 2)))
        found.paste(smooth, mask=mask.filter(ImageFilter.GaussianBlur(side / 20)))
    return found


def _load_lbp(config: FaceBlur) -> Callable[[np.ndarray], list[Box]]:
    """The detector that comes with scikit-image: a cascade of local binary patterns, for frontal faces."""
    from skimage.data import lbp_frontal_face_cascade_filename
    from skimage.feature import Cascade

    cascade = Cascade(lbp_frontal_face_cascade_filename())

    def detect(pixels: np.ndarray) -> list[Box]:
        shorter = min(pixels.shape[:2])
        least = max(round(shorter * config.min_share), 24)
        if shorter < least:
            return []
        sizes = {"min_size": (least, least), "max_size": (shorter, shorter)}
        found = cascade.detect_multi_scale(pixels, scale_factor=1.2, step_ratio=1, **sizes)
        return [(each["c"], each["r"], each["c"] + each["width"], each["r"] + each["height"]) for each in found]

    return detect


def _load_yunet(config: FaceBlur, model: str) -> Callable[[np.ndarray], list[Box]]:
    """YuNet (Wu et al., Machine Intelligence Research 2023), by OpenCV."""
    import cv2

    if not Path(model).is_file():
        raise UserError(f"{model}: no such file; give the ONNX file of a YuNet face detector")
    try:
        detector = cv2.FaceDetectorYN.create(model, "", (320, 320), config.min_score)
    except cv2.error:
        raise UserError(f"{model}: not a YuNet face detector in ONNX form; give another file") from None

    def detect(pixels: np.ndarray) -> list[Box]:
        height, width = pixels.shape[:2]
        scale = min(_LONGEST / max(height, width), 1.0)
        small = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else pixels
        detector.setInputSize(small.shape[1::-1])
        found = detector.detect(np.ascontiguousarray(small[..., ::-1]))[1]
        boxes = [] if found is None else np.round(found[:, :4] / scale).astype(int).tolist()
        return [(max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)) for x, y, w, h in boxes]

    return detect
