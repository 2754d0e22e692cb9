"""Every configuration key: its default, its unit and what it means.

Names are detectron2's wherever detectron2 has the key. Choices are listed in `CHOICES`, which the
reader checks, so a wrong value is reported with the allowed ones.
"""

from fvcore.common.config import CfgNode

from ssod_imwa.config.classification import CLS, CLS_CHOICES, CLS_ELEMENTS, CLS_RANGES, INFINITY

_C = CfgNode()

# What is trained: "detection" (SSOD, MODEL, INPUT) or "classification" (CLS).
_C.TASK = "detection"
# Folder that receives checkpoints, metrics, results and pictures.
_C.OUTPUT_DIR = "./output"
# Seed of initial weights, data order and augmentation; every random number is a function of it.
_C.SEED = 1
# Global steps between two lines of the terminal log and of metrics.json.
_C.LOG_PERIOD = 20

# ---------------------------------------------------------------------------------------- model
_C.MODEL = CfgNode()
# Whose detectors: "torchvision" or "detectron2" (docs/detectron2.md), which has more MODEL keys.
_C.MODEL.TOOLKIT = "torchvision"
_C.MODEL.DETECTRON2 = CfgNode()
# The detector: a configuration of detectron2's model zoo, such as
# "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", or a file; its MODEL and INPUT.FORMAT are read.
_C.MODEL.DETECTRON2.CONFIG = ""
# "auto" takes a GPU if there is one.
_C.MODEL.DEVICE = "auto"
# Initial weights: "" (random), "imagenet" (torchvision's backbone weights), or a file: a detector's
# state dict (.pth) or an ImageNet backbone converted from Caffe (MSRA R-50.pkl, R-101.pkl).
_C.MODEL.WEIGHTS = ""
# Subtracted from and divided into pixels (0..255), in the order of INPUT.FORMAT.
_C.MODEL.PIXEL_MEAN = [123.675, 116.28, 103.53]
_C.MODEL.PIXEL_STD = [58.395, 57.12, 57.375]
_C.MODEL.BACKBONE = CfgNode()
# Backbone stages that stay fixed: 0 none, 1 the stem, 2 the stem and res2, ... 5 all.
_C.MODEL.BACKBONE.FREEZE_AT = 2
_C.MODEL.RESNETS = CfgNode()
_C.MODEL.RESNETS.DEPTH = 50
# "FrozenBN" keeps the statistics of the initial weights, "BN" trains them.
_C.MODEL.RESNETS.NORM = "FrozenBN"
# Caffe's ResNets (MSRA weights) put a bottleneck's stride in its first 1x1 convolution.
_C.MODEL.RESNETS.STRIDE_IN_1X1 = False
_C.MODEL.FPN = CfgNode()
_C.MODEL.FPN.OUT_CHANNELS = 256
_C.MODEL.ANCHOR_GENERATOR = CfgNode()
# Anchor edge lengths in pixels, one list per pyramid level p2..p6.
_C.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
# Height over width, the same list for every level.
_C.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[0.5, 1.0, 2.0]]
_C.MODEL.RPN = CfgNode()
# An anchor is background below the first and an object from the second IoU on.
_C.MODEL.RPN.IOU_THRESHOLDS = [0.3, 0.7]
_C.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 256
_C.MODEL.RPN.POSITIVE_FRACTION = 0.5
_C.MODEL.RPN.PRE_NMS_TOPK_TRAIN = 2000
_C.MODEL.RPN.PRE_NMS_TOPK_TEST = 1000
_C.MODEL.RPN.POST_NMS_TOPK_TRAIN = 1000
_C.MODEL.RPN.POST_NMS_TOPK_TEST = 1000
_C.MODEL.RPN.NMS_THRESH = 0.7
_C.MODEL.ROI_HEADS = CfgNode()
# Object classes without background; 0 takes the number from the labeled data set.
_C.MODEL.ROI_HEADS.NUM_CLASSES = 0
_C.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 512
_C.MODEL.ROI_HEADS.POSITIVE_FRACTION = 0.25
_C.MODEL.ROI_HEADS.IOU_THRESHOLDS = [0.5]
_C.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.05
_C.MODEL.ROI_HEADS.NMS_THRESH_TEST = 0.5
# Classification loss of the ROI head; "FocalLoss" is Unbiased Teacher's multi-class form.
_C.MODEL.ROI_HEADS.LOSS = "CrossEntropy"
_C.MODEL.ROI_HEADS.FOCAL_GAMMA = 1.5
_C.MODEL.ROI_BOX_HEAD = CfgNode()
_C.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
_C.MODEL.ROI_BOX_HEAD.FC_DIM = 1024
# Width of the quadratic part of the box loss, in target units; 0 is plain L1.
_C.MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA = 0.0

