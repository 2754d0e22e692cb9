"""The keys of class-imbalanced classification, CLS: see `classification.keys`."""

from fvcore.common.config import CfgNode

INFINITY = float("inf")

CLS = CfgNode()
# Method: "erm" is one loss on one view (LOSS, MIX, STAGE say which), "mae" LiVT's pre-training;
# docs/classification.md.
CLS.ALGORITHM = "erm"
# Decay of an EMA copy, which is then evaluated and shipped; 0 keeps none.
CLS.EMA_DECAY = 0.0
CLS.MODEL = CfgNode()
# Network, see classification/models/build.py; MODEL.WEIGHTS are its initial weights: "" (random),
# "imagenet" (torchvision's), a run's folder, or a file of a run.
CLS.MODEL.NAME = "cifar_resnet32"
CLS.MODEL.CLASSIFIER = "linear"
# Factor of a cosine classifier's logits; LDAM's loss has its own, so 1 with it.
CLS.MODEL.SCALE = 30.0
# K networks whose logits are averaged; the first SHARED_GROUPS stages are one for all of them.
CLS.MODEL.EXPERTS = 1
CLS.MODEL.SHARED_GROUPS = 0
# Probability with which a ViT's last block is left out (stochastic depth).
CLS.MODEL.DROP_PATH = 0.0
# torch.compile's mode for training steps: "" (not compiled), "default", "reduce-overhead" (with
# CUDA graphs), "max-autotune". Needs a C++ compiler and half a minute; rounds differently.
CLS.MODEL.COMPILE = ""
CLS.INPUT = CfgNode()
# Edge of the images that the network sees, in pixels.
CLS.INPUT.SIZE = 32
# Augmentation of each view: "none", "plain", "strong", "sim" for images in memory; "standard",
# "randcls", "randclsstack", "sim", "mae", "livt" for files. A method has 1 to 3 views.
CLS.INPUT.VIEWS = ["plain"]
# Mirror images at random.
CLS.INPUT.FLIP = True
# Color jitter of the "standard" view.
CLS.INPUT.JITTER = True
# Read the files of "folder:" and "list:" sets into memory; they must be of INPUT.SIZE.
CLS.INPUT.IN_MEMORY = False
CLS.IMBALANCE = CfgNode()
# Images of class 0 over those of the last class that TRAIN is thinned to; 0 takes TRAIN as it is.
CLS.IMBALANCE.RATIO = 0.0
CLS.IMBALANCE.PROFILE = "exponential"
# Images of class 0; 0 takes as many as TRAIN allows.
CLS.IMBALANCE.MAXIMUM = 0
# Which images are kept: "cao" (shuffled by SEED) or "first".
CLS.IMBALANCE.SPLIT = "cao"
CLS.IMBALANCE.SEED = 0
CLS.SAMPLER = CfgNode()
# How often classes are drawn: "instance" (as often as they occur), "class" (equally),
# "square_root", "progressive" (from instance to class), "reversed", or "balanced_subset", where
# member m trains on PER_CLASS images of each class that are its own (BTM).
CLS.SAMPLER.NAME = "instance"
# Images in a row of one class, for "class"; cRT has 4.
CLS.SAMPLER.PER_DRAW = 1
CLS.SAMPLER.PER_CLASS = 10
CLS.SCHEDULE = CfgNode()
# Passes over the images that are sampled from; 0 counts by SOLVER.MAX_ITER, STEPS, WARMUP_ITERS,
# which these three replace.
CLS.SCHEDULE.EPOCHS = 0.0
CLS.SCHEDULE.STEPS = []
CLS.SCHEDULE.WARMUP = 0.0
CLS.LOSS = CfgNode()
CLS.LOSS.NAME = "cross_entropy"
# Class weights of cross_entropy and ldam: "none" or "effective_number" of parameter BETA.
CLS.LOSS.WEIGHTS = "none"
CLS.LOSS.BETA = 0.9999
# Part of the training after which the weights count: 0.8 is DRW's.
CLS.LOSS.WEIGHTS_FROM = 0.0
# Exponent of focal.
CLS.LOSS.GAMMA = 1.0
# Factor of the log prior in balanced_softmax.
CLS.LOSS.TAU = 1.0
# Margin of the rarest class and scale of ldam.
CLS.LOSS.MARGIN = 0.5
CLS.LOSS.SCALE = 30.0
# Smoothing of the most and the least frequent class in label_aware_smoothing; of all classes
# (the first number) in cross_entropy, balanced_softmax and balanced_bce.
CLS.LOSS.SMOOTHING = [0.0, 0.0]
CLS.MIX = CfgNode()
# "none", "mixup", "mixup_or_cutmix", "remix", "manifold" (mixup of features), "mfw".
CLS.MIX.KIND = "none"
# Layers after which features are mixed, such as "layer3"; "input" mixes the images.
CLS.MIX.LAYERS = ["input"]
# Parameter of the Beta distribution of shares.
CLS.MIX.ALPHA = 1.0
# MFW's beta (2 for long tails, 0.01 for steps) and the deviation in it.
CLS.MIX.BETA = 2.0
CLS.MIX.DEVIATION = "geometric"
CLS.STAGE = CfgNode()
# What is trained: "all", "backbone", "classifier", "last_block" (and the classifier; on Places-LT),
# "last_block_only", "scale" (the factors of LEARNABLE_SCALE).
CLS.STAGE.PART = "all"
# Start the classifier anew (cRT).
CLS.STAGE.RESET_CLASSIFIER = False
# Start the last block anew (Places-LT).
CLS.STAGE.RESET_LAST_BLOCK = False
# Let batch norms of what is frozen follow the data (MiSLAS's shifted BN).
CLS.STAGE.MOVE_STATISTICS = False
# Multiply each class's logit by a factor that is learned (MiSLAS; with PART "scale" LWS).
CLS.STAGE.LEARNABLE_SCALE = False
# Divide each class's weights in MODEL.WEIGHTS by their norm to this power, and drop its bias
# (tau-norm); 0 leaves them as they are.
CLS.STAGE.TAU_NORM = 0.0
# Factor of SOLVER.BASE_LR for the classifier's weights.
CLS.STAGE.CLASSIFIER_LR = 1.0
# Factor of the rate from one layer of a ViT to the one below.
CLS.STAGE.LAYER_DECAY = 1.0
CLS.BCL = CfgNode()
# Balanced contrastive learning: temperature, weights of its two losses, inner width of its heads,
# width of projections.
CLS.BCL.TEMPERATURE = 0.1
CLS.BCL.CE_WEIGHT = 2.0
CLS.BCL.CONTRASTIVE_WEIGHT = 0.6
CLS.BCL.HIDDEN = 512
CLS.BCL.WIDTH = 128
CLS.PACO = CfgNode()
# PaCo and GPaCo: weight of a sample beside a class's 1, temperature, rows of the queue, momentum of
# the slow network (PaCo alone), inner width of the head (0 takes that of the features), width of
# projections.
CLS.PACO.ALPHA = 0.01
CLS.PACO.TEMPERATURE = 0.05
CLS.PACO.QUEUE = 1024
CLS.PACO.MOMENTUM = 0.999
CLS.PACO.HIDDEN = 0
CLS.PACO.WIDTH = 32
CLS.MOCO = CfgNode()
# The contrastive loss of NCL's and ECL's experts, on the second view.
CLS.MOCO.TEMPERATURE = 0.2
CLS.MOCO.QUEUE = 1024
CLS.MOCO.MOMENTUM = 0.999
CLS.MOCO.WIDTH = 64
# Never move the key heads, as NCL's public code does.
CLS.MOCO.LEGACY_KEY_HEAD = False
CLS.NCL = CfgNode()
# Classes that an image is compared on; 0 takes 0.3 of them.
CLS.NCL.HARD_CATEGORIES = 0
CLS.NCL.DISTILLATION_WEIGHT = 0.6
# 0 trains without MoCo and its second view.
CLS.NCL.CONTRASTIVE_WEIGHT = 1.0
CLS.ECL = CfgNode()
# Weight of distillation; at 0 each expert learns by itself.
CLS.ECL.ALPHA = 0.6
# Weight of the contrastive loss; 0 trains without MoCo and its second view.
CLS.ECL.BETA = 1.0
# What is distilled, of "logits" and "features".
CLS.ECL.DISTIL = ["logits", "features"]
CLS.ECL.TEMPERATURE = 1.0
# Weight of a sample in the distillation of logits: "cls_over_ref", "ref_over_cls", or "none" for 1.
CLS.ECL.TRANSFER = "cls_over_ref"
# Its largest value; 0 for no limit.
CLS.ECL.TRANSFER_CLIP = 0.0
# Distil logits with the log prior added, as NCL does.
CLS.ECL.COMPENSATED = False
CLS.MAE = CfgNode()
# The part of the patches that is masked, and the decoder.
CLS.MAE.MASK_RATIO = 0.75
CLS.MAE.DECODER_WIDTH = 512
CLS.MAE.DECODER_DEPTH = 8
CLS.MAE.DECODER_HEADS = 16
# Own iterations between two records of what each class has learned (classes.json), and between two
# snapshots of each member's weights; 0 makes none. tools/analyze.py draws both.
CLS.TRACK_PERIOD = 0
CLS.SNAPSHOT_PERIOD = 0
# How members become one at an episode's end: "mean"; "adaptive_h" and "adaptive_g" in proportion to
# their H- or G-mean on the balanced training images; "greedy_h", "greedy_g" (BTM, Table 6).
CLS.MERGE = "mean"
# Rule for many, medium and few: "standard" or "mislas".
CLS.GROUP_RULE = "standard"

