"""Pieces for Avalanche's strategies where its own do not do; why stands at each of them.

Imported only where a strategy is built: it brings Avalanche with it, which takes seconds.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from avalanche.benchmarks.utils import concat_datasets
from avalanche.benchmarks.utils.data_loader import GroupBalancedInfiniteDataLoader
from avalanche.models import FeCAMClassifier, avalanche_forward
from avalanche.training.losses import ICaRLLossPlugin, MaskedCrossEntropy
from avalanche.training.plugins import AGEMPlugin, BiCPlugin, MASPlugin, bic
from avalanche.training.storage_policy import ClassBalancedBuffer, ReservoirSamplingBuffer
from avalanche.training.supervised import DER, ER_ACE, SCR, ICaRL, StreamingLDA
from avalanche.training.utils import zerolike_params_dict
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import MultiStepLR
from torch.utils.data import DataLoader


class SharedAGEM(AGEMPlugin):
    """A-GEM with a memory that is bounded in all and shared evenly by the classes.

    Avalanche's keeps so many images of every experience, for ever more of them, and holds an open
    loader in between, which cannot be pickled.
    """

    def __init__(self, mem_size: int, sample_size: int) -> None:
        super().__init__(mem_size, sample_size)
        self.storage_policy = ClassBalancedBuffer(mem_size)

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        if self.buffers:  # which lie class after class, so that they must be shuffled
            size = min(self.sample_size, len(self.buffers[0]))
            loader = GroupBalancedInfiniteDataLoader(
                self.buffers, batch_size=size, shuffle=True, drop_last=True
            )
            self.buffer_dliter = iter(loader)

    def after_training_exp(self, strategy: Any, **_: Any) -> None:
        self.storage_policy.update_from_dataset(strategy.experience.dataset)
        self.buffers = [self.storage_policy.buffer]
        self.buffer_dliter, self.reference_gradients = iter([]), torch.empty(0)


class MendedSI:
    """Synaptic Intelligence (arXiv 1703.04200), as its authors' code has it.

    Avalanche's keeps views of the weights where it means copies, on a CPU: none seems to have
    moved, every importance is zero, and it learns as one that does nothing against forgetting. On
    a GPU it bounds importances by 0.001, which makes nearly all of them equal.
    """

    supports_distributed = False

    def __init__(self, si_lambda: float, damping: float) -> None:
        self.si_lambda, self.damping = si_lambda, damping
        self.anchors: dict[str, Tensor] = {}  # the weights after the last experience
        self.importances: dict[str, Tensor] = {}

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        for name, weight in strategy.model.named_parameters():  # some have grown by new classes
            self.anchors[name] = _grown(self.anchors.get(name), weight.detach())
            old = self.importances.get(name)
            self.importances[name] = _grown(old, torch.zeros_like(weight))
        self.started = _copied(strategy.model)
        self.paths = {name: torch.zeros_like(weight) for name, weight in self.started.items()}

    def before_training_iteration(self, strategy: Any, **_: Any) -> None:
        self.before = _copied(strategy.model)

    def before_backward(self, strategy: Any, **_: Any) -> None:
        for name, weight in strategy.model.named_parameters():
            away = (weight - self.anchors[name]).square()
            strategy.loss += self.si_lambda * (self.importances[name] * away).sum()

    @torch.no_grad()
    def after_training_iteration(self, strategy: Any, **_: Any) -> None:
        """Add up by how much each weight lowered the loss, the penalty left out."""
        for name, weight in strategy.model.named_parameters():
            before = self.before[name]
            pull = 2 * self.si_lambda * self.importances[name] * (before - self.anchors[name])
            self.paths[name] -= (weight.grad - pull) * (weight - before)

    @torch.no_grad()
    def after_training_exp(self, strategy: Any, **_: Any) -> None:
        for name, weight in strategy.model.named_parameters():
            moved = (weight - self.started[name]).square()
            earned = self.paths[name] / (moved + self.damping)
            self.importances[name] = (self.importances[name] + earned).clamp_min(0)
        self.anchors = _copied(strategy.model)
        del self.started, self.paths, self.before


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def _grown(old: Tensor | None, new: Tensor) -> Tensor:
    """A copy of `new` that holds `old`, of fewer units or as many, where that has values."""
    grown = new.clone()
    if old is not None:
        grown[tuple(slice(size) for size in old.shape)] = old
    return grown


class MendedMAS(MASPlugin):
    """Memory Aware Synapses whose importances are those of the network that answers.

    Avalanche's reads the images in training mode, class after class: importances are taken with the
    statistics of a class alone, and the running ones that it leaves behind are those of the last,
    which costs the newest group several points of accuracy. And it takes a loss of exactly zero,
    which a network that fits its images reaches, for one that is missing.
    """

    def before_backward(self, strategy: Any, **_: Any) -> None:
        if not self.importance:  # in the first experience
            return
        for name, weight in strategy.model.named_parameters():
            if name in self.importance:  # others are new
                away = (weight - self.params[name].expand(weight.shape)).square()
                importance = self.importance[name].expand(weight.shape)
                strategy.loss += self._lambda * (importance * away).sum()

    def _get_importance(self, strategy: Any) -> dict[str, Any]:
        """The mean size of each weight's gradient of the squared outputs (arXiv 1711.09601)."""
        model, data = strategy.model.eval(), strategy.experience.dataset
        importance = dict(zerolike_params_dict(model))
        batches = DataLoader(data, strategy.train_mb_size, collate_fn=data.collate_fn)
        for images, _, tasks in batches:
            strategy.optimizer.zero_grad()
            outputs_BC = avalanche_forward(model, images.to(strategy.device), tasks)
            outputs_BC.square().sum(1).mean().backward()
            for name, weight in model.named_parameters():
                if weight.grad is not None:
                    importance[name].data += weight.grad.abs() / len(batches)
        return importance


