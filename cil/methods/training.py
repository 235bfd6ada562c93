"""A fresh Lightning Trainer for every piece of learning: a reused one trains nothing again."""

import logging
import warnings
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.plugins.environments import ClusterEnvironment
from pytorch_lightning.strategies import DDPStrategy, Strategy
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from cil import parallel
from cil.config import TrainerConfig
from cil.errors import DivergenceError, UserError
from cil.methods.method import StepLog

LOG_EVERY = 10  # optimiser steps between two logged values
# Parameters. A trunk of 7.5 million took 75 ms a step of 1,024 maps of 130 tokens on an H200; in a
# trial outside Lightning, compiled for half a minute, 28 ms.
LEAST_TO_COMPILE = 5_000_000


class LoggedModule(LightningModule):
    """Logs at the steps that are recorded, and not in between: a call costs some milliseconds."""

    steps: int  # in all

    def record(self, values: dict[str, Tensor], show: str) -> None:
        """Log `values`, means over all devices; `show` also stands beside the progress bar."""
        done = self.global_step + 1
        if done % LOG_EVERY == 0 or done == self.steps:
            for name, value in values.items():
                self.log(name, value, prog_bar=name == show, sync_dist=parallel.world() > 1)


class StepLogger(Logger):
    """Hands what a LightningModule logs to the protocol's step log."""

    def __init__(self, log: StepLog, first_step: int = 0) -> None:
        super().__init__()
        self._log, self._first_step = log, first_step

    @property
    def name(self) -> str:
        return "cil"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """The run's record holds the configuration already."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        values = {k: v for k, v in metrics.items() if k != "epoch"}
        if values:
            self._log(self._first_step + (step or 0), values)


class ProgressBar(TQDMProgressBar):
    """One bar over all steps, named for what is learned or evaluated."""

    def __init__(self, title: str) -> None:
        super().__init__(refresh_rate=10)
        self._title = title

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        super().on_train_epoch_start(trainer)
        # Passes over the data mean little here: the bar counts all steps of the experience.
        self.train_progress_bar.reset(trainer.max_steps)
        self.train_progress_bar.initial = self.train_progress_bar.n = trainer.global_step
        self.train_progress_bar.set_description(self._title)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if trainer.global_step % self.refresh_rate == 0 or trainer.global_step == trainer.max_steps:
            self.train_progress_bar.n = trainer.global_step
            self.train_progress_bar.set_postfix(self.get_metrics(trainer, module))

    def on_predict_batch_start(self, trainer: Trainer, *args: Any, **options: Any) -> None:
        super().on_predict_batch_start(trainer, *args, **options)
        self.predict_progress_bar.set_description(self._title)

    def init_predict_tqdm(self) -> Any:
        bar = super().init_predict_tqdm()
        bar.leave = False
        return bar

    def get_metrics(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, module)
        metrics.pop("v_num", None)
        return metrics


def find_device(settings: TrainerConfig) -> torch.device:
    """The device that `trainer.accelerator` asks for; UserError when there is none."""
    if settings.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError(
            "trainer.accelerator is gpu, but torch finds no CUDA device: use auto or cpu."
        )
    wanted = settings.accelerator != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if wanted else "cpu")


def autocast(settings: TrainerConfig) -> torch.autocast:
    """The context in which a VAR computes as `trainer.precision` asks for."""
    kind = find_device(settings).type
    wanted = settings.precision
    if wanted == "auto":
        wanted = "bf16-mixed" if kind == "cuda" else "32-true"
    return torch.autocast(kind, torch.bfloat16, enabled=wanted == "bf16-mixed")


def pays_to_compile(module: nn.Module, settings: TrainerConfig) -> bool:
    """What `trainer.compile` says of this module."""
    if settings.compile != "auto":
        return settings.compile == "always"
    size = sum(p.numel() for p in module.parameters())
    return find_device(settings).type == "cuda" and size >= LEAST_TO_COMPILE


def fit(
    module: LightningModule,
    batches: Iterable[Any],
    *,
    steps: int,
    title: str,
    settings: TrainerConfig,
    log: StepLog,
    batch_key: str,
    first_step: int = 0,
    clip: float | None = None,
) -> None:
    """Train `module` for `steps` optimiser steps; they are logged from `first_step` on.

    `batch_key` is the setting to lower when a step does not fit in memory.

    Raises:
        DivergenceError: its loss is no number any more.
        UserError: the GPU's memory is too small.
    """
    logger = StepLogger(log, first_step)
    trainer = new_trainer(
        settings, title=title, logger=logger, max_steps=steps, gradient_clip_val=clip
    )
    with fitting(title, f"lower {batch_key}"):
        trainer.fit(module, batches)
    if not all(value.isfinite() for value in trainer.callback_metrics.values()):
        raise DivergenceError(
            f"{title} diverged, its loss is no number any more: lower the learning rate."
        )
    if steps % LOG_EVERY:  # the last step is always logged: it tells how many there were
        logger.log_metrics({k: v.item() for k, v in trainer.callback_metrics.items()}, steps - 1)


@contextmanager
def fitting(title: str, way_out: str) -> Iterator[None]:
    """Turn a GPU's lack of memory within the block into a UserError that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(f"{title} does not fit in the GPU's memory: {way_out}.") from None