# ---------------------------------------------------------------------------------------- input
_C.INPUT = CfgNode()
# Channel order the detector sees. Images are read as RGB; "BGR" is for Caffe weights.
_C.INPUT.FORMAT = "RGB"
# Shortest edge in pixels, drawn from this list for each training image; MAX_SIZE bounds the other.
_C.INPUT.MIN_SIZE_TRAIN = [640, 672, 704, 736, 768, 800]
_C.INPUT.MAX_SIZE_TRAIN = 1333
_C.INPUT.MIN_SIZE_TEST = 800
_C.INPUT.MAX_SIZE_TEST = 1333
_C.INPUT.RANDOM_FLIP = "horizontal"
_C.INPUT.STRONG = CfgNode()
# Probabilities of the strong view's operations (Unbiased Teacher's, in this order).
_C.INPUT.STRONG.COLOR_JITTER = 0.8
_C.INPUT.STRONG.GRAYSCALE = 0.2
_C.INPUT.STRONG.GAUSSIAN_BLUR = 0.5
_C.INPUT.STRONG.ERASING = [0.7, 0.5, 0.3]
# The public code jitters BGR arrays as if they were RGB; True does the same.
_C.INPUT.STRONG.BGR_AS_RGB = False

# ------------------------------------------------------------------------------------- data sets
_C.DATASETS = CfgNode()
# Folder of all data sets; "" takes $DETECTRON2_DATASETS, else ./datasets.
_C.DATASETS.ROOT = ""
# Python modules to import first, which may register data sets.
_C.DATASETS.IMPORT = []
# Names of the catalog (docs/datasets.md), or "coco:FILE.json:IMAGES", "voc:FOLDER:SPLIT"
# and, for unlabeled images, "folder:FOLDER"; paths are relative to ROOT.
_C.DATASETS.TRAIN = []
_C.DATASETS.TRAIN_UNLABELED = []
_C.DATASETS.TEST = []
# A broken record (no image, a box without area, ...) stops the run, or is dropped and counted.
_C.DATASETS.ON_BAD_RECORD = "error"
_C.DATASETS.SPLIT = CfgNode()
# Percentage of TRAIN that keeps its labels; the rest joins the unlabeled images.
_C.DATASETS.SPLIT.PERCENT = 100.0
# Fold of the split file, or seed of the generated split.
_C.DATASETS.SPLIT.FOLD = 1
# Split file, relative to ROOT: written by tools/prepare_splits.py, or COCO_supervision.txt of the
# public code; "" draws the split.
_C.DATASETS.SPLIT.FILE = ""

_C.DATALOADER = CfgNode()
# Processes that read and augment images; results do not depend on it.
_C.DATALOADER.NUM_WORKERS = 2
# Put only wide or only tall images in a batch, which saves padding.
_C.DATALOADER.ASPECT_RATIO_GROUPING = True
# Leave images of TRAIN without a box out of training, labeled and unlabeled.
_C.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True

# --------------------------------------------------------------------------------------- solver
_C.SOLVER = CfgNode()
# T of the paper: iterations (optimizer steps) of one member over the whole run.
_C.SOLVER.MAX_ITER = 180000
# Images per iteration over all GPUs.
_C.SOLVER.IMS_PER_BATCH = 16
_C.SOLVER.IMS_PER_BATCH_UNLABELED = 16
# The batch is processed in this many parts whose gradients add up; saves memory.
_C.SOLVER.ACCUMULATION_STEPS = 1
_C.SOLVER.OPTIMIZER = "SGD"
_C.SOLVER.BASE_LR = 0.01
# SGD's momentum, AdamW's first beta.
_C.SOLVER.MOMENTUM = 0.9
# AdamW's second beta.
_C.SOLVER.BETA2 = 0.999
_C.SOLVER.WEIGHT_DECAY = 1e-4
_C.SOLVER.WEIGHT_DECAY_NORM = 0.0
_C.SOLVER.LR_SCHEDULER_NAME = "WarmupMultiStepLR"
# Iterations (the member's own clock) after which the rate is multiplied by GAMMA.
_C.SOLVER.STEPS = []
_C.SOLVER.GAMMA = 0.1
_C.SOLVER.WARMUP_ITERS = 1000
_C.SOLVER.WARMUP_FACTOR = 0.001
_C.SOLVER.CLIP_GRADIENTS = CfgNode()
_C.SOLVER.CLIP_GRADIENTS.ENABLED = False
_C.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "norm"
_C.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 1.0
_C.SOLVER.AMP = CfgNode()
_C.SOLVER.AMP.ENABLED = False
_C.SOLVER.AMP.DTYPE = "float16"
# Global steps between checkpoints besides those at ends of episodes; 0 writes only those.
_C.SOLVER.CHECKPOINT_PERIOD = 0
# Episodes between two checkpoints at an episode's end; more than 1 where episodes are very short.
_C.SOLVER.CHECKPOINT_EPISODES = 1
# Older resume files kept beside the newest.
_C.SOLVER.CHECKPOINT_KEEP = 1

