"""Runs in the environment of requirements-mediapipe.txt: python mediapipe_classify.py FILE IMAGES.npz ANSWERS.json [OPTIONS]

FILE is a .tflite file. IMAGES.npz holds uint8 images `(height, width, 3)`, each of its own size, OPTIONS further arguments of
`ImageClassifierOptions` as JSON. ANSWERS.json gets MediaPipe's version, and for each image its categories, the most probable
first.
"""

import dataclasses
import json
import sys

import mediapipe
import numpy as np
from mediapipe.tasks.python import BaseOptions, vision


def main(file, images, answers, options="{}"):
    base = BaseOptions(model_asset_path=file, delegate=BaseOptions.Delegate.CPU)
    options = vision.ImageClassifierOptions(base_options=base, **json.loads(options))
    rows = []
    with vision.ImageClassifier.create_from_options(options) as classifier, np.load(images) as arrays:
        for name in arrays:
            image = mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=np.ascontiguousarray(arrays[name]))
            [head] = classifier.classify(image).classifications
            rows.append([dataclasses.asdict(category) for category in head.categories])
    with open(answers, "w") as out:
        json.dump({"version": mediapipe.__version__, "images": rows}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