def _cross_entropy_among(classes: Tensor, logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """The cross-entropy over some classes alone, of images of theirs.

    Avalanche's takes the logarithm of a softmax that is rounded to zero where logits are far apart,
    as they are in the first steps of a large learning rate: minus infinity times a target of zero
    is no number, and neither are the weights then.
    """
    others_C = torch.ones(logits_BC.shape[1], dtype=torch.bool, device=logits_BC.device)
    others_C[classes] = False
    return functional.cross_entropy(logits_BC.masked_fill(others_C, -torch.inf), labels_B)


class StableICaRLLoss(ICaRLLossPlugin):
    """iCaRL's loss from logits.

    Avalanche's is of probabilities, and raises an error for one that is no number, on a GPU one
    that leaves it unusable: no word of a divergence is said then.
    """

    old_logits: Tensor | None

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """logits (B, C) and labels (B,) -> the mean binary cross-entropy (arXiv 1611.07725)."""
        wanted_BC = functional.one_hot(targets.long(), logits.shape[1]).float()
        if self.old_logits is not None:
            wanted_BC[:, self.old_classes] = self.old_logits[:, self.old_classes].sigmoid()
            self.old_logits = None
        return functional.binary_cross_entropy_with_logits(logits, wanted_BC)


class MendedICaRL(ICaRL):
    """iCaRL with the loss above."""

    _criterion: Any

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        avalanches, self._criterion = self._criterion, StableICaRLLoss()
        self.plugins[self.plugins.index(avalanches)] = self._criterion


class OwnCrossEntropy(MaskedCrossEntropy):
    """The cross-entropy over the classes of the present experience alone."""

    def __init__(self) -> None:
        super().__init__(mask="new")

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """logits (B, C) and labels (B,) of the present classes -> their mean loss."""
        return _cross_entropy_among(torch.tensor(list(self.current_classes)), logits, targets)


def asymmetric_cross_entropy(
    logits_BC: Tensor, labels_B: Tensor, stored_logits_NC: Tensor, stored_labels_N: Tensor
) -> Tensor:
    """ER-ACE's loss: new images compete among their own classes, stored ones among all."""
    new = _cross_entropy_among(labels_B, logits_BC, labels_B)
    return (new + functional.cross_entropy(stored_logits_NC, stored_labels_N)) / 2


class _ReplaysAllItHas:
    """Replays what is stored also where that is less than a batch.

    Avalanche's two strategies below then replay nothing, and say nothing of it.
    """

    storage_policy: Any

    @property
    def batch_size_mem(self) -> int:
        """Stored images in every step: it changes with the memory, between two experiences."""
        # Not len(storage_policy.buffer), which joins the classes' images anew: Avalanche asks for
        # this number several times a step.
        stored = sum(len(own.buffer) for own in self.storage_policy.buffer_groups.values())
        return max(1, min(self._wished, stored))

    @batch_size_mem.setter
    def batch_size_mem(self, wished: int) -> None:
        self._wished = wished


class MendedDER(_ReplaysAllItHas, DER):
    """DER++."""


class MendedERACE(_ReplaysAllItHas, ER_ACE):
    """ER-ACE."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.ace_criterion = asymmetric_cross_entropy


class MendedSCR(SCR):
    """SCR with all class means of the present network, as in its paper (arXiv 2103.13885).

    Avalanche's takes half of each from the networks that were.
    """

    def compute_class_means(self) -> None:
        self.model.eval_classifier.class_means_dict = {}
        super().compute_class_means()


class MendedBiC(BiCPlugin):
    """BiC within the memory it is given, its images held out for the bias counted in.

    Avalanche's stores those on top; passes MultiStepLR the argument `verbose`, which torch no
    longer knows (TypeError in the second experience); takes the old network's softmax over the
    images of a batch, where the paper has the old classes (arXiv 1905.13260, equation 1); and holds
    out as many images of a class as the memory has room for, though it may have no more than those.
    """

    def __init__(self, mem_size: int, val_percentage: float, **options: Any) -> None:
        super().__init__(mem_size, val_percentage=val_percentage, **options)
        self.storage_policy = ClassBalancedBuffer(mem_size - int(val_percentage * mem_size))

    def before_train_dataset_adaptation(self, strategy: Any, **_: Any) -> None:
        """Hold out of every new class its part of the memory, or its share of its own images."""
        images, experience = strategy.experience.dataset, strategy.clock.train_exp_counter
        of_class: dict[int, list[int]] = {}
        for index, label in enumerate(images.targets):
            of_class.setdefault(int(label), []).append(index)
        self.class_to_tasks |= dict.fromkeys(of_class, experience)
        self.seen_classes.update(of_class)
        rooms = self.get_group_lengths(len(self.seen_classes))
        room_of = dict(zip(self.seen_classes, rooms, strict=True))
        kept = []
        for label, own in of_class.items():
            held_out = min(room_of[label], max(1, int(self.val_percentage * len(own))))
            self.val_buffer[label] = ReservoirSamplingBuffer(room_of[label])
            self.val_buffer[label].update_from_dataset(images.subset(own[:held_out]))
            kept.append(images.subset(own[held_out:]))
        for label, buffer in self.val_buffer.items():
            buffer.resize(strategy, room_of[label])
        strategy.experience.dataset = concat_datasets(kept)

    def cross_entropy(self, new_outputs: Tensor, old_outputs: Tensor) -> Tensor:
        """Of the old classes' logits (B, old classes), now and before."""
        before = functional.softmax(old_outputs / self.T, dim=1)
        return functional.cross_entropy(new_outputs / self.T, before)

    def bias_correction_step(self, *arguments: Any, **options: Any) -> None:
        with _scheduled_as_torch_does():
            super().bias_correction_step(*arguments, **options)


@contextmanager
def _scheduled_as_torch_does() -> Iterator[None]:
    def without_verbose(*arguments: Any, verbose: bool = False, **options: Any) -> MultiStepLR:
        return MultiStepLR(*arguments, **options)

    bic.MultiStepLR = without_verbose
    try:
        yield
    finally:
        bic.MultiStepLR = MultiStepLR


class ExactMemory:
    """Keeps iCaRL's memory within its bound, and takes its class means as the images are.

    Avalanche's rounds the images of a class up, beyond the memory; and it averages the features of
    every exemplar with those of its mirror image, also where a mirrored image is none of its class.
    """

    supports_distributed = False

    def __init__(self, icarl: Any, images: int, mirrored: bool) -> None:
        self.icarl, self.images, self.mirrored = icarl, images, mirrored

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        # After iCaRL's own, which counts the new classes; it takes the ceiling of memory over seen.
        seen = len(self.icarl.observed_classes)
        self.icarl.memory_size = self.images // seen * seen

    @torch.no_grad()
    def after_training_exp(self, strategy: Any, **_: Any) -> None:
        # After iCaRL's own.
        if self.mirrored:
            return
        strategy.model.eval()
        means = dict(self.icarl.class_means)
        for images, labels in zip(self.icarl.x_memory, self.icarl.y_memory, strict=True):
            features_BD = strategy.model.feature_extractor(images.to(strategy.device))
            mean_D = functional.normalize(features_BD, dim=1).mean(0)
            means[labels[0]] = functional.normalize(mean_D, dim=0)
        self.icarl.class_means = means
        strategy.model.eval_classifier.replace_class_means_dict(means)
        strategy.model.train()


class MendedSLDA(StreamingLDA):
    """Streaming LDA whose covariance takes in no class's distance from zero.

    Avalanche's takes the first image of a class for one so far away from a mean of zeros; its paper
    starts from means that a first batch gave. It also takes in one image after another, and inverts
    the covariance for every batch, to make answers that nobody reads.
    """

    muK: Tensor  # (classes, D), the means
    cK: Tensor  # (classes,), how many images they are of
    Sigma: Tensor  # (D, D)
    num_updates: int

    @torch.no_grad()
    def training_epoch(self, **options: Any) -> None:
        self.model.eval()
        for batch in self.dataloader:
            self.mbatch = batch
            self._unpack_minibatch()
            self._before_training_iteration(**options)
            self.loss = self._make_empty_loss()  # there is none to go down
            self.fit(self.model(self.mb_x), self.mb_y)
            self._after_training_iteration(**options)

    @torch.no_grad()
    def fit(self, x: Tensor, y: Tensor) -> None:
        """Features (B, D) and labels (B,), taken in as if they came one by one."""
        earlier_BB = (y[:, None] == y).to(x).tril(-1)  # images of the same class before an image
        seen_B = self.cK[y] + earlier_BB.sum(1)
        sums_BD = self.cK[y, None] * self.muK[y] + earlier_BB @ x
        means_BD = sums_BD / seen_B.clamp_min(1)[:, None]
        away_BD = torch.where(seen_B[:, None] > 0, x - means_BD, 0)
        before_B = self.num_updates + torch.arange(len(x), device=x.device)
        scatter_DD = (away_BD * (before_B / (before_B + 1))[:, None]).T @ away_BD
        count = self.num_updates + len(x)
        self.Sigma = (self.num_updates * self.Sigma + scatter_DD) / count
        last_B = earlier_BB.sum(0) == 0  # of its class in this batch
        of_class = y[last_B]
        self.muK[of_class] = (sums_BD + x)[last_B] / (seen_B + 1)[last_B, None]
        self.cK[of_class] = (seen_B + 1)[last_B]
        self.num_updates = count


class BatchedFeCAM(FeCAMClassifier):
    """FeCAM that scores all classes at once.

    Avalanche's inverts the covariance of every class for every batch, one class after another, and
    leaves its distances on the CPU. And a class whose images do not vary, as a single one does not,
    it gives a covariance that is no number, which makes all answers the first class.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.precisions: Tensor | None = None  # (classes, D, D), made when they are first asked for

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """features (B, D), none below 0 -> minus the squared distances (B, classes)."""
        if self.precisions is None or len(self.precisions) < len(self.class_covs):
            self.precisions = torch.linalg.pinv(self.class_covs, hermitian=True).to(x.device)
        means_CD = functional.normalize(self.class_means.to(x.device), dim=1)
        features_BD = functional.normalize(x**self.tukey1, dim=1)
        away_CBD = rearrange(features_BD, "b d -> 1 b d") - rearrange(means_CD, "c d -> c 1 d")
        return -((away_CBD @ self.precisions) * away_CBD).sum(-1).T

    def apply_cov_transforms(self, class_cov: dict[int, Tensor]) -> dict[int, Tensor]:
        """Covariances (D, D) by class, ready to be inverted.

        A class that has none of its own gets the mean of the others', and where there are none
        either the unit matrix: the nearest class mean answers then.
        """
        made: dict[int, Tensor] = super().apply_cov_transforms(class_cov)
        valid = {label: cov for label, cov in made.items() if cov.isfinite().all()}
        others = [*self.class_cov_dict.values(), *valid.values()]
        for label, cov in made.items():
            if label not in valid:
                mean = torch.stack(others).mean(0) if others else torch.eye(len(cov))
                valid[label] = mean.to(cov)
        return valid

    def _tukey_transforms(self, x: Tensor) -> Tensor:
        # Avalanche's copies a tensor in a way that torch warns of.
        return x**self.tukey1


class Turns:
    """Turns every image by random quarters, each turn with classes of its own.

    As VAR's trunk learns: few classes alone make a narrow backbone (after PASS, Zhu et al., CVPR
    2021).
    """

    supports_distributed = False

    def before_forward(self, strategy: Any, **_: Any) -> None:
        images_BCHW, labels_B = strategy.mbatch[:2]
        classes = len(strategy.experience.classes_in_this_experience)  # labels from 0 on
        turns_B = torch.randint(4, labels_B.shape, device=labels_B.device)
        turned_4BCHW = torch.stack([images_BCHW.rot90(turn, (2, 3)) for turn in range(4)])
        every_B = torch.arange(len(labels_B), device=labels_B.device)
        strategy.mbatch[0] = turned_4BCHW[turns_B, every_B]
        strategy.mbatch[1] = labels_B + classes * turns_B


class Crops:
    """The second view of SCR: every image of a batch cropped for itself, in one go.

    Its paper crops, mirrors and recolours; not every image may be mirrored or recoloured.
    """

    least = 0.75  # of a side

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """images (B, channels, H, W) -> the same shape."""
        count, device = len(images_BCHW), images_BCHW.device
        size_B = self.least + (1 - self.least) * torch.rand(count, device=device)
        shift_B2 = (1 - size_B)[:, None] * (2 * torch.rand(count, 2, device=device) - 1)
        affine_B23 = torch.zeros(count, 2, 3, device=device)
        affine_B23[:, 0, 0] = affine_B23[:, 1, 1] = size_B
        affine_B23[:, :, 2] = shift_B2
        grid = functional.affine_grid(affine_B23, list(images_BCHW.shape), align_corners=False)
        return functional.grid_sample(images_BCHW, grid, padding_mode="border", align_corners=False)


class Projection(nn.Sequential):
    """From features to the unit sphere that SCR contrasts on: its paper's hidden layer and 128."""

    def __init__(self, features: int) -> None:
        super().__init__(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, 128))

    def forward(self, features_BD: Tensor) -> Tensor:
        return functional.normalize(super().forward(features_BD), dim=1)
