"""IMWA in a stock detectron2 project: a DefaultTrainer on a registered data set, and five lines.

    python examples/imwa_in_detectron2.py --output output/imwa_in_detectron2

Trains a small Faster R-CNN on all digit scenes, two members of 40 iterations in two episodes, and
prints COCO's AP of the average after each episode; two minutes on two CPU cores. A real run
differs in its configuration file alone.
"""

import argparse

from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultTrainer, default_setup
from detectron2.evaluation import COCOEvaluator

from ssod_imwa.integrations.detectron2 import IMWAHook, register_in_detectron2


class Trainer(DefaultTrainer):
    """What detectron2's own tools/train_net.py adds to the stock trainer."""

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        return COCOEvaluator(dataset_name, tasks=("bbox",), output_dir=cfg.OUTPUT_DIR)


def configuration(iterations: int, output: str) -> CfgNode:
    """A ResNet-18-FPN from random weights; SOLVER.MAX_ITER is the length of one member's run."""
    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"))
    cfg.merge_from_list(
        [
            *("DATASETS.TRAIN", ("digits_train",), "DATASETS.TEST", ("digits_test",)),
            *(
                "INPUT.MIN_SIZE_TRAIN",
                (96,),
                "INPUT.MIN_SIZE_TEST",
                96,
                "INPUT.RANDOM_FLIP",
                "none",
            ),
            *(
                "MODEL.WEIGHTS",
                "",
                "MODEL.BACKBONE.FREEZE_AT",
                0,
                "MODEL.ROI_HEADS.NUM_CLASSES",
                10,
            ),
            *("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
            *("MODEL.RESNETS.NORM", "BN", "MODEL.FPN.OUT_CHANNELS", 64, "MODEL.DEVICE", "cpu"),
            *("MODEL.RPN.POST_NMS_TOPK_TRAIN", 200, "MODEL.RPN.POST_NMS_TOPK_TEST", 100),
            *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 64, "MODEL.ROI_BOX_HEAD.FC_DIM", 256),
            *("MODEL.ANCHOR_GENERATOR.SIZES", [[16], [24], [32], [64], [128]]),
            *("SOLVER.MAX_ITER", iterations, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.STEPS", ()),
            *("SOLVER.BASE_LR", 0.01, "SOLVER.WARMUP_ITERS", 10, "DATALOADER.NUM_WORKERS", 0),
            *("SEED", 1, "OUTPUT_DIR", output),
        ]
    )
    return cfg


def main() -> None:
    """Train, evaluate after each episode, resume if there is something to resume."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="output/imwa_in_detectron2", help="folder of the run")
    parser.add_argument("--iterations", type=int, default=40, help="of one member (40)")
    arguments = parser.parse_args()

    register_in_detectron2(["digits_train", "digits_test"])
    cfg = configuration(arguments.iterations, arguments.output)
    cfg.TEST.EVAL_PERIOD = arguments.iterations  # steps of an episode: two members, half of T each
    default_setup(cfg, argparse.Namespace())
    trainer = Trainer(cfg)
    IMWAHook(cfg.SOLVER.MAX_ITER, members=2, episodes=2, seed=cfg.SEED).register(trainer)
    trainer.resume_or_load(resume=True)
    trainer.train()


if __name__ == "__main__":
    main()