def new_trainer(settings: TrainerConfig, *, title: str, **options: Any) -> Trainer:
    """A quiet Trainer that keeps no checkpoints: the records do."""
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    # Of 1x1 convolutions with several devices: their gradients lie in memory in more ways than one.
    warnings.filterwarnings("ignore", message="Grad strides do not match")
    show = settings.progress and parallel.is_first()
    return Trainer(
        accelerator="gpu" if find_device(settings).type == "cuda" else "cpu",
        **_devices(settings),
        use_distributed_sampler=False,  # batches are shared already (cil.parallel)
        max_epochs=-1,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=show,
        callbacks=[ProgressBar(title)] if show else [],
        log_every_n_steps=LOG_EVERY,
        **options,
    )


class _Joined(ClusterEnvironment):
    """Tells Lightning of the processes that `cil.parallel` has brought together already."""

    creates_processes_externally = True
    main_address = ""  # they have met
    main_port = 0

    @staticmethod
    def detect() -> bool:
        return parallel.world() > 1

    def world_size(self) -> int:
        return parallel.world()

    def global_rank(self) -> int:
        return parallel.rank()

    def local_rank(self) -> int:
        return parallel.local_rank()

    def node_rank(self) -> int:
        return 0  # nothing asks for it but messages

    def set_world_size(self, size: int) -> None:
        """It is what it is."""

    def set_global_rank(self, rank: int) -> None:
        """It is what it is."""


def _devices(settings: TrainerConfig) -> dict[str, Any]:
    """A Trainer's arguments for the devices it runs on."""
    if parallel.world() == 1:
        return {"devices": 1}
    # Every device keeps the same buffers by itself, and every trained parameter gets a gradient.
    strategy: Strategy = DDPStrategy(cluster_environment=_Joined(), broadcast_buffers=False)
    return {"strategy": strategy, "devices": settings.devices, "num_nodes": settings.num_nodes}


def one_cycle(module: nn.Module, *, lr: float, steps: int, weight_decay: float) -> Any:
    """AdamW on what requires a gradient, and a one-cycle schedule, as Lightning wants them.

    Betas as in VAR; only the matrices of linear and convolution layers are decayed.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    layers = [m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    matrices = {id(m.weight) for m in layers}
    groups = [
        {"params": [p for p in trained if id(p) in matrices], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) not in matrices], "weight_decay": 0.0},
    ]
    optimiser = AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.95), fused=True)
    # A hair above a tenth: of exactly ten steps the rise would take none, and divide by zero.
    schedule = OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.1 + 1e-9)
    return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