# ----------------------------------------------------------------------------------- evaluation
_C.TEST = CfgNode()
# Episodes between two evaluations of the averaged models; the last is always evaluated, 0: only it.
_C.TEST.EVAL_EPISODES = 1
# Evaluate each member, too, before it is averaged.
_C.TEST.EVAL_MEMBERS = False
_C.TEST.DETECTIONS_PER_IMAGE = 100
_C.TEST.IMS_PER_BATCH = 8

# -------------------------------------------------------------------- semi-supervised detection
_C.SSOD = CfgNode()
_C.SSOD.ALGORITHM = "supervised"
# Train on a strong view of the labeled images beside the weak one.
_C.SSOD.STRONG_LABELED = True
# Iterations (own clock) on labeled images alone before the teacher starts.
_C.SSOD.BURN_IN_ITERS = 2000
_C.SSOD.EMA_DECAY = 0.9996
# A teacher's box becomes a label above this score.
_C.SSOD.BBOX_THRESHOLD = 0.7
_C.SSOD.UNSUP_LOSS_WEIGHT = 4.0
# Weight of the two box-regression losses on pseudo-labels (0 in Unbiased Teacher).
_C.SSOD.UNSUP_BOX_LOSS_WEIGHT = 0.0

# -------------------------------------------------------------- class-imbalanced classification
_C.CLS = CLS.clone()

# ----------------------------------------------------------------------------------------- IMWA
_C.IMWA = CfgNode()
# M: models trained in each episode; 1 is plain training. The paper uses 2.
_C.IMWA.MEMBERS = 1
# E: episodes; 1 with several members is vanilla model weight averaging. The paper uses 20.
_C.IMWA.EPISODES = 1
# Number of the first member: MEMBERS 1, FIRST_MEMBER 3 trains member 3 of a larger run by itself.
_C.IMWA.FIRST_MEMBER = 0
# "dict" keeps every finished member, "stream" one running mean of them.
_C.IMWA.STORE = "dict"
# Where finished members wait: "same" as the model, or "cpu" (pinned host memory).
_C.IMWA.STORE_DEVICE = "same"
# What happens to momentum and moments: "keep" per member, "average", "reset", "carry" to the next.
_C.IMWA.OPTIMIZER_STATE = "keep"
# BatchNorm statistics: "mean" of the members, "recompute" on BN_BATCHES batches, "keep" the last.
_C.IMWA.BN = "mean"
_C.IMWA.BN_BATCHES = 200
# A member with NaN or Inf: "raise", or "drop" it and average the others.
_C.IMWA.NONFINITE = "raise"
_C.IMWA.ACCUMULATE = "float64"
# Weight of each member in the average, summing to 1; [] is 1/M each.
_C.IMWA.COEFFICIENTS = []

