"""A tiny detectron2 project: a model, a data set and a DefaultTrainer that know nothing of us."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, LazyCall, get_cfg
from detectron2.data.samplers import TrainingSampler
from detectron2.engine import DefaultTrainer, HookBase, SimpleTrainer
from detectron2.engine.hooks import LRScheduler, PeriodicCheckpointer
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from fvcore.common.param_scheduler import MultiStepParamScheduler, ParamScheduler
from omegaconf import OmegaConf
from torch import nn

from ssod_imwa.detection.detectors.plain_attributes import PlainAttributes
from ssod_imwa.integrations.detectron2 import IMWAHook
from ssod_imwa.integrations.detectron2.hook import member_seed

__all__ = [
    "DetectionCheckpointer",
    "IMWAHook",
    "LRScheduler",
    "PeriodicCheckpointer",
    "PlainAttributes",
    "member_seed",
    "seed_all_rng",
]

ITERATIONS = 12
IMAGES = 10


@META_ARCH_REGISTRY.register()
class TinyRegression(nn.Module):
    """Learns y = sum(x) with dropout: its losses depend on data order and on the generators."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1)
        )

    def forward(self, batch: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        x = torch.stack(batch)
        return {"loss": (self.layers(x)[:, 0] - x.sum(1)).square().mean()}


class Noisy(torch.utils.data.Dataset):
    """Ten points, each moved by NumPy's generator as detectron2's augmentations are."""

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> torch.Tensor:
        point = torch.arange(4.0) * 0.1 + index
        return point + torch.from_numpy(np.random.normal(0, 0.1, 4)).float()


def make_loader(num_workers: int = 0) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(
        Noisy(),
        batch_size=2,
        sampler=TrainingSampler(IMAGES),
        num_workers=num_workers,
        collate_fn=list,
    )


class ProjectTrainer(DefaultTrainer):
    """A stock trainer; it records the clock that its steps see."""

    def run_step(self) -> None:
        self.clock = [*getattr(self, "clock", []), (self.iter, self.max_iter)]
        super().run_step()

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        return make_loader(cfg.DATALOADER.NUM_WORKERS)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str):
        return None

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators=None):
        torch.rand(3)  # an evaluation draws from the generators, too
        return {"toy": {"weight": float(next(model.parameters()).sum())}}


def make_trainer(
    folder: Path,
    *,
    iterations: int = ITERATIONS,
    kind: type[ProjectTrainer] = ProjectTrainer,
    **settings: Any,
) -> ProjectTrainer:
    """The project's trainer, seeded as by detectron2's default_setup; KEY__PART=value overrides."""
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "TinyRegression"
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.DATASETS.TEST = ()
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.MAX_ITER = iterations
    cfg.SOLVER.BASE_LR = 0.01
    cfg.SOLVER.STEPS = (8,)
    cfg.SOLVER.WARMUP_ITERS = 3
    cfg.SOLVER.CHECKPOINT_PERIOD = 5
    cfg.OUTPUT_DIR = str(folder)
    for key, value in settings.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    seed_all_rng(7)
    return kind(cfg)


