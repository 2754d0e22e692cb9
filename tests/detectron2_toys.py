"""Small detectron2 detectors of our configuration, and what they are fed; needs no detectron2."""

import torch

from ssod_imwa.data.batches import Batch, Part
from ssod_imwa.detection.data.records import Targets, View
from ssod_imwa.runs.config import load_config

CLASSES = 3
FASTER_RCNN = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
DENSE = ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", "COCO-Detection/fcos_R_50_FPN_1x.py")
SMALL = {
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.FPN.OUT_CHANNELS": 8,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[16], [32], [64], [128], [256]],
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[1.0]],
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    "INPUT.FORMAT": "RGB",
    "MODEL.ROI_HEADS.LOSS": "FocalLoss",
    # As many as there are: what is sampled does not depend on the generators.
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 4096,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 4096,
    "MODEL.RPN.IOU_THRESHOLDS": [0.3, 0.7],
}
# Where torchvision's detectors have no choice.
LIKE_TORCHVISION = {
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlign",
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 2,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 2000,
    "MODEL.WEIGHTS": "",
}


def config(toolkit="detectron2", detector=FASTER_RCNN, **more):
    settings = {**SMALL, **more}
    if toolkit == "detectron2":
        settings |= {"MODEL.TOOLKIT": toolkit, "MODEL.DETECTRON2.CONFIG": detector}
        settings |= LIKE_TORCHVISION
    overrides = [text for pair in settings.items() for text in map(str, pair)]
    return load_config(overrides=overrides)


def images():
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
        for size in ((3, 64, 96), (3, 96, 64))
    ]


TARGETS = [
    Targets(torch.tensor([[10.0, 12, 40, 44], [50, 8, 90, 60]]), torch.tensor([2, 0])),
    Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)),
]


def unlabeled_batch():
    def part(targets):
        matrix = torch.eye(3, dtype=torch.float64)
        pairs = zip(images(), targets, strict=True)
        views = [View(image, matrix, of_image) for image, of_image in pairs]
        same = dict.fromkeys(("weak", "strong", "colored"), views)
        return Part(same, None, torch.arange(len(views)))

    return Batch(labeled=part(TARGETS), unlabeled=part([None] * len(TARGETS)))