CLS_CHOICES: dict[str, tuple[object, ...]] = {
    "CLS.ALGORITHM": ("erm", "bcl", "paco", "gpaco", "ncl", "ecl", "mae"),
    "CLS.ECL.TRANSFER": ("cls_over_ref", "ref_over_cls", "none"),
    "CLS.MODEL.CLASSIFIER": ("linear", "cosine"),
    "CLS.MODEL.COMPILE": ("", "default", "reduce-overhead", "max-autotune"),
    "CLS.IMBALANCE.PROFILE": ("exponential", "step"),
    "CLS.IMBALANCE.SPLIT": ("cao", "first"),
    "CLS.SAMPLER.NAME": (
        *("instance", "class", "square_root", "progressive", "reversed", "balanced_subset"),
    ),
    "CLS.LOSS.NAME": (
        *("cross_entropy", "focal", "ldam", "balanced_softmax", "label_aware_smoothing"),
        *("balanced_bce", "gml"),
    ),
    "CLS.LOSS.WEIGHTS": ("none", "effective_number"),
    "CLS.MIX.KIND": ("none", "mixup", "mixup_or_cutmix", "remix", "manifold", "mfw"),
    "CLS.MIX.DEVIATION": ("geometric", "arithmetic"),
    "CLS.STAGE.PART": (
        *("all", "backbone", "classifier", "last_block", "last_block_only", "scale"),
    ),
    "CLS.MERGE": ("mean", "adaptive_h", "adaptive_g", "greedy_h", "greedy_g"),
    "CLS.GROUP_RULE": ("standard", "mislas"),
}