def param_scheduler(iterations: int) -> ParamScheduler:
    """Warm-up over a quarter of a run and a decay in its last third, as functions of progress."""
    steps = MultiStepParamScheduler(
        values=[1.0, 0.1], milestones=[iterations * 2 // 3], num_updates=iterations
    )
    return WarmupParamScheduler(steps, warmup_factor=0.01, warmup_length=0.25)


def lazy_config(folder: Path) -> Any:
    """The same project as a LazyConfig, for tools/lazyconfig_train_net.py."""
    return OmegaConf.create(
        {
            "model": LazyCall(TinyRegression)(cfg=None),
            "dataloader": {"train": LazyCall(make_loader)()},
            "optimizer": LazyCall(torch.optim.SGD)(
                params=LazyCall(get_default_optimizer_params)(weight_decay_norm=0.0),
                lr=0.01,
                momentum=0.9,
                weight_decay=1e-4,
            ),
            "lr_multiplier": LazyCall(param_scheduler)(iterations=ITERATIONS),
            "train": {
                "output_dir": str(folder),
                "init_checkpoint": "",
                "max_iter": ITERATIONS,
                "amp": {"enabled": False},
                "ddp": {},
                "checkpointer": {"period": 1, "max_to_keep": 100},
                "eval_period": 0,
                "log_period": 20,
                "device": "cpu",
            },
        },
        flags={"allow_objects": True},
    )


class StoppedError(Exception):
    """Stands for a machine that goes down."""


class StopAfter(HookBase):
    """Raises once `steps` steps are done, after every other hook."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def after_step(self) -> None:
        if self.trainer.iter + 1 == self._steps:
            raise StoppedError


class TeacherStudentTrainer(SimpleTrainer):
    """A student of one weight vector, and its EMA in an attribute of its own."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        model = nn.Linear(3, 1, bias=False)
        super().__init__(model, [None], torch.optim.SGD(model.parameters(), lr=0.1))
        self.ema = copy.deepcopy(model)
        self.initial = self.get_weights()

    def run_step(self) -> None:
        """One step on a point that depends on the clock, and one of the EMA."""
        point = torch.tensor([1.0, 0.5 * self.iter, -1.0])
        self.optimizer.zero_grad()
        (self.model(point) - self.iter).square().sum().mul(0.1).backward()
        self.optimizer.step()
        with torch.no_grad():
            self.ema.weight.lerp_(self.model.weight, 0.5)

    def get_weights(self) -> list[torch.Tensor]:
        return [module.weight.detach().clone() for module in (self.model, self.ema)]

    @torch.no_grad()
    def set_weights(self, values: list[torch.Tensor]) -> None:
        for module, value in zip((self.model, self.ema), values, strict=True):
            module.weight.copy_(value)


class EMAState:
    """Average of a model's tensors that is no module, with the interface of d2go's and detrex's."""

    def __init__(self) -> None:
        self.state: dict[str, torch.Tensor] = {}

    def save_from(self, model: nn.Module) -> None:
        for name, tensor in model.state_dict().items():
            self.state[name] = tensor.clone()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.state.clear()
        self.state.update(state)


class EMAUpdater:
    def __init__(self, state: EMAState) -> None:
        self.state = state

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for name, tensor in model.state_dict().items():
            move(self.state.state[name], tensor)


class EMAHook(HookBase):
    """Moves the state after every step; as in d2go it is an attribute of the model, too."""

    def __init__(self, model: nn.Module) -> None:
        model.ema_state = EMAState()
        self.model = model
        self.ema_updater = EMAUpdater(model.ema_state)

    def before_train(self) -> None:
        if not self.model.ema_state.state:
            self.model.ema_state.save_from(self.model)

    def after_step(self) -> None:
        self.ema_updater.update(self.model)


class ModuleEMAHook(HookBase):
    """The same average as a module, in an attribute of the trainer."""

    def before_train(self) -> None:
        self.trainer.model_teacher.load_state_dict(self.trainer.model.state_dict())

    def after_step(self) -> None:
        average = self.trainer.model_teacher.state_dict()
        for name, tensor in self.trainer.model.state_dict().items():
            move(average[name], tensor)


@torch.no_grad()
def move(average: torch.Tensor, tensor: torch.Tensor) -> None:
    if average.is_floating_point():
        average.lerp_(tensor, 0.25)
    else:
        average.copy_(tensor)


class Pair(nn.Module):
    """Teacher and student in one, as Unbiased Teacher's trainers save them."""

    def __init__(self, teacher: nn.Module, student: nn.Module) -> None:
        super().__init__()
        self.modelTeacher, self.modelStudent = teacher, student


class UnbiasedTeacherTrainer(ProjectTrainer):
    """As that of Unbiased Teacher: a loop and a checkpointer of its own, without the trainer."""

    def build_hooks(self) -> list[HookBase | None]:
        self.model_teacher = copy.deepcopy(self.model)
        self.checkpointer = DetectionCheckpointer(
            Pair(self.model_teacher, self.model),
            self.cfg.OUTPUT_DIR,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
        )
        return super().build_hooks()

    def resume_or_load(self, resume: bool = True) -> None:
        checkpoint = self.checkpointer.resume_or_load("", resume=resume)
        self.start_iter = checkpoint.get("iteration", -1) + 1

    def run_step(self) -> None:
        raise AssertionError("the loop of this trainer calls another method")

    def run_step_full_semisup(self) -> None:
        super().run_step()
        for average, tensor in zip(
            self.model_teacher.state_dict().values(), self.model.state_dict().values(), strict=True
        ):
            move(average, tensor)

    def train(self) -> None:
        self.iter = self.start_iter
        with EventStorage(self.start_iter) as self.storage:
            try:
                self.before_train()
                for step in range(self.start_iter, self.max_iter):
                    self.iter = step
                    self.before_step()
                    self.run_step_full_semisup()
                    self.after_step()
            finally:
                self.after_train()


class Dense(nn.Module):
    """Stands for detectron2's dense detectors, which add an attribute at their first loss."""