# Allowed values of the keys that are a choice.
CHOICES: dict[str, tuple[object, ...]] = {
    **CLS_CHOICES,
    "TASK": ("detection", "classification"),
    "MODEL.TOOLKIT": ("torchvision", "detectron2"),
    "MODEL.RESNETS.DEPTH": (18, 50, 101),
    "MODEL.RESNETS.NORM": ("FrozenBN", "BN"),
    "MODEL.BACKBONE.FREEZE_AT": (0, 1, 2, 3, 4, 5),
    "MODEL.ROI_HEADS.LOSS": ("CrossEntropy", "FocalLoss"),
    "INPUT.FORMAT": ("RGB", "BGR"),
    "INPUT.RANDOM_FLIP": ("horizontal", "none"),
    "DATASETS.ON_BAD_RECORD": ("error", "skip"),
    "SOLVER.OPTIMIZER": ("SGD", "AdamW"),
    "SOLVER.LR_SCHEDULER_NAME": ("WarmupMultiStepLR", "WarmupCosineLR"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("norm", "value"),
    "SOLVER.AMP.DTYPE": ("float16", "bfloat16"),
    "SSOD.ALGORITHM": ("supervised", "unbiased_teacher"),
    "IMWA.STORE": ("dict", "stream"),
    "IMWA.STORE_DEVICE": ("same", "cpu"),
    "IMWA.OPTIMIZER_STATE": ("keep", "average", "reset", "carry"),
    "IMWA.BN": ("mean", "recompute", "keep"),
    "IMWA.NONFINITE": ("raise", "drop"),
    "IMWA.ACCUMULATE": ("float64", "float32"),
}

# Smallest and largest allowed value; for lists, of each element.
RANGES: dict[str, tuple[float, float]] = {
    **CLS_RANGES,
    "SEED": (0, 2**63 - 1),
    "LOG_PERIOD": (1, INFINITY),
    "MODEL.FPN.OUT_CHANNELS": (1, INFINITY),
    "MODEL.ROI_BOX_HEAD.FC_DIM": (1, INFINITY),
    "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": (0, INFINITY),
    "MODEL.ROI_HEADS.NUM_CLASSES": (0, INFINITY),
    "MODEL.ROI_HEADS.FOCAL_GAMMA": (0, INFINITY),
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": (0, 1),
    "MODEL.RPN.IOU_THRESHOLDS": (0, 1),
    "INPUT.MIN_SIZE_TRAIN": (1, INFINITY),
    "INPUT.MAX_SIZE_TRAIN": (1, INFINITY),
    "INPUT.MIN_SIZE_TEST": (1, INFINITY),
    "INPUT.MAX_SIZE_TEST": (1, INFINITY),
    "INPUT.STRONG.COLOR_JITTER": (0, 1),
    "INPUT.STRONG.GRAYSCALE": (0, 1),
    "INPUT.STRONG.GAUSSIAN_BLUR": (0, 1),
    "INPUT.STRONG.ERASING": (0, 1),
    "DATASETS.SPLIT.PERCENT": (0, 100),
    "DATASETS.SPLIT.FOLD": (0, INFINITY),
    "DATALOADER.NUM_WORKERS": (0, INFINITY),
    "SOLVER.MAX_ITER": (1, INFINITY),
    "SOLVER.IMS_PER_BATCH": (1, INFINITY),
    "SOLVER.IMS_PER_BATCH_UNLABELED": (0, INFINITY),
    "SOLVER.ACCUMULATION_STEPS": (1, INFINITY),
    "SOLVER.BASE_LR": (0, INFINITY),
    "SOLVER.BETA2": (0, 1),
    "SOLVER.WARMUP_ITERS": (0, INFINITY),
    "SOLVER.WARMUP_FACTOR": (0, 1),
    "SOLVER.STEPS": (0, INFINITY),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": (0, INFINITY),
    "SOLVER.CHECKPOINT_PERIOD": (0, INFINITY),
    "SOLVER.CHECKPOINT_EPISODES": (1, INFINITY),
    "SOLVER.CHECKPOINT_KEEP": (1, INFINITY),
    "TEST.EVAL_EPISODES": (0, INFINITY),
    "TEST.DETECTIONS_PER_IMAGE": (1, INFINITY),
    "TEST.IMS_PER_BATCH": (1, INFINITY),
    "SSOD.BURN_IN_ITERS": (0, INFINITY),
    "SSOD.EMA_DECAY": (0, 1),
    "SSOD.BBOX_THRESHOLD": (0, 1),
    "SSOD.UNSUP_LOSS_WEIGHT": (0, INFINITY),
    "SSOD.UNSUP_BOX_LOSS_WEIGHT": (0, INFINITY),
    "IMWA.MEMBERS": (1, INFINITY),
    "IMWA.EPISODES": (1, INFINITY),
    "IMWA.FIRST_MEMBER": (0, INFINITY),
    "IMWA.BN_BATCHES": (1, INFINITY),
    "IMWA.COEFFICIENTS": (0, 1),
}

# Type of the elements of lists that are empty by default.
ELEMENTS: dict[str, type] = {
    **CLS_ELEMENTS,
    "DATASETS.IMPORT": str,
    "DATASETS.TRAIN": str,
    "DATASETS.TRAIN_UNLABELED": str,
    "DATASETS.TEST": str,
    "SOLVER.STEPS": int,
    "IMWA.COEFFICIENTS": float,
}


def get_cfg() -> CfgNode:
    """A copy of the default configuration."""
    return _C.clone()