CLS_RANGES: dict[str, tuple[float, float]] = {
    "CLS.EMA_DECAY": (0, 1),
    "CLS.MODEL.EXPERTS": (1, INFINITY),
    "CLS.MODEL.SHARED_GROUPS": (0, INFINITY),
    "CLS.MODEL.DROP_PATH": (0, 1),
    "CLS.INPUT.SIZE": (1, INFINITY),
    "CLS.IMBALANCE.RATIO": (0, INFINITY),
    "CLS.IMBALANCE.MAXIMUM": (0, INFINITY),
    "CLS.IMBALANCE.SEED": (0, 2**32 - 1),
    "CLS.SAMPLER.PER_DRAW": (1, INFINITY),
    "CLS.SAMPLER.PER_CLASS": (1, INFINITY),
    "CLS.SCHEDULE.EPOCHS": (0, INFINITY),
    "CLS.SCHEDULE.STEPS": (0, INFINITY),
    "CLS.SCHEDULE.WARMUP": (0, INFINITY),
    "CLS.LOSS.WEIGHTS_FROM": (0, 1),
    "CLS.LOSS.SMOOTHING": (0, 1),
    "CLS.STAGE.CLASSIFIER_LR": (0, INFINITY),
    "CLS.STAGE.TAU_NORM": (0, INFINITY),
    **{f"CLS.{name}.TEMPERATURE": (0, INFINITY) for name in ("BCL", "PACO", "MOCO", "ECL")},
    **{f"CLS.{name}.WIDTH": (1, INFINITY) for name in ("BCL", "PACO", "MOCO")},
    **{f"CLS.{name}.MOMENTUM": (0, 1) for name in ("PACO", "MOCO")},
    **{f"CLS.{name}.QUEUE": (1, INFINITY) for name in ("PACO", "MOCO")},
    "CLS.BCL.HIDDEN": (1, INFINITY),
    "CLS.BCL.CE_WEIGHT": (0, INFINITY),
    "CLS.BCL.CONTRASTIVE_WEIGHT": (0, INFINITY),
    "CLS.PACO.ALPHA": (0, INFINITY),
    "CLS.PACO.HIDDEN": (0, INFINITY),
    "CLS.NCL.HARD_CATEGORIES": (0, INFINITY),
    "CLS.NCL.DISTILLATION_WEIGHT": (0, INFINITY),
    "CLS.NCL.CONTRASTIVE_WEIGHT": (0, INFINITY),
    "CLS.ECL.ALPHA": (0, INFINITY),
    "CLS.ECL.BETA": (0, INFINITY),
    "CLS.ECL.TRANSFER_CLIP": (0, INFINITY),
    "CLS.MAE.MASK_RATIO": (0, 1),
    "CLS.TRACK_PERIOD": (0, INFINITY),
    "CLS.SNAPSHOT_PERIOD": (0, INFINITY),
    "CLS.STAGE.LAYER_DECAY": (0, 1),
}

CLS_ELEMENTS: dict[str, type] = {
    "CLS.SCHEDULE.STEPS": float,
}
